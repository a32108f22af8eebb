"""What PPO-Max does between steps: checkpoints at the borders between rollouts, the policy's rate, gradient norms."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, get_scheduler
from transformers.trainer_callback import ExportableState

from trl_ext.engines import keep_untrained
from trl_ext.ppo.ahead import seed_of_epoch
from trl_ext.ppo.state import PPOState
from trl_ext.roles import Role
from trl_ext.roles.sharding import total_norm
from trl_ext.runs import check_finite


class PPOStateCallback(TrainerCallback, ExportableState):
    """Carries `PPOState` through `Trainer`'s checkpoints, and keeps them at the borders between rollouts.

    In the middle of a rollout batch a checkpoint would have to hold the batch too. Saving and evaluating wait for the
    end of it instead, at most `steps_per_generation * num_iterations` micro-batches.

    Checkpoints know it by the name of its class.

    Args:
        ppo_state: The trainer's.
        restart: Told the number of micro-batches that were trained, it makes the trainer begin with a fresh rollout.
        record: Adds values to the means that the next log prints.
        end_update: Called when the update of a rollout batch is over.
        scaled: Whether a float16 scaler skips steps whose gradients are not finite, by itself.
        own_schedule: Whether the learning rate's schedule is made from the configuration, and not given by the user.
        zero: Whether DeepSpeed steps the optimizer, which gives a policy that waits gradients of zeros.
    """

    def __init__(
        self,
        ppo_state: PPOState,
        *,
        restart: Callable[[int], None] = lambda micro_batches: None,
        record: Callable[[dict[str, float]], None] = lambda values: None,
        end_update: Callable[[], None] = lambda: None,
        scaled: bool = False,
        own_schedule: bool = True,
        zero: bool = False,
    ):
        self.ppo_state = ppo_state
        self.restart, self.record, self.end_update = restart, record, end_update
        self.scaled, self.own_schedule, self.zero = scaled, own_schedule, zero
        self.save_waits = self.evaluate_waits = False

    def state(self) -> dict[str, Any]:
        """What `Trainer` writes into `trainer_state.json`."""
        return {"args": {}, "attributes": self.ppo_state.state_dict()}

    def on_train_begin(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **kwargs: Any) -> None:
        # TRL counts micro-batches from 0 and keeps its buffer. Without this, a run that goes on from the middle of a
        # rollout (where `max_steps` or an interrupt ended the last one) would generate at the wrong steps from then on.
        self.restart(state.global_step * args.gradient_accumulation_steps)
        for steps in self.ppo_state.steps.values():
            steps.begin()
        args.check_critic_warmup(state.max_steps)
        self.ppo_state.policy_start = args.warmup_of_critic(state.max_steps)
        if state.global_step > 0:
            saved = (state.stateful_callbacks or {}).get(type(self).__name__)
            if not isinstance(saved, dict) or "moments" not in saved.get("attributes", {}):
                raise ValueError("this checkpoint holds no PPO-Max state: it was not written by PPOMaxTrainer.")
            self.ppo_state.load_state_dict(saved["attributes"], state.global_step)
        if self.own_schedule and self.ppo_state.policy_start > 0:
            start_schedule_with_policy(lr_scheduler, args, self.ppo_state, state.max_steps)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        """Give each epoch an order of its own that a resumed run can find again."""
        batch_sampler = getattr(train_dataloader, "batch_sampler", None)
        batch_sampler = getattr(batch_sampler, "batch_sampler", batch_sampler)
        generator = getattr(getattr(batch_sampler, "sampler", None), "generator", None)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(seed_of_epoch(args.seed, state.epoch))

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if self.zero:
            waits, waited = (self.ppo_state.policy_waits(step) for step in (state.global_step, state.global_step - 1))
            keep_untrained(optimizer, Role.POLICY.value, waits, waited)

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, model: Any = None, **kwargs: Any
    ) -> None:
        """Log learning rate and gradient norm of each role; a norm that is not finite ends the run."""
        for steps, group in self.ppo_state.steps.of_groups(optimizer.param_groups):
            steps.before_step(group)
        norms = {}
        for group in optimizer.param_groups:
            if "role" not in group:
                continue
            grads = [p.grad for p in group["params"] if p.grad is not None]
            if grads:
                norms[group["role"]] = total_norm(grads)
            self.record({f"learning_rate/{group['role']}": group["lr"]})
        self.record({f"grad_norm/{role}": norm.item() for role, norm in norms.items()})
        if norms and not self.scaled:
            check_finite("gradient norm", norms, state.global_step, str(args.output_dir), model)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        skipped = bool(getattr(optimizer, "step_was_skipped", False))
        for steps in self.ppo_state.steps.values():
            steps.after_step(skipped)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.save_waits |= control.should_save
        self.evaluate_waits |= control.should_evaluate
        at_border = args.at_border(state.global_step, state.max_steps)
        control.should_save, control.should_evaluate = self.save_waits and at_border, self.evaluate_waits and at_border
        if at_border:
            self.end_update()
            self.save_waits = self.evaluate_waits = False

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """`load_best_model_at_end` brings back the best policy; the critic saved with it belongs to it."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            critic = Path(state.best_model_checkpoint) / Role.CRITIC.value
            model.load_adapter(str(critic), Role.CRITIC.adapter_name)


def start_schedule_with_policy(scheduler: Any, args: Any, ppo_state: PPOState, steps: int) -> None:
    """Let the policy's learning rate follow its schedule from the policy's own first step on, to the end of the run.

        factor(step) = schedule of (steps - policy_start) steps, at max(step - policy_start, 0)

    Counted from the first step of the run, the critic's warm-up would use up the learning rate's: the policy's first
    step would be a full one, divided by second moments that one gradient has made. `policy_start` is read at every
    step, because the critic may end its warm-up early. The critic's schedule is that of the whole run.

    Args:
        scheduler: Of the run; one that is no function of the step (ReduceLROnPlateau) is left as it is.
        args: `TrainingArguments`.
        ppo_state: Knows the first step.
        steps: Optimizer steps of the run.
    """
    scheduler = getattr(scheduler, "scheduler", scheduler)  # inside accelerate's, under DeepSpeed
    if not isinstance(scheduler, LambdaLR):
        return

    @cache
    def schedule_of(steps: int) -> Callable[[int], float]:
        # Schedules with a floor divide it by the optimizer's learning rate
        unused = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.learning_rate)
        warmup = args.get_warmup_steps(steps)
        options = {"num_warmup_steps": warmup, "num_training_steps": steps}
        made = get_scheduler(
            args.lr_scheduler_type, unused, **options, scheduler_specific_kwargs=args.lr_scheduler_kwargs
        )
        return made.lr_lambdas[0]

    def factor(step: int) -> float:
        start = ppo_state.policy_start
        return schedule_of(steps - start)(max(step - start, 0))

    for i, group in enumerate(scheduler.optimizer.param_groups):
        if group.get("role") == Role.POLICY.value:
            scheduler.lr_lambdas[i] = factor
