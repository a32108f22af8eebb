"""A reward model in training: one LoRA adapter and a scalar head on a frozen base, as a standard sequence classifier.

The base is loaded as a causal language model and lent to a `...ForSequenceClassification`, whose adapter `AutoPeft`
classes load. So one load serves several adapters in turn, and the base's own LM head is at hand for the imitation term.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftModel,
    PeftModelForSequenceClassification,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from trl_ext.ops.packing import PackedBatch, in_order
from trl_ext.roles.adapters import (
    HEAD_KEY,
    AdapterWeights,
    RewardScale,
    check_equal,
    check_lora_config,
    check_same_scaling,
    lora_config,
    read_adapter,
    write_adapter,
)
from trl_ext.roles.backbone import packed_hidden_states
from trl_ext.roles.base import keep_trainable
from trl_ext.roles.folding import fold
from trl_ext.roles.identity import check_adapter_fits, describe_base
from trl_ext.roles.probe import language_head
from trl_ext.roles.role import Role

ADAPTER = "default"
QUANTIZATION_MARKS = ("is_quantized", "quantization_method", "hf_quantizer", "is_loaded_in_4bit", "is_loaded_in_8bit")


class RewardModel(PeftModelForSequenceClassification):
    """A sequence classifier with one label, around the backbone of a causal language model.

    Args:
        base: Causal language model; frozen here, its weights are not copied.
        peft_config: LoRA configuration. Default: `lora_config("SEQ_CLS")`.

    Attributes:
        language_head: `LMHead` of the base, frozen.
        scale: Mean and standard deviation of the scores on reference responses, saved beside the adapter; None before
            they were measured. Scores computed here are raw.

    Raises:
        TypeError: The base has an adapter, or no language-model head, or no classifier of its architecture exists.
        ValueError: A LoRA configuration that roles on a shared base could not serve later.
    """

    def __init__(self, base: PreTrainedModel, peft_config: LoraConfig | None = None):
        given: Any = base
        if isinstance(given, PeftModel):
            raise TypeError("the base has an adapter already: give the model under it (model.unload()).")
        config = copy.deepcopy(check_lora_config(peft_config or lora_config("SEQ_CLS"), "peft_config"))
        config.task_type, config.modules_to_save = "SEQ_CLS", None  # PEFT adds the head
        base.requires_grad_(False)
        keep_trainable(base)
        head, described = language_head(base), describe_base(base)
        super().__init__(sequence_classifier(base), config)
        self.language_head, self.lm_head = head, head.layer  # the layer moves with the model
        self.described_base = described
        self.scale: RewardScale | None = None
        self.model_card: Callable[[], str] | None = None
        for layer in self._lora_layers():
            fold(layer)

    def _lora_layers(self) -> list[Any]:
        return [module for module in self.modules() if isinstance(module, BaseTunerLayer)]

    @property
    def backbone(self) -> Any:
        """The base without a head, under the adapter."""
        return self.get_base_model().base_model

    @property
    def head_weight(self) -> Tensor:
        """(1, H) of the trained head."""
        head: Any = self.get_base_model().score
        return head.modules_to_save[ADAPTER].weight

    def reset(self, seed: int) -> None:
        """A fresh adapter and a zero head in place of the trained ones; the global random state stays as it was."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for layer in self._lora_layers():
                layer.reset_lora_parameters(ADAPTER, init_lora_weights=True)
        self.head_weight.data.zero_()
        self.scale = None

    def load(self, folder: str | Path) -> None:
        """Go on from an adapter that was saved: weights, head and scale.

        Raises:
            ValueError: It was trained on another base or with another LoRA configuration.
        """
        adapter = read_adapter(folder, "reward adapter")
        check_adapter_fits(adapter, self.described_base, Role.REWARD, str(folder))
        own = get_peft_model_state_dict(self, adapter_name=ADAPTER, save_embedding_layers=False)
        shapes = {key: value.shape for key, value in own.items() if "lora_" in key}
        weights = adapter.weights or {}
        if shapes != {key: value.shape for key, value in weights.items()}:
            raise ValueError(
                f"{folder}: its LoRA weights differ in name or shape. Give the peft_config it was made with."
            )
        remedy = "Give the peft_config it was made with."
        own_config: Any = self.peft_config[ADAPTER]
        check_same_scaling(adapter.config, own_config, f"{folder}: it", remedy)
        loaded: Any = {**weights, HEAD_KEY: adapter.head}
        set_peft_model_state_dict(self, loaded, adapter_name=ADAPTER)
        own = get_peft_model_state_dict(self, adapter_name=ADAPTER, save_embedding_layers=False)
        check_equal(own, loaded, str(folder))
        self.scale = adapter.scale

    def forward(
        self, *args: Any, parts: list[PackedBatch] | None = None, lm_of: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """As a plain classifier without `parts`; else scores of packed sequences, in this single call.

        Args:
            args, kwargs: As in `PeftModelForSequenceClassification`, when `parts` is None.
            parts: From `ops.packing.pack`, N sequences in all.
            lm_of: (N,) bool, the sequences whose response's log-probabilities under the LM head are wanted too.

        Returns:
            `dict` with `scores` (N,) float32 and, with `lm_of`, `logps` (M,) of their response tokens, in any order.
        """
        if parts is None:
            return super().forward(*args, **kwargs)
        scores, logps = [], []
        for part in parts:
            hidden = packed_hidden_states(self.backbone, part)
            with torch.autocast(hidden.device.type, enabled=False):  # a reward is a regression target: float32
                ends = hidden[part.ends].float()
                scores.append(nn.functional.linear(ends, self.head_weight.float()).squeeze(-1))
            if lm_of is not None:
                wanted = lm_of[part.owners]
                logps.append(self.language_head.logprobs(hidden[part.sources[wanted]], part.targets[wanted])[0])
        outputs = {"scores": in_order(parts, scores)}
        return outputs if lm_of is None else outputs | {"logps": torch.cat(logps)}

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str,
        state_dict: dict[str, Tensor] | None = None,
        is_main_process: bool = True,
        max_shard_size: str | int | None = None,
    ) -> None:
        """Write the adapter with its head, as PEFT does, and the scale of the scores and the model card beside it.

        Args:
            save_directory: Made if missing.
            state_dict: Of the model, where it was gathered from several processes.
            is_main_process: Every process takes part, the main one writes.
            max_shard_size: Not used: an adapter is one file. `push_to_hub` gives it.
        """
        weights = get_peft_model_state_dict(self, state_dict, adapter_name=ADAPTER, save_embedding_layers=False)
        if not is_main_process:
            return
        config: Any = copy.deepcopy(self.peft_config[ADAPTER])
        config.base_model_name_or_path = config.base_model_name_or_path or self.described_base.name
        head = weights.pop(HEAD_KEY)
        write_adapter(save_directory, AdapterWeights(config, weights, head, self.scale, self.described_base.record))
        if self.model_card is not None:
            (Path(save_directory) / "README.md").write_text(self.model_card(), encoding="utf-8")


def sequence_classifier(base: PreTrainedModel) -> PreTrainedModel:
    """A one-label classifier of the base's architecture that shares its backbone; its head is zero and float32.

    Raises:
        TypeError: transformers has no such class for the architecture.
    """
    config = copy.deepcopy(base.config)
    config.num_labels = 1
    try:
        with torch.device("meta"):
            classifier = AutoModelForSequenceClassification.from_config(config)
    except ValueError as error:
        raise TypeError(f"transformers has no sequence classifier for {type(base).__name__}: {error}") from error
    backbone: Any = base.base_model
    setattr(classifier, classifier.base_model_prefix, backbone)
    device = backbone.get_input_embeddings().weight.device
    classifier.score = nn.Linear(config.get_text_config().hidden_size, 1, bias=False, device=device)
    nn.init.zeros_(classifier.score.weight)
    left = [name for name, parameter in classifier.named_parameters() if parameter.is_meta]
    if left:
        raise TypeError(f"the sequence classifier of {type(base).__name__} has weights that its base lacks: {left}")
    for name in QUANTIZATION_MARKS:
        if hasattr(base, name):
            setattr(classifier, name, getattr(base, name))
    classifier.name_or_path = base.name_or_path
    return classifier.requires_grad_(False)
