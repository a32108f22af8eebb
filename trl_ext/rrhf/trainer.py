"""RRHF on transformers' `Trainer`: one loss, responses packed behind their prompt, and sampling online."""

import sys
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from datasets import Dataset
from torch import Tensor
from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase, TrainerCallback

from trl_ext.engines import check_engine
from trl_ext.roles import (
    Role,
    SharedBaseModel,
    can_share_prompts,
    check_vocabulary,
    column_limit,
    disable_dropout,
    load_base_config,
    max_positions,
    shared_base_model,
)
from trl_ext.rrhf import metrics
from trl_ext.rrhf.card import model_card
from trl_ext.rrhf.config import RRHFConfig
from trl_ext.rrhf.data import DataReport, collate, encode_dataset, to_batch
from trl_ext.rrhf.losses import best_response_loss, rank_loss, reference_kl_loss, sequence_scores
from trl_ext.rrhf.online import BorderCallback, OnlineSampler
from trl_ext.run_identity import data_facts, reward_facts
from trl_ext.runs import check_finite, check_first_kl
from trl_ext.scoring import ResponseScorer, RewardSource, RewardSources
from trl_ext.text import TextEncoder, end_token_ids, load_generation_config, load_tokenizer, longest
from trl_ext.training import RoleTrainer


