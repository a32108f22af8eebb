"""PPO-Max on TRL: `RLOOTrainer` with a critic, by two overridden methods."""

from pathlib import Path
from typing import Any, TypeAlias

import torch
from accelerate.utils import set_seed
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from torch import Tensor
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import RLOOTrainer

from trl_ext.engines import check_engine, is_fsdp, zero_stage
from trl_ext.generation.vllm_options import uses_vllm
from trl_ext.ops.ensemble import check_weights
from trl_ext.ppo import logging
from trl_ext.ppo.beside import BesideTheLoop
from trl_ext.ppo.callback import PPOStateCallback
from trl_ext.ppo.card import model_card
from trl_ext.ppo.completing import CompletesPrompts, check_sampler, held_weights
from trl_ext.ppo.config import PPOMaxConfig
from trl_ext.ppo.data import PTXBatches, check_inputs, longest_request, ptx_batches
from trl_ext.ppo.guard import completion_figures
from trl_ext.ppo.losses import best_answers_loss, dis_loss, kl_penalty_loss, policy_loss, value_loss
from trl_ext.ppo.rewards import best_answer_weights
from trl_ext.ppo.rollout import Rollout, collect
from trl_ext.ppo.sets import SeveralSets
from trl_ext.ppo.state import PPOState
from trl_ext.ppo.step import OUTPUT, Rows
from trl_ext.ppo.turns import RolloutFunction, TakesTurns
from trl_ext.ppo.watching import WatchCallback
from trl_ext.roles import (
    Role,
    SharedBaseModel,
    check_vocabulary,
    disable_dropout,
    load_base_config,
    max_positions,
    shared_base_model,
)
from trl_ext.roles.sharding import drop_gathered
from trl_ext.run_identity import data_facts, reward_facts
from trl_ext.runs import RunStoppedError, check_finite
from trl_ext.scoring import RewardSource, RewardSources
from trl_ext.text import TextEncoder, end_token_ids, load_generation_config, load_tokenizer
from trl_ext.training import RoleTrainer

AnyDataset: TypeAlias = Dataset | IterableDataset | DatasetDict | IterableDatasetDict | dict[str, Any]
PROBE, LEAST = 4, 4  # an update is checked on one in so many rows of the rollout, and at least so many


