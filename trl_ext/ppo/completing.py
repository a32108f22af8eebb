"""How PPO-Max gets its completions: from the model itself, or from a vLLM server, and what the server's way costs."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from trl_ext.generation.from_trl import Completions, complete
from trl_ext.generation.in_process import engine_first
from trl_ext.generation.vllm import VLLMGeneration
from trl_ext.generation.vllm_options import uses_vllm
from trl_ext.generation.vllm_probe import checked_engine
from trl_ext.generation.vllm_server import SamplingParameters, VLLMError
from trl_ext.ops.masking import masked_mean
from trl_ext.ops.sampler import importance_weights, sampler_figures, sampler_sums
from trl_ext.ppo.ahead import RolloutAhead
from trl_ext.ppo.critic_options import under_deepspeed, under_fsdp
from trl_ext.ppo.rollout import Rollout
from trl_ext.roles.held import HeldWeights, check_held, held_by
from trl_ext.runs import RunGuard
from trl_ext.text import TextEncoder

WARPERS = {"top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0}


def check_sampler(args: Any, model: Any, rollout_func: Any) -> None:
    """Check that whatever samples goes with the model and with what else completes prompts.

    Raises:
        ValueError: It does not.
    """
    if rollout_func is not None and uses_vllm(args):
        given = f"vllm_server_url={args.vllm_server_url!r}" if args.vllm_server_url else "vllm_one_copy=True"
        raise ValueError(f"rollout_func and {given} do not go together: drop one.")
    if not args.vllm_one_copy:
        return
    if under_deepspeed(args) or under_fsdp(args):
        raise ValueError(
            "vllm_one_copy=True does not go with FSDP or DeepSpeed, which hold the weights in their own way: start "
            "without, or use vllm_server_url."
        )
    if not isinstance(model, str):
        held_by(model)


def held_weights(args: Any, model: Any, adapter: Any, **options: Any) -> dict[str, HeldWeights]:
    """Where there is one copy for both, the engine's weights, as an option of `shared_base_model`; else nothing.

    Args:
        args: `PPOMaxConfig`.
        model, adapter, options: Those of `engine_first`; a model that is loaded already has its engine.

    Raises:
        ValueError: Prompts of which the longest is not known.
    """
    if not args.vllm_one_copy or not isinstance(model, str):
        return {}
    if options.get("longest") is None:
        raise ValueError(
            "vllm_one_copy=True needs a train_dataset whose prompts can be measured, for the length of the engine's "
            "sequences: give a Dataset in place of an IterableDataset, or use vllm_server_url."
        )
    return {"held": engine_first(model, adapter, args, **options)}


class CompletesPrompts(Trainer):
    """The part of `PPOMaxTrainer` that completes prompts; before `RLOOTrainer` in a class statement."""

    args: Any
    model: Any
    guard: RunGuard
    vllm_generation: Any = None  # a `VLLMGeneration` of ours where there is a server; TRL knows another one
    ahead: RolloutAhead | None = None  # with `rollout_lag`
    loader: Any
    watch: Any
    coming: Any
    _step: int
    use_vllm: bool
    _last_loaded_step: int
    _generate: Any
    _sum: Any

    def use_server(self, encoder: TextEncoder, longest: int | None) -> None:
        """Sample from the server, or the vLLM of this process, from now on, once it computes what the model does.

        Args:
            encoder: Of the model's tokenizer.
            longest: Tokens of the longest prompt and its completion, where that is known.

        Raises:
            VLLMError: The server does not answer, or computes something else.
            ValueError: With one copy for both, a weight of the base that is another.
        """
        args = self.args
        parameters = SamplingParameters(
            args.max_completion_length,
            tuple(encoder.end_ids),
            args.temperature,
            args.top_p,
            args.top_k or 0,
            args.min_p or 0.0,
            args.repetition_penalty,
        )
        if args.vllm_one_copy:
            weights = ((name, p) for name, p in self.model.named_parameters() if self.model.owner(name) is None)
            check_held(weights, held_by(self.model))
        given = (self.model, args, parameters, encoder.tokenizer, str(args.output_dir))
        engine = checked_engine(*given, longest=longest, seed=args.seed)
        self.vllm_generation = VLLMGeneration(engine, parameters, encoder.pad_id)
        self.use_vllm = True
        if args.rollout_lag:
            self.ahead = RolloutAhead(self.vllm_generation, encoder, args, lambda: self.loader.folder)
            self.coming = self.ahead.coming
            self.add_callback(self.ahead)

    def _complete(self, prompts: list[Any]) -> Completions:
        self.guard.start_tracking(self.args, self.state, self.control, model=self.model)  # TRL logs how long it takes
        # TRL brings a server weights once a step. The policy changes without one too: by the guard, at the end of a
        # run, on resuming; and the role may be another. What is there already is not sent again.
        self._last_loaded_step = -1
        training = bool(self.model.training)
        if self.vllm_generation is not None:
            self.vllm_generation.of_training = training
        completions = complete(self._generate, self.model, self.args, prompts, self.vllm_generation)
        if self.ahead is not None and training:
            self.ahead.begin(self._step, self.state)
        return completions

    def drop_ahead(self) -> None:
        """Want no more the rollout that was sampled ahead, by a policy that was undone."""
        if self.ahead is not None:
            self.ahead.drop()

    def _room_for_lag(self, tokens: float) -> float:
        """By how much an update of the policy may move a log-probability, nats a token on average.

        With d the KL of the last update, nats a sequence, as the step control has measured it, and n the tokens of a
        sequence: E |x| <= sqrt(E x^2), where E x^2 is 2 d / n to the second order. Twice that, since d was measured on
        other rows. Infinite where no step control measures; 0 where the policy stood still.
        """
        if not self.args.update_kl_target:
            return math.inf
        moved = self.watch.stats.get("update_kl", 0.0)
        return 2 * math.sqrt(2 * max(moved, 0.0) / max(tokens, 1.0))

    def compare_with_sampler(self, rollout: Rollout) -> dict[str, float]:
        """Fill `sampler_logps` and `importance` where a server sampled, and say how far it is from the policy.

        Args:
            rollout: Of the last completions, scored. `logps` stay the trainer's.

        Raises:
            RuntimeError: Further than `vllm_max_logp_difference` on average, for a lagging rollout and what the update
                between has moved, with the likely cause; on every process.
        """
        if self.vllm_generation is None:
            return {}
        args, mask = self.args, rollout.completion_mask.bool()
        theirs = rollout.sampler_logps = beside(rollout, self.vllm_generation.logps)
        cut = args.vllm_importance_sampling_clip_max
        weights = importance_weights(rollout.logps, theirs, mask, cut)
        if args.vllm_importance_sampling_correction:
            rollout.importance = weights
        sums, largest = sampler_sums(rollout.logps, theirs, weights, mask)
        largest = self.accelerator.gather(largest[None]).amax(0)
        sums = self._sum(sums)
        figures = sampler_figures(sums, largest)
        mean, bound = figures.get("sampling/sampling_logp_difference/mean", 0.0), args.vllm_max_logp_difference
        if self.ahead is not None:
            lagging = self.vllm_generation.lagging
            figures["sampling/lag"] = float(lagging)
            rows = len(mask) * self.accelerator.num_processes
            bound += self._room_for_lag(float(sums[0]) / rows) if lagging else 0.0
        if not mean <= bound:
            raise VLLMError(self._why_so_far(rollout, theirs, mask, mean, bound))
        return figures

    def _why_so_far(self, rollout: Rollout, theirs: Tensor, mask: Tensor, mean: float, bound: float) -> str:
        args = self.args
        found = (
            f"{self.vllm_generation.engine.server.url} sampled with log-probabilities that are {mean:.3g} nats a "
            f"token from the policy's on average, more than vllm_max_logp_difference="
            f"{args.vllm_max_logp_difference:g}"
        )
        room = bound - args.vllm_max_logp_difference
        found += f" and the {room:.3g} that the update between may have moved. " if room > 0 else ". "
        warpers = [n for n, off in WARPERS.items() if (getattr(args, n) or off) != off]
        if warpers:
            return found + (
                f"{', '.join(warpers)} make a part of it, for which the importance weights make up: raise "
                "vllm_max_logp_difference, or leave them out."
            )
        if rollout.reference_logps is not None:
            of_reference = self._sum(masked_mean((theirs - rollout.reference_logps).abs(), mask))
            if float(of_reference) / self.accelerator.num_processes < mean / 2:
                return found + (
                    "They are nearer to the reference's: the server does not apply the policy's adapter. Restart it."
                )
        return found + (
            "At the start they agreed. As a policy sharpens, coarse weights of the server count for more: start it "
            "with the --dtype of this run, or raise vllm_max_logp_difference; or somebody has changed what it serves: "
            "restart it, and the run with resume_from_checkpoint."
        )


def beside(rollout: Rollout, logps: Sequence[Sequence[float]]) -> Tensor:
    """What sampled the completions of a rollout gave for each of their tokens, (B, T), 0 behind their ends."""
    padded = torch.zeros(rollout.completion_mask.shape)
    for i, row in enumerate(logps):
        padded[i, : len(row)] = torch.tensor(row)
    return padded.to(rollout.logps.device)
