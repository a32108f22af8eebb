"""A base on weights that something else holds: an engine in the same process, whose tensors it takes as they are."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

STATE = ".quant_state."  # in the names of what bitsandbytes saves beside packed bytes


@dataclass
class HeldWeights:
    """The weights of a base, and what holds them.

    Attributes:
        tensors: By the names that they have in a checkpoint, those that are tied once; of a layer in 4 bits the packed
            bytes, and beside them what bitsandbytes saves of their state (`QuantState.as_dict(packed=True)`).
        dtype: Of what is not packed.
        holder: Kept as long as the base.
    """

    tensors: Mapping[str, Tensor]
    dtype: torch.dtype
    holder: Any = None

    @property
    def packed(self) -> bool:
        """Whether layers are in 4 bits."""
        return any(STATE in name for name in self.tensors)


def empty_base(config: Any, trust_remote_code: bool = False) -> Any:
    """The base of a configuration, without memory for its weights."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def base_on(
    held: HeldWeights, config: Any, quantization_config: Any, options: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Make a base of these weights, and copy none of them.

    Args:
        held: As many as the model has.
        config: The base's.
        quantization_config: `BitsAndBytesConfig` where layers are packed. Double quantisation is left out: the state
            that is held has no second level.
        options: Of `load_base`. What says where and how to load is for whoever has loaded the weights.

    Returns:
        The base, and what transformers says of its loading.

    Raises:
        ValueError: Weights of another kind than asked for, or of another shape.
    """
    if held.packed != (quantization_config is not None):
        raise ValueError(
            f"the engine holds the base {'in 4 bits' if held.packed else 'unquantised'}, and the trainer asks for "
            f"quantization_config={quantization_config}: give both the same."
        )
    config, name = copy.deepcopy(config), config.name_or_path
    trusted = bool(options.get("trust_remote_code", False))
    more = {key: options[key] for key in ("attn_implementation",) if key in options}
    device = next(iter(held.tensors.values())).device
    if quantization_config is not None:
        config.quantization_config = quantization_config.to_dict() | {"bnb_4bit_use_double_quant": False}
        more["device_map"] = {"": device}
    kind = type(empty_base(config, trusted))
    base, loaded = kind.from_pretrained(
        None, config=config, state_dict=dict(held.tensors), dtype=held.dtype, output_loading_info=True, **more
    )
    if loaded["mismatched_keys"]:
        raise ValueError(f"{name}: the engine holds weights of other shapes: {sorted(loaded['mismatched_keys'])[:3]}.")
    if quantization_config is None:
        base.to(device)  # its buffers
    base.name_or_path = base.config.name_or_path = name
    try:
        base.generation_config = GenerationConfig.from_pretrained(name, revision=options.get("revision") or "main")
    except OSError:  # it has none: transformers has made one from the model's configuration
        base.generation_config._from_model_config = True
    base.held = held
    return base, loaded


def held_by(model: Any) -> HeldWeights:
    """What a model's base was made on.

    Args:
        model: A `PeftModel`.

    Raises:
        ValueError: It has weights of its own.
    """
    held = getattr(model.get_base_model() if hasattr(model, "get_base_model") else model, "held", None)
    if held is None:
        raise ValueError(
            "vllm_one_copy=True: the model was loaded without the engine, which must come first. Give it by name, or "
            "as SharedBaseModel.from_pretrained(..., held=trl_ext.generation.in_process.engine_first(...))."
        )
    return held


def check_held(weights: Iterable[tuple[str, Tensor]], held: HeldWeights) -> None:
    """Check that weights lie in what is held, and not in a copy.

    Args:
        weights: Those of a base, with their names.
        held: What it was made of.

    Raises:
        ValueError: One that does not, by name.
    """
    storages = {tensor.untyped_storage().data_ptr() for tensor in held.tensors.values()}
    apart = [name for name, weight in weights if weight.untyped_storage().data_ptr() not in storages]
    if apart:
        raise ValueError(
            f"{len(apart)} weights of the base are not the engine's but copies, first {apart[0]!r}: this model, or "
            "these options, cannot have one copy for both. Set vllm_one_copy to False."
        )
