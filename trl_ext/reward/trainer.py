"""Reward models on TRL: `RewardTrainer` with the losses of two papers, and nothing computed twice."""

import logging
import warnings
from typing import Any

import torch
from accelerate.utils import set_seed
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import RewardTrainer

from trl_ext.data import ConversionReport
from trl_ext.engines import check_engine
from trl_ext.reward.card import model_card
from trl_ext.reward.config import RewardModelConfig
from trl_ext.reward.data import TRAINING, overlap, prepare_tokenizer, tokenize_preferences
from trl_ext.reward.losses import centering_losses, imitation_loss, pair_losses
from trl_ext.reward.metrics import evaluate_pairs, result_rows
from trl_ext.reward.pair_statistics import accuracy_by_source
from trl_ext.reward.scoring import make_collator, response_lengths, score_batches
from trl_ext.roles import (
    RewardModel,
    RewardScale,
    check_vocabulary,
    disable_dropout,
    load_base,
    load_base_config,
    max_positions,
)
from trl_ext.run_identity import data_facts
from trl_ext.runs import check_finite
from trl_ext.text import TextEncoder, load_tokenizer
from trl_ext.training import RoleTrainer

logger = logging.getLogger(__name__)


class RewardModelTrainer(RoleTrainer, RewardTrainer):
    """A reward model by LoRA: a scalar head on a frozen base, from pairs or from rankings.

        loss = mean over prompts of the mean over its pairs of -log sigma(s_w - s_l - margin), labels smoothed
             + lm_coef * LM loss of the preferred response + center_rewards_coefficient * mean (s_w + s_l)^2

    Source: Ouyang et al. 2022, arXiv 2203.02155, equation 1 (all pairs of a ranking are one element of the batch); Wang
    et al. 2024, arXiv 2401.06080, section 2.

    Args:
        model: Hub id or folder of a causal language model, such a model, or a `RewardModel`, whose adapter goes on.
        args: `RewardModelConfig`.
        train_dataset: Pairs (`chosen`, `rejected`, and `prompt` unless both repeat it) or rankings (`prompt`,
            `responses`, `scores`), plain or conversational. `margin`, `soft_label`, `strength_mean` and `suspected`
            columns: see the config. With a column `source` the accuracy is logged for each of its names too. Rows that
            cannot be used are counted in `reports`.
        eval_dataset: The same, or a dict of such.
        processing_class, callbacks, optimizers: As in `RewardTrainer`.
        quantization_config: For a model given by id.
        peft_config: LoRA configuration. Default: rank 16 on every linear layer.
        reference_dataset: Rows whose preferred responses the stored scale is measured on. Default: those of
            `eval_dataset`, else of `train_dataset`.

    Raises:
        ValueError, TypeError: Bad input, before any model is loaded.
    """

    args: RewardModelConfig
    model: RewardModel

    _tag_names = ["trl", "trl_ext", "reward-model"]

    def __init__(
        self,
        model: "str | PreTrainedModel | RewardModel",
        args: RewardModelConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: "Dataset | dict[str, Dataset] | None" = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: Any = None,
        reference_dataset: Dataset | None = None,
    ):
        base_name = str(model if isinstance(model, str) else model.name_or_path)
        args = args or RewardModelConfig(f"{base_name.split('/')[-1]}-Reward")
        given: Any = args.model_init_kwargs or {}
        init_kwargs = {"trust_remote_code": args.trust_remote_code, **given}
        if isinstance(model, RewardModel) and peft_config is not None:
            raise ValueError("the model has an adapter already: drop peft_config, or give the base.")

        # 1. The data, which can be wrong without a model
        if processing_class is None:
            kept = {k: init_kwargs[k] for k in ("revision", "trust_remote_code") if k in init_kwargs}
            processing_class = load_tokenizer(base_name, **kept)
        prepare_tokenizer(processing_class, args)
        config = load_base_config(model, **init_kwargs) if isinstance(model, str) else model.config
        check_vocabulary(config, processing_class)
        self.reports: dict[str, ConversionReport] = {}
        self._sources: dict[str, int] = {}
        template: Any = args.chat_template_kwargs
        self._encoder = TextEncoder(processing_class, chat_template_kwargs=template)
        self._data_args, self._positions = args, max_positions(config)
        facts = data_facts("train_dataset", train_dataset)
        train = self._prepare(TRAINING, train_dataset)
        evals = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
        prepared = {k: self._prepare(f"eval_dataset {k}".strip(), v) for k, v in evals.items() if v is not None}
        for key, dataset in prepared.items():
            shared = overlap(train, dataset)
            if shared:
                warnings.warn(
                    f"{shared} of {len(dataset)} rows of eval_dataset {key} hold a response that train_dataset holds "
                    "too: their accuracy is not that of new data. trl_ext.data.deduplicate removes them from training.",
                    stacklevel=2,
                )
        self._reference = next(iter(prepared.values()), train)
        if reference_dataset is not None:
            self._reference = self._prepare("reference_dataset", reference_dataset)
        if args.normalize_rewards and len(self._reference) < 2:
            raise ValueError(
                "there is one reference response, the standard deviation of the score needs two: give a "
                "reference_dataset, or set normalize_rewards=False."
            )

        # 2. One base, one adapter
        set_seed(args.seed)
        if isinstance(model, str):
            model = load_base(model, quantization_config=quantization_config, **init_kwargs)
        elif quantization_config is not None:
            raise ValueError("quantization_config is for a model given by id; this one is loaded already: drop it.")
        if not isinstance(model, RewardModel):
            model = RewardModel(model, peft_config)
        if args.disable_dropout:
            disable_dropout(model)
        collator = make_collator(model, processing_class, args.share_prompts)

        # 3. TRL's loop
        trained = {p: p.data for p in model.parameters() if p.requires_grad}
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=train,
            eval_dataset=prepared if isinstance(eval_dataset, dict) else prepared.get(""),
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        check_engine(self.accelerator, model, args.optim, unsplit="the training of a reward model")
        for parameter, data in trained.items():  # which it casts to bfloat16 on a 4-bit base
            parameter.data = data.to(parameter.device)
        self.evaluation: dict[str, Any] = {}
        model.model_card = self._card
        self.add_callback(_ScaleOfScores(self))
        self.add_run_callbacks(facts)

    # ------------------------------------------------------------------ the seam: loss

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Every term on its own, then their sum; metrics as `RewardTrainer` names them."""
        args = self.args
        outputs = model(parts=inputs["parts"], lm_of=inputs["is_best"] if args.lm_coef > 0 else None)
        scores, weights = outputs["scores"], inputs["weights"]
        chosen, rejected = scores[inputs["winners"]], scores[inputs["losers"]]
        losses = pair_losses(chosen, rejected, inputs["margins"], inputs["label_smoothing"])
        terms = {"preference": (losses * weights).sum()}
        if args.lm_coef > 0:
            terms["imitation"] = args.lm_coef * imitation_loss(outputs["logps"])
        if args.center_rewards_coefficient is not None:
            terms["centering"] = args.center_rewards_coefficient * (centering_losses(chosen, rejected) * weights).sum()
        if self.model.training:
            check_finite("loss", terms, self.state.global_step, str(args.output_dir), self.model)
        self._record(terms, scores.detach(), chosen.detach(), rejected.detach(), inputs)
        loss = torch.stack(list(terms.values())).sum()
        if not return_outputs:
            return loss
        return loss, {"logits": torch.stack([scores[inputs["best"]], scores[inputs["worst"]]], dim=1)}

    @torch.no_grad()
    def _record(
        self, terms: dict[str, Tensor], scores: Tensor, chosen: Tensor, rejected: Tensor, inputs: dict[str, Any]
    ) -> None:
        """Means over the rows of all processes; a row counts once, whatever its number of pairs."""
        mode = "train" if self.model.training else "eval"
        # In training `gather_for_metrics` would cut every batch of the last step to the size of the last one
        gather = self.accelerator.gather if mode == "train" else self.accelerator.gather_for_metrics
        metrics, rows = self._metrics[mode], len(inputs["prompts"])
        if mode == "train":
            tokens = torch.stack([part.attention_mask.sum() for part in inputs["parts"]]).sum()
            # The trainer's state is part of the checkpoint, `RewardTrainer`'s own count is not
            self._total_train_tokens = self.state.num_input_tokens_seen + int(self.accelerator.gather(tokens).sum())
            self.state.num_input_tokens_seen = self._total_train_tokens
        metrics["num_tokens"] = [self._total_train_tokens]
        per_row = torch.zeros(rows, 2, device=scores.device)
        lead = chosen - rejected
        right = (lead > 0).float() + 0.5 * (lead == 0)
        per_row.index_add_(0, inputs["rows"], torch.stack([right, lead], 1) * (inputs["weights"] * rows)[:, None])
        per_row[~inputs["decided"], 0] = torch.nan  # annotators disagree: there is no right side
        per_row = gather(per_row)
        for name, column in zip(("accuracy", "margin"), per_row.T.tolist(), strict=True):
            if known := [value for value in column if value == value]:
                metrics[name].extend(known)
        if self._sources:
            sources = gather(inputs["sources"]).tolist()
            for name, number in self._sources.items():
                found = [
                    value
                    for value, source in zip(per_row[:, 0].tolist(), sources, strict=True)
                    if source == number and value == value
                ]
                if found:
                    metrics[f"accuracy/{name}"].extend(found)
        extremes = gather(torch.stack([scores.min(), scores.mean(), scores.max()])[None])
        metrics["min_reward"].append(extremes[:, 0].min().item())
        metrics["mean_reward"].append(extremes[:, 1].mean().item())
        metrics["max_reward"].append(extremes[:, 2].max().item())
        gathered = gather(torch.stack(list(terms.values())).detach().float()[None])
        for name, value in zip(terms, gathered.mean(0).tolist(), strict=True):
            # As Trainer weighs `loss`: in training every batch the same, in evaluation every row
            metrics[f"loss/{name}"].extend([value] * (1 if mode == "train" else len(per_row)))

    # ------------------------------------------------------------------ evaluation

    def evaluate(self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"):  # type: ignore[no-untyped-def]
        """As `Trainer.evaluate`; a dataset given here is checked and tokenised first."""
        if isinstance(eval_dataset, dict):
            eval_dataset = {key: self._prepare(f"eval_dataset {key}", value) for key, value in eval_dataset.items()}
        elif eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._prepare("eval_dataset", eval_dataset)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    @torch.no_grad()
    def score(self, dataset: Dataset) -> dict[str, Tensor]:
        """Scores of the best and the worst response of every usable row, in order.

        Returns:
            `rows`: indices of the usable rows, (N,); `sources`: numbers of where they come from, (N,), if any are
            known; `decided`, (N,) bool, if there are soft labels of 0.5; `chosen`, `rejected`: raw scores, (N,)
            float32; `chosen_lengths`, `rejected_lengths`: tokens of the responses, (N,). On every process, of all rows.
        """
        dataset = self._prepare("dataset", dataset)
        was_training = self.model.training
        self.model.eval()
        quiet = self.args.disable_tqdm or not self.is_world_process_zero()
        loader = tqdm(self.get_eval_dataloader(dataset), desc="scoring", leave=False, disable=quiet)
        with self.compute_loss_context_manager():
            batches = (self._prepare_inputs(inputs) for inputs in loader)
            scores = score_batches(self.model_wrapped, batches, self.accelerator.gather_for_metrics)
        self.model.train(was_training)
        chosen_lengths, rejected_lengths = response_lengths(dataset)
        known = {"sources": torch.tensor(dataset["source"])} if self._sources else {}
        if "decided" in dataset.column_names and not all(dataset["decided"]):
            known["decided"] = torch.tensor(dataset["decided"])
        return known | {
            "rows": torch.tensor(dataset["row"]),
            "chosen": scores[:, 0],
            "rejected": scores[:, 1],
            "chosen_lengths": chosen_lengths,
            "rejected_lengths": rejected_lengths,
        }

    def evaluate_pairs(
        self, dataset: Dataset | None = None, *, scores: dict[str, Tensor] | None = None
    ) -> dict[str, Any]:
        """All of `reward.metrics.evaluate_pairs`, and accuracy by `source`; kept for the card and the report.

        Pairs whose soft label is 0.5 are left out.

        Args:
            dataset: rows to score. Default: `eval_dataset`, the first of several.
            scores: what `score` has returned for them, where it has been called already.
        """
        if scores is None:
            held_out: Any = self.eval_dataset
            if isinstance(held_out, dict):
                held_out = next(iter(held_out.values()))
            scores = self.score(held_out if dataset is None else dataset)
        if "decided" in scores:
            scores = {name: values[scores["decided"]] for name, values in scores.items()}
        columns = {name: values for name, values in scores.items() if name not in ("rows", "sources", "decided")}
        self.evaluation = evaluate_pairs(**columns)
        if "sources" in scores:
            columns = {name: scores[name] for name in ("chosen", "rejected", "sources")}
            self.evaluation |= accuracy_by_source(**columns, names=self._sources)
        self.recorder.judged(result_rows(self.evaluation))
        return self.evaluation

    def measure_scale(self) -> RewardScale:
        """Mean and standard deviation of the score on reference responses, to be stored with the adapter.

        Raises:
            ValueError: Fewer than two reference responses, or all have the same score.
        """
        count = min(self.args.normalization_samples, len(self._reference))
        chosen = self.score(self._reference.select(range(count)))["chosen"]
        std = float(chosen.std()) if count > 1 else 0.0
        if not std > 0:
            raise ValueError(
                f"the scores of {count} reference responses have standard deviation {std}: there is no scale to store. "
                "Give a reference_dataset of different responses, or set normalize_rewards=False."
            )
        self.model.scale = RewardScale(float(chosen.mean()), std, count)
        return self.model.scale

    # ------------------------------------------------------------------ details

    def _prepare(self, name: str, dataset: Any) -> Dataset:
        """Tokenised rows; a dataset that is tokenised already is returned as it is."""
        if isinstance(dataset, Dataset) and {"ids", "ranks", "prompt_length"} <= set(dataset.column_names):
            return dataset
        if dataset is None:
            raise ValueError(f"{name} is missing.")
        tokenized, report = tokenize_preferences(
            dataset, self._encoder, self._data_args, name, self._positions, self._sources
        )
        self.reports[name] = report
        if report.dropped or report.changed:
            logger.warning("%s: %s", name, report)
        return tokenized

    def _card(self, *named: Any) -> str:
        return model_card(self.card_facts(*named), self.model.scale, self.evaluation)


class _ScaleOfScores(TrainerCallback):
    """Measures the scale of the scores when training has ended; until then there is none: the weights are moving."""

    def __init__(self, trainer: RewardModelTrainer):
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.model.scale = None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.trainer.args.normalize_rewards and not self.trainer.stop.stopped_by:
            self.trainer.measure_scale()