class PPOMaxTrainer(RoleTrainer, SeveralSets, BesideTheLoop, TakesTurns, CompletesPrompts, RLOOTrainer):
    """Proximal policy optimisation with the stability tricks of PPO-Max, on TRL's online loop.

    Source: Zheng et al. 2023, "Secrets of RLHF in Large Language Models Part I: PPO" (arXiv 2307.04964); Schulman et
    al. 2017 (arXiv 1707.06347).

    Args:
        model: A `SharedBaseModel`; or a Hub id, a folder, a `PreTrainedModel` or a `PeftModel`, as in `GRPOTrainer`,
            which becomes one: with a fresh policy adapter (from `peft_config`) or the model's own.
        reward_funcs: TRL reward functions (sync or async), sequence-classification models or their ids, in a list or
            alone. May be left out when the model has a reward role, and is added to it otherwise.
        args: `PPOMaxConfig`.
        train_dataset: Column `prompt`, plain or conversational; other columns reach the reward functions.
        eval_dataset: The same, for `eval_strategy`.
        ptx_dataset: Texts for PPO-ptx, needed when `ptx_coef` is above 0 (see `PTXBatches`).
        rollout_func: As in `GRPOTrainer`: completes prompts in its own way, in several turns too (see `turns`).
        processing_class: Tokenizer; default: the model's.
        reward_processing_classes, callbacks, optimizers: As in `RLOOTrainer`.
        quantization_config, peft_config: For a model given by id or, `peft_config` only, as a `PreTrainedModel`.

    Raises:
        ValueError: Bad input, before any model is loaded where that is possible.
    """

    args: PPOMaxConfig
    model: SharedBaseModel
    _logs: dict[str, Any]
    _ptx: PTXBatches | None

    _tag_names = ["trl", "trl_ext", "ppo"]
    _name = "PPO-Max"

    def __init__(
        self,
        model: "str | PreTrainedModel | SharedBaseModel | Any",
        reward_funcs: RewardSource | list[RewardSource] | None = None,
        args: PPOMaxConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: "AnyDataset | None" = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: Any = None,
        ptx_dataset: Dataset | None = None,
        rollout_func: RolloutFunction | None = None,
    ):
        base_name = str(model if isinstance(model, str) else model.config.name_or_path)
        args = args or PPOMaxConfig(f"{base_name.split('/')[-1]}-PPO")
        given: Any = args.model_init_kwargs or {}
        init_kwargs = {"trust_remote_code": args.trust_remote_code, **given}

        # 1. Everything that can be wrong without a model
        check_sampler(args, model, rollout_func)
        self.rollout_func = rollout_func
        kept = {k: init_kwargs[k] for k in ("revision", "trust_remote_code") if k in init_kwargs}
        tokenizer: Any = processing_class or load_tokenizer(base_name, truncation_side="left", **kept)
        tokenizer.padding_side = "left"
        template: Any = args.chat_template_kwargs
        ends = end_token_ids(tokenizer, load_generation_config(model, **kept))
        self.encoder = TextEncoder(tokenizer, ends, template)
        config = load_base_config(model, **init_kwargs) if isinstance(model, str) else model.config
        check_vocabulary(config, tokenizer)
        has_reward_role = isinstance(model, SharedBaseModel) and model.has_role(Role.REWARD)
        members = list(model.adapters.values()).count(Role.REWARD) if isinstance(model, SharedBaseModel) else 0
        check_weights(args.reward_ensemble_weights, args.reward_ensemble, members)
        check_inputs(
            args,
            self.encoder,
            max_positions(config),
            train_dataset,
            eval_dataset,
            ptx_dataset,
            scored=has_reward_role,
            progress=args.process_index == 0 and not args.disable_tqdm,
        )
        sources = RewardSources(
            reward_funcs,
            args.reward_weights,
            has_reward_role=has_reward_role,
            processing_classes=reward_processing_classes,
            device=args.device,
            load_options=init_kwargs,
        )
        self._ptx = None if ptx_dataset is None else ptx_batches(ptx_dataset, self.encoder, args)

        # 2. One base, four roles
        longest = longest_request(args, self.encoder, train_dataset, eval_dataset) if uses_vllm(args) else None
        loading = {"quantization_config": quantization_config, "longest": longest, **init_kwargs}
        init_kwargs = init_kwargs | held_weights(args, model, peft_config, **loading)
        set_seed(args.seed)
        model = shared_base_model(model, peft_config, quantization_config, **init_kwargs)
        args.choose_optim(quantised=getattr(model.get_base_model(), "is_quantized", False))
        if args.use_transformers_continuous_batching:
            model.check_continuous_batching()

        if args.disable_dropout:
            disable_dropout(model)

        # 3. TRL's loop. What it does to the adapters on the way is undone.
        with model.adapters_kept():
            super().__init__(
                model=model,
                reward_funcs=list(sources.functions),
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=tokenizer,
                callbacks=callbacks,
                optimizers=optimizers,
            )
        if args.critic_freeze_attention:
            model.freeze_attention(Role.CRITIC)
        check_engine(self.accelerator, model, args.optim)
        args.warn_about_off_policy_sampling()
        if uses_vllm(args):
            self.use_server(self.encoder, longest)

        # 4. What PPO adds
        self.reward_sources = sources
        engine = zero_stage(self.accelerator) > 0 or is_fsdp(self.accelerator)
        self.create_optimizer()
        self.timer = logging.PhaseTimer()
        self.ppo_state = PPOState.of_run(args)
        state_callback = PPOStateCallback(
            self.ppo_state,
            restart=self._restart,
            record=self.record,
            end_update=self._end_update,
            scaled=self.accelerator.scaler is not None,
            own_schedule=optimizers[1] is None,
            zero=zero_stage(self.accelerator) > 0,
        )
        weights = zip(self.reward_func_names, self.reward_weights.tolist(), strict=True)
        watched = tuple(name for name, weight in weights if weight == 0)
        self.watch = WatchCallback(
            args,
            self.ppo_state,
            watched,
            optimizer=lambda: self.optimizer,
            checkpoint=lambda: self.loader.folder,
            went_back=self.drop_ahead,
            whole=not engine,
        )
        self.add_callback(state_callback)
        self.add_callback(self.watch)
        self.save_beside = self._save_beside
        facts = reward_facts(sources.functions) | data_facts("train_dataset", train_dataset)
        if args.ptx_coef > 0:
            facts |= data_facts("ptx_dataset", ptx_dataset)
        self.add_run_callbacks(
            facts, lambda state: args.at_border(state.global_step, state.max_steps), self.watch.outcome
        )
        model.model_card = self._card

    def finish(self) -> None:
        """As `RoleTrainer.finish`; a run that the guard has stopped saves its policy and raises `RunStoppedError`."""
        super().finish()
        why = self.watch.stopped()
        if why is not None:
            self.save_model()
            raise RunStoppedError(why)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """One group for each trained role, with a learning rate of its own; DeepSpeed asks for it anew."""
        if self.optimizer is None:
            args = self.args
            rates = {Role.POLICY: args.learning_rate, Role.CRITIC: args.critic_learning_rate or 0.0}
            optimizer, kwargs = self.get_optimizer_cls_and_kwargs(args)
            self.optimizer = optimizer(self.model.parameter_groups(rates, args.weight_decay), **kwargs)
        return self.optimizer

    # ------------------------------------------------------------------ the first seam: rollout

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        """From prompts to advantages (docs/ppo_max.md). Returns what `_compute_loss` gets back in micro-batches."""
        args, state, device = self.args, self.ppo_state, self.accelerator.device
        training, step, beta = self.model.training, self.state.global_step, self.ppo_state.kl.coef
        timer = self.timer if training else logging.PhaseTimer()

        # 1. Completions, scores, token rewards, advantages
        rollout = collect(
            inputs,
            self.model,
            args,
            state,
            self.encoder,
            generate=self._complete,
            reward=lambda *scored: self._function_rewards(inputs, *scored),
            reduce=self._sum,
            device=device,
            phase=timer.phase,
            placed=self.reward_sources.take_placed,
            env_mask=self.env_mask,
            warming_up=state.in_warmup(step),
        )
        timer.tokens |= {"generate": int(rollout.completion_mask.sum()), "score": rollout.tokens()}

        # 2. Metrics; the KL coefficient and the warm-up react to them
        logged = logging.rollout_metrics(rollout, self._sum)
        logged |= logging.reward_metrics(self.reward_func_names, rollout.per_function, rollout.role_scores)
        logged |= self.compare_with_sampler(rollout)
        logged["beta"] = beta
        if training:
            figures = completion_figures(rollout, self._sum)
            logged |= {name: value for name, value in figures.items() if name.startswith("completions/")}
            samples, threshold = len(inputs) * self.accelerator.num_processes, args.critic_warmup_explained_variance
            known = logged.get("kl"), figures["completions/distinct_2"], logged["explained_variance"]
            held = state.record_rollout(*known, step, samples, len(inputs), threshold)
            logged |= {} if held is None else {"kl_held": held}
            logged |= self.watch.observe(logged | figures, step)
            logged |= timer.metrics() | logging.memory_metrics(device)
            timer.start_update(rollout.tokens() * self.num_iterations)
            self._probe = rollout.update_batch(max(len(inputs) // PROBE, LEAST))

        # 3. Samples, and what reward functions report
        cells, reported = logging.take_reports(self._pending_extra_logs, self._pending_metrics, len(inputs))
        self.record(logged | reported, rows=len(inputs))
        logging.keep_samples(self.recorder, self.reward_func_names, rollout, args, step if training else None)
        if self.log_completions:
            logging.log_samples(self._logs, self.reward_func_names, rollout)
        for name, column in cells.items():
            self._logs["extra"][name].extend(column)

        # 4. What the update needs
        if args.best_lm_coef > 0:
            scores, lengths = rollout.scores, rollout.actions.sum(1)
            rollout.best_weights = best_answer_weights(scores, lengths, args.best_lm_score, self._per_micro_batch)  # type: ignore[arg-type]
        return rollout.update_batch() | {"num_tokens": self._tokens_per_micro_batch(rollout)}

    # ------------------------------------------------------------------ the second seam: loss

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """Policy loss + vf_coef * clipped value loss (- entropy) (+ language-model loss)."""
        args = self.args
        num_tokens = inputs["num_tokens"]
        batch = Rollout.from_update_batch(inputs)
        mask = batch.actions
        if not self.model.training:  # nothing has moved since the rollout: the losses at ratio 1, without a pass
            outputs = {"logps": batch.logps, "values": batch.values}
        else:
            # 1. One pass per role, inside one call of the wrapped module; anew where it shows that a step was too long
            outputs = self._pass(model, batch)
            if self.ppo_state.steps.check(inputs, outputs, self._outputs_now, self._sum):
                del outputs  # with the activations that it keeps
                drop_gathered(self.model)
                outputs = self._pass(model, batch)

        # 2. The terms, each a token mean over the whole rollout batch of all processes
        value, value_stats = value_loss(
            outputs["values"], batch.values, batch.returns, mask, args.value_clip, num_tokens=num_tokens
        )
        terms = {"value_loss": args.vf_coef * value}
        stats = {"value_loss": value, "clip_fraction/value": value_stats["clip_fraction"]}
        if "logps" in outputs:
            policy, policy_stats = self._policy_loss(outputs["logps"], batch, mask, num_tokens)
            terms["policy_loss"] = policy
            stats |= {"policy_loss": policy, **policy_stats}
            if args.entropy_coef > 0 and "entropy" in outputs:
                terms["entropy"] = -args.entropy_coef * outputs["entropy"].where(mask, 0.0).sum() / num_tokens
            if batch.best_weights is not None:
                stats["best_lm_loss"] = best_answers_loss(outputs["logps"], mask, batch.best_weights)
                terms["best_lm_loss"] = args.best_lm_coef * stats["best_lm_loss"]
            if "ptx_loss" in outputs:
                terms["ptx_loss"] = args.ptx_coef * outputs["ptx_loss"]
                stats["ptx_loss"] = outputs["ptx_loss"]

        # 3. A loss that is not finite ends the run before it reaches the weights
        check_finite("loss", terms, self.state.global_step, str(args.output_dir), self.model)
        self.record(logging.average_over_processes(stats))
        return torch.stack(list(terms.values())).sum()

    # ------------------------------------------------------------------ details

    def _pass(self, model: Any, batch: Rollout) -> dict[str, Tensor]:
        """One pass of each role that is trained now; the policy is not where it waits, and where its step is spent."""
        state = self.ppo_state
        waits = state.policy_waits(self.state.global_step) or state.steps.resting(Role.POLICY)
        outputs: dict[str, Tensor] = model(
            parts=batch.parts(),
            roles=(Role.CRITIC,) if waits else (Role.POLICY, Role.CRITIC),
            temperature=self.temperature,
            entropy="gradient" if self.args.entropy_coef > 0 else None,
            shape=tuple(batch.completion_ids.shape),
            ptx=None if self._ptx is None or waits else self._next_ptx(),
        )
        return outputs

    def _policy_loss(self, logps: Tensor, batch: Rollout, mask: Tensor, num_tokens: Tensor) -> tuple[Tensor, Any]:
        given = (logps, batch.logps, batch.advantages, mask)
        options: Any = {"num_tokens": num_tokens, "weights": batch.importance}
        penalty = self.ppo_state.penalty
        if penalty is not None:
            loss, stats = kl_penalty_loss(*given, penalty.coef, **options)
            return loss, stats | {"kl_penalty_coef": loss.new_tensor(penalty.coef)}
        if self.args.policy_objective == "dis":  # its ratio is to the engine, where one sampled: no weights beside it
            sampled = batch.logps if batch.sampler_logps is None else batch.sampler_logps
            bounds = self.epsilon_low, self.epsilon_high
            loss, stats = dis_loss(logps, sampled, batch.advantages, mask, *bounds, num_tokens=num_tokens)
            return loss, {"clip_fraction/policy": stats.pop("clip_fraction"), **stats}
        loss, stats = policy_loss(*given, self.epsilon_low, self.epsilon_high, **options)
        return loss, {"clip_fraction/policy": stats.pop("clip_fraction"), **stats}

    @torch.no_grad()
    def _outputs_now(self, role: Role, inputs: Rows) -> Tensor:
        """Log-probabilities of the policy or values of the critic, (B, T)."""
        drop_gathered(self.model)
        batch = Rollout.from_update_batch(inputs)
        shape = tuple(batch.completion_ids.shape)
        outputs = self.model(parts=batch.parts(), roles=(role,), temperature=self.temperature, shape=shape)
        return outputs[OUTPUT[role]]

    def _end_update(self) -> None:
        ended = self.ppo_state.steps.end(self._probe, self._outputs_now, self._sum)
        stats = logging.step_metrics(ended)
        self.record(stats)
        self.watch.end_update(stats)
        self.ppo_state.record_update(ended.get(Role.POLICY, {}))
        self.timer.end_update()

    def _sum(self, x: Tensor) -> Tensor:
        """The sum of a small tensor over all processes."""
        return self.accelerator.reduce(x, reduction="sum")

    def _tokens_per_micro_batch(self, rollout: Rollout) -> Tensor:
        """Response tokens of the rollout batch of all processes / micro-batches in it, a scalar.

        As the denominator of every micro-batch, whatever its own length, it makes the mean over micro-batches and
        processes the token mean of the whole batch.
        """
        return self._per_micro_batch(rollout.actions.sum().float())

    def _per_micro_batch(self, count: Tensor) -> Tensor:
        """This process's count in a rollout batch, as that of all processes / their micro-batches; at least 1."""
        parts = self.args.steps_per_generation if self.model.training else 1
        return (self._sum(count) / (parts * self.accelerator.num_processes)).clamp(min=1)

    def _function_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids: Any) -> Tensor:
        """(B, F): this process's rows of what the reward functions return, NaN where one does not apply."""
        if not self.reward_funcs:
            return torch.zeros(len(prompts), 0, device=self.accelerator.device)
        gathered = self._calculate_rewards(self.with_extra_fields(inputs), prompts, completions, completion_ids)
        start = self.accelerator.process_index * len(prompts)
        return gathered[start : start + len(prompts)]

    def _restart(self, micro_batches: int) -> None:  # with a fresh rollout, so many micro-batches into the run
        self._step, self._buffered_inputs = micro_batches, None

    def _save_beside(self, checkpoint: Path) -> None:
        self.watch.save(checkpoint)
        if self.ahead is not None:
            self.ahead.save(checkpoint)

    def _card(self, *named: Any) -> str:
        others = [name for name, role in self.model.adapters.items() if role is not Role.POLICY]
        weights = zip(self.reward_func_names, self.reward_weights.tolist(), strict=True)
        sources = [f"`{name}`, weight {weight:g}" for name, weight in weights]
        if self.model.has_role(Role.REWARD):
            sources.insert(0, f"a reward adapter on the same base, weight {self.args.reward_role_weight:g}")
        return model_card(self.card_facts(*named), others, sources)

    def _next_ptx(self) -> dict[str, Tensor]:
        assert self._ptx is not None
        micro_steps = self.args.gradient_accumulation_steps
        batch = self._ptx.batch(self.state.global_step * micro_steps + self._step % micro_steps)
        return {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}