class RRHFTrainer(RoleTrainer):
    """Rank responses to align language models with human feedback.

    Source: Yuan et al. 2023, "RRHF: Rank Responses to Align Language Models with Human Feedback without tears" (arXiv
    2304.05302).

    Args:
        model: A Hub id, a folder, a `PreTrainedModel` or a `PeftModel`, which becomes a `SharedBaseModel` without a
            critic: with a fresh policy adapter (from `peft_config`) or the model's own. Or a `SharedBaseModel`.
        args: `RRHFConfig`.
        train_dataset: Columns `prompt`, plain or conversational; `responses`, K >= 2 of them, K may differ; `scores`,
            one number for each. Online, `prompt` alone is enough; other columns reach the reward functions.
        eval_dataset: The same, with responses and scores; or a dict of such.
        processing_class: Tokenizer; default: the model's.
        reward_funcs: What scores online responses: TRL reward functions, sync or async, sequence-classification models
            or their ids, in a list or alone. May be left out when the model has a reward role, and is added to it
            otherwise.
        reward_processing_classes: Tokenizers of such models. Default: their own.
        callbacks, optimizers: As in `Trainer`.
        quantization_config, peft_config: For a model given by id or, `peft_config` only, as a `PreTrainedModel`.

    Attributes:
        data_counts: For each dataset what was found odd in it (`DataReport`); logged once, too.

    Raises:
        ValueError: Bad input, before any model is loaded where that is possible.
    """

    args: RRHFConfig
    model: SharedBaseModel

    _tag_names = ["trl", "trl_ext", "rrhf"]
    _name = "RRHF"

    def __init__(
        self,
        model: Any,
        args: RRHFConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_funcs: RewardSource | list[RewardSource] | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: Any = None,
    ):
        base_name = str(model if isinstance(model, str) else model.config.name_or_path)
        args = args or RRHFConfig(f"{base_name.split('/')[-1]}-RRHF")
        if reward_funcs is not None and not args.online:
            raise ValueError(
                "reward_funcs score responses that are sampled online: set online_every_steps or online_every_pass, "
                "or drop reward_funcs."
            )

        given: Any = args.model_init_kwargs or {}
        init_kwargs = {"trust_remote_code": args.trust_remote_code, **given}

        # 1. Everything that can be wrong without a model
        kept = {k: init_kwargs[k] for k in ("revision", "trust_remote_code") if k in init_kwargs}
        tokenizer: Any = processing_class or load_tokenizer(base_name, **kept)
        template: Any = args.chat_template_kwargs
        self.encoder = TextEncoder(tokenizer, end_token_ids(tokenizer, load_generation_config(model, **kept)), template)
        config = load_base_config(model, **init_kwargs) if isinstance(model, str) else model.config
        check_vocabulary(config, tokenizer)
        max_length = longest(args.max_length, max_positions(config))
        self.data_counts: dict[str, DataReport] = {}
        settings = {"max_length": max_length, "num_proc": args.dataset_num_proc}
        facts = data_facts("train_dataset", train_dataset)
        if args.online:
            has_role = isinstance(model, SharedBaseModel) and model.has_role(Role.REWARD)
            sources = RewardSources(
                reward_funcs,
                args.reward_weights,
                has_reward_role=has_role,
                processing_classes=reward_processing_classes,
                device=args.device,
                load_options=init_kwargs,
            )
            facts |= reward_facts(sources.functions)
            online = {"needs_responses": False, "min_room": args.max_completion_length, "scored": has_role}
            train_dataset = self._encode(train_dataset, "train_dataset", **settings, **online)
        else:
            train_dataset = self._encode(train_dataset, "train_dataset", **settings)
        eval_dataset = self._encode(eval_dataset, "eval_dataset", **settings)

        # 2. One base; policy and reference, and no critic
        set_seed(args.seed)
        model = shared_base_model(model, peft_config, quantization_config, with_critic=False, **init_kwargs)
        if args.disable_dropout:
            disable_dropout(model)

        # 3. transformers' loop
        super().__init__(
            model=model,
            args=args,
            data_collator=collate,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )

        unsplit = "sampling online in rounds that differ between processes" if args.online else None
        check_engine(self.accelerator, model, args.optim, unsplit)

        # 4. What RRHF adds
        self.create_optimizer()
        self.share_prompts = args.share_prompts and can_share_prompts(model.backbone)
        self.max_columns = column_limit(model.backbone)
        self.running_means = {"train": metrics.RunningMeans(), "eval": metrics.RunningMeans()}
        self.sampled_batches: list[dict[str, Any]] = []
        self.sampler = None
        border = BorderCallback(self.sampled_batches)
        if args.online:
            scorer = ResponseScorer(model, self.encoder, sources, role_weight=args.reward_role_weight)
            self.sampler = OnlineSampler(model, self.encoder, args, scorer)
            self.add_callback(border)
        self.add_run_callbacks(facts, border.at_border)
        model.model_card = self._card

    # ------------------------------------------------------------------ the loss

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """rank_coef * rank_loss + sft_coef * best_response_loss + beta * reference_kl_loss."""
        args, training = self.args, self.model.training

        # 1. One pass per role over the packed responses, inside one call of the wrapped module
        batch = to_batch(
            inputs["rows"],
            self.encoder.pad_id,
            share=self.share_prompts,
            max_columns=self.max_columns,
            device=self.accelerator.device,
        )
        roles = (Role.POLICY, Role.REFERENCE) if args.beta > 0 else (Role.POLICY,)
        outputs = model(parts=batch.parts, roles=roles)
        logps, mask, rewards, group = outputs["logps"], outputs["mask"], batch.rewards, batch.group

        # 2. The terms, each a mean over prompts
        scores = sequence_scores(logps, mask, args.length_penalty)
        found = metrics.ranking_metrics(scores, rewards, logps, mask, group)
        losses = {
            "rank_loss": rank_loss(scores, rewards, group, margin=args.margin),
            "sft_loss": best_response_loss(logps, mask, rewards, group, token_mean=args.sft_token_mean),
        }
        terms = {"rank_loss": args.rank_coef * losses["rank_loss"], "sft_loss": args.sft_coef * losses["sft_loss"]}
        if args.beta > 0:
            reference_logps = outputs["reference_logps"]
            if training and args.disable_dropout and self.state.global_step == 0:
                check_first_kl(logps, reference_logps)
            losses["kl_loss"] = reference_kl_loss(logps, reference_logps, mask, group)
            terms["kl_loss"] = args.beta * losses["kl_loss"]
            found |= metrics.kl_metrics(logps, reference_logps, mask)

        # 3. A loss that is not finite ends the run before it reaches the weights
        check_finite("loss", terms, self.state.global_step, str(args.output_dir), self.model)
        found |= metrics.means(losses, len(inputs["rows"]))
        self.running_means["train" if training else "eval"].add(found)
        loss = torch.stack(list(terms.values())).sum()
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        """The loss; metrics are summed on the way, so no logits are kept."""
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    # ------------------------------------------------------------------ the online variants

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The micro-batches of one optimizer step; online, drawn and resampled for all steps until the next moment."""
        if self.state.global_step >= self.state.max_steps:  # as when a finished run is resumed
            return [], None
        if self.sampler is None:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        if not self.sampled_batches:
            step, every = self.state.global_step, self.args.online_every_steps
            steps = sys.maxsize if every is None else every - step % every  # None: to the end of the pass
            steps = min(steps, self.state.max_steps - step)
            wanted = steps * self.args.gradient_accumulation_steps
            batches, _ = super().get_batch_samples(epoch_iterator, wanted, device)
            rows = [row for batch in batches for row in batch["rows"]]
            seed = self.args.seed + 1_000_003 * (step + 1) + self.accelerator.process_index
            if rows or self.sampler.engine is not None:  # which every process must ask
                rows, sampled = self.sampler.resample(rows, seed)
                self.running_means["train"].add(sampled)
            for batch in batches:
                taken, rows = rows[: len(batch["rows"])], rows[len(batch["rows"]) :]
                self.sampled_batches.append({"rows": taken})
        taken = self.sampled_batches[:num_batches]
        del self.sampled_batches[:num_batches]
        return taken, None

    # ------------------------------------------------------------------ logs and the card

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Training logs get the metrics of the steps since the last one, over all processes."""
        if "loss" in logs:
            logs |= self.running_means["train"].take(self._sum, self.accelerator.device)
        super().log(logs, start_time)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """`Trainer`'s, its metrics joined by those of the ranking."""
        self.running_means["eval"] = metrics.RunningMeans()
        output: Any = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        found = self.running_means["eval"].take(self._sum, self.accelerator.device)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in found.items()})
        return output

    def _card(self, *named: Any) -> str:
        others = [name for name, role in self.model.adapters.items() if role is not Role.POLICY]
        sources = [] if self.sampler is None else [f"`{name}`" for name in self.sampler.scorer.sources.names]
        if self.model.has_role(Role.REWARD):
            sources.insert(0, f"a reward adapter on the same base, weight {self.args.reward_role_weight:g}")
        return model_card(self.card_facts(*named), others, sources)

    # ------------------------------------------------------------------ details

    def _encode(self, dataset: Any, name: str, **settings: Any) -> Any:
        """A dataset, or a dict of them, tokenised; None stays None."""
        if dataset is None:
            return None
        if isinstance(dataset, dict):
            return {key: self._encode(part, f"{name}[{key!r}]", **settings) for key, part in dataset.items()}
        with PartialState().main_process_first():
            encoded, self.data_counts[name] = encode_dataset(dataset, name, self.encoder, **settings)
        return encoded

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Of the policy's adapter alone, whatever other roles the model has; DeepSpeed asks for it anew."""
        if self.optimizer is None:
            rates = {Role.POLICY: self.args.learning_rate, Role.CRITIC: 0.0}
            groups = self.model.parameter_groups(rates, self.args.weight_decay)
            optimizer, options = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = optimizer([group for group in groups if group["role"] == Role.POLICY.value], **options)
        return self.optimizer

    def _sum(self, x: Tensor) -> Tensor:
        """The sum of a small tensor over all processes."""
        return self.accelerator.reduce(x, reduction="sum")
