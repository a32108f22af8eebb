"""What PPO-Max remembers from one rollout to the next, and how it gets into a checkpoint and back."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from trl_ext.ops.kl import AdaptiveKL, FixedKL, KLController, PenaltyKL
from trl_ext.ops.moments import RunningMoments
from trl_ext.roles import Role
from trl_ext.runs import check_finite

if TYPE_CHECKING:
    from trl_ext.ppo.config import PPOMaxConfig
    from trl_ext.ppo.trainer import PPOMaxTrainer

# Fields that change the meaning of what the state holds. A run can't go on with others.
FIXED_FIELDS = (
    "reward_normalization",
    "beta",
    "kl_control",
    "kl_estimator",
    "num_generations",
    "num_iterations",
    "steps_per_generation",
    "generation_batch_size",
    "gradient_accumulation_steps",
    "seed",
)


def make_kl_controller(args: "PPOMaxConfig") -> KLController:
    """The controller that `kl_control` names. A beta of 0 leaves the KL out, so there is nothing to control."""
    if args.kl_control == "fixed" or args.beta == 0:
        return FixedKL(args.beta)
    if args.kl_control == "adaptive":
        assert args.kl_horizon is not None
        return AdaptiveKL(args.beta, args.kl_target, args.kl_horizon)
    return PenaltyKL(args.beta, args.kl_target)


class PPOState:
    """Running moments of the reward, the KL controller, the critic's warm-up, and the number of rollouts."""

    def __init__(self, args: "PPOMaxConfig"):
        self.args = args
        self.moments = RunningMoments()
        self.kl = make_kl_controller(args)
        self.warmup_done = args.critic_warmup_steps == 0
        self.rollouts = 0

    def in_warmup(self, global_step: int) -> bool:
        """Whether this optimizer step trains the critic only."""
        self.warmup_done = self.warmup_done or global_step >= self.args.critic_warmup_steps
        return not self.warmup_done

    def observe(self, metrics: dict[str, float], global_step: int, samples: int) -> None:
        """A rollout batch of `samples` sequences is over: the KL coefficient and the warm-up react to its metrics."""
        warming_up = self.in_warmup(global_step)
        self.observe_explained_variance(metrics["explained_variance"])
        if not warming_up and "kl" in metrics:
            self.kl.update(metrics["kl"], samples)
        self.rollouts += 1

    def observe_explained_variance(self, value: float) -> None:
        """End the warm-up once the critic is as good as `critic_warmup_explained_variance` asks."""
        threshold = self.args.critic_warmup_explained_variance
        if threshold is not None and value >= threshold:
            self.warmup_done = True

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, fit for `trainer_state.json`."""
        return {
            "moments": self.moments.state_dict(),
            "kl": self.kl.state_dict(),
            "warmup_done": self.warmup_done,
            "rollouts": self.rollouts,
            "config": {name: getattr(self.args, name) for name in FIXED_FIELDS},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: It was written under a configuration in which its numbers mean something else.
        """
        for name in FIXED_FIELDS:
            saved, own = state["config"].get(name), getattr(self.args, name)
            if saved != own:
                raise ValueError(
                    f"the checkpoint was written with {name}={saved!r}, this run has {name}={own!r}: its state does "
                    f"not fit. Resume with {name}={saved!r}, or start a new run from the checkpoint's adapters."
                )
        self.moments.load_state_dict(state["moments"])
        self.kl.load_state_dict(state["kl"])
        self.warmup_done, self.rollouts = bool(state["warmup_done"]), int(state["rollouts"])


class PPOStateCallback(TrainerCallback, ExportableState):
    """Carries `PPOState` through `Trainer`'s checkpoints, and keeps them at the borders between rollouts.

    In the middle of a rollout batch a checkpoint would have to hold the batch too. Saving and evaluating wait for the
    end of it instead, at most `steps_per_generation * num_iterations` micro-batches.
    """

    def __init__(self, trainer: "PPOMaxTrainer"):
        self.trainer = trainer
        self.save_waits = self.evaluate_waits = False

    def state(self) -> dict[str, Any]:
        """What `Trainer` writes into `trainer_state.json`."""
        return {"args": {}, "attributes": self.trainer.ppo_state.state_dict()}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # TRL counts micro-batches from 0 and keeps its buffer. Without this, a run that goes on from the middle of a
        # rollout (where `max_steps` or an interrupt ended the last one) would generate at the wrong steps from then on.
        self.trainer._step = state.global_step * args.gradient_accumulation_steps
        self.trainer._buffered_inputs = None
        if state.global_step == 0:
            return
        saved = (state.stateful_callbacks or {}).get(type(self).__name__)
        if not isinstance(saved, dict) or "moments" not in saved.get("attributes", {}):
            raise ValueError("this checkpoint holds no PPO-Max state: it was not written by PPOMaxTrainer.")
        self.trainer.ppo_state.load_state_dict(saved["attributes"])

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        """Give each epoch an order of its own that a resumed run can find again."""
        batch_sampler = getattr(train_dataloader, "batch_sampler", None)
        batch_sampler = getattr(batch_sampler, "batch_sampler", batch_sampler)
        generator = getattr(getattr(batch_sampler, "sampler", None), "generator", None)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(args.seed + int((state.epoch or 0) + 1e-6))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        norms = {}
        for group in optimizer.param_groups:
            if "role" not in group:
                continue
            grads = [p.grad for p in group["params"] if p.grad is not None]
            if grads:
                norms[group["role"]] = torch.linalg.vector_norm(
                    torch.stack([torch.linalg.vector_norm(g.float()) for g in grads])
                )
            self.trainer.record({f"learning_rate/{group['role']}": group["lr"]})
        self.trainer.record({f"grad_norm/{role}": norm.item() for role, norm in norms.items()})
        if norms and self.trainer.accelerator.scaler is None:  # a float16 scaler skips such steps by itself
            check_finite("gradient norm", norms, state.global_step, str(args.output_dir))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """`load_best_model_at_end` brings back the best policy; the critic saved with it belongs to it."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            critic = Path(state.best_model_checkpoint) / Role.CRITIC.value
            self.trainer.model.load_adapter(str(critic), Role.CRITIC.adapter_name)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.save_waits |= control.should_save
        self.evaluate_waits |= control.should_evaluate
        per_rollout = args.steps_per_generation * args.num_iterations
        at_border = state.global_step * args.gradient_accumulation_steps % per_rollout == 0
        at_border = at_border or state.global_step >= state.max_steps
        control.should_save, control.should_evaluate = self.save_waits and at_border, self.evaluate_waits and at_border
        if at_border:
            self.trainer.timer.end_update()
            self.save_waits = self.evaluate_waits = False
