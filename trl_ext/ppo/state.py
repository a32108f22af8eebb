"""What PPO-Max remembers from one rollout to the next: a plain record, and how it reads in a checkpoint."""

import logging
import math
from dataclasses import dataclass, field
from typing import Any

from trl_ext.ops.kl import PIKL, AdaptiveKL, FixedKL, KeptDiversity, KLController, PenaltyKL
from trl_ext.ops.moments import RunningMoments
from trl_ext.ppo.step import StepControls

LOGGER = logging.getLogger(__name__)
KL_INTEGRAL, KL_PROPORTIONAL = 0.1, 1.5


def make_kl_controller(args: Any) -> KLController:
    """The controller that `kl_control` names. A beta of 0 leaves the KL out, so there is nothing to control."""
    if args.kl_control == "fixed" or args.beta == 0:
        return FixedKL(args.beta)
    if args.kl_control == "pi":
        return PIKL(args.beta, args.kl_target, KL_INTEGRAL, KL_PROPORTIONAL)
    if args.kl_control == "adaptive":
        assert args.kl_horizon is not None
        return AdaptiveKL(args.beta, args.kl_target, args.kl_horizon)
    return PenaltyKL(args.beta, args.kl_target)


@dataclass
class PPOState:
    """Running moments of the reward, the KL controller, the critic's warm-up, and the number of rollouts.

    Attributes:
        kl: Moves beta.
        policy_start: The first optimizer step that trains the policy; those before it train the critic only.
        moments: Of all sequence scores so far.
        rollouts: How many batches there have been.
        steps: Hold the size of updates.
        diversity: What of it the policy keeps.
        penalty: Moves the coefficient of the KL in the loss, with `policy_objective="kl_penalty"`.
        passes: Optimizer steps of an update, of a pass in it, and passes in one of which the policy takes part.
    """

    kl: KLController
    policy_start: int
    moments: RunningMoments = field(default_factory=RunningMoments)
    rollouts: int = 0
    steps: StepControls = field(default_factory=lambda: StepControls(0.0, 1))
    diversity: KeptDiversity = field(default_factory=lambda: KeptDiversity(0.0, 1.0))
    penalty: PenaltyKL | None = None
    passes: tuple[int, int, int] = (1, 1, 1)

    @classmethod
    def of_run(cls, args: Any) -> "PPOState":
        """The state in which a run with this `PPOMaxConfig` begins."""
        passes = args.steps_per_update, args.steps_per_update // args.num_iterations, args.critic_updates
        steps = StepControls(args.update_kl_target, passes[0], passes[0] // args.critic_updates)
        warmup = args.warmup_of_critic(max(args.max_steps, 0))
        penalised = args.policy_objective == "kl_penalty"
        penalty = PenaltyKL(args.kl_penalty_coef, args.update_kl_target) if penalised else None
        diversity = KeptDiversity(args.diversity_target, args.kl_target)
        return cls(make_kl_controller(args), warmup, steps=steps, diversity=diversity, penalty=penalty, passes=passes)

    def in_warmup(self, step: int) -> bool:
        """Whether this optimizer step trains the critic only."""
        return step < self.policy_start

    def policy_waits(self, step: int) -> bool:
        """Whether this optimizer step trains the critic only: in its warm-up, and in passes that are its own."""
        of_update, of_pass, critic_updates = self.passes
        return self.in_warmup(step) or step % of_update // of_pass % critic_updates > 0

    def record_rollout(
        self,
        kl: float | None,
        distinct_2: float,
        explained_variance: float,
        step: int,
        samples: int,
        rows: int,
        threshold: float | None = None,
    ) -> float | None:
        """React to a rollout batch: beta moves, and the warm-up ends once the critic is as good as was asked.

        Args:
            kl: Mean over sequences, nats; None where it was not measured. In the warm-up the policy stands still, and
                beta with it.
            distinct_2: Of the completions.
            explained_variance: Of the returns by the critic.
            step: Optimizer steps so far, so that the next one has this number.
            samples: Sequences in the batch, of all processes.
            rows: Those of one process.
            threshold: `critic_warmup_explained_variance`.

        Returns:
            The KL that the controller was told of; None where it was told of none.
        """
        self.diversity.record(distinct_2, samples, rows)
        held = None
        if not self.in_warmup(step):
            if kl is not None:
                held = self.diversity.held(kl)
                self.kl.update(held, samples)
        elif threshold is not None and explained_variance >= threshold:
            self.policy_start = step
        self.rollouts += 1
        return held

    def record_update(self, moved: dict[str, float]) -> None:
        """React to an update of the policy: the coefficient of the KL in the loss doubles or halves.

        The target sinks with the square of the schedule's factor, as that of the step does: without it a rate on its
        way to 0 would halve the coefficient for ever.

        Args:
            moved: What `StepControl.end` returned; empty where the policy took no step.
        """
        if self.penalty is not None and moved.get("wanted", 0.0) > 0 and math.isfinite(moved["distance"]):
            self.penalty.update(moved["distance"] / moved["wanted"] * self.penalty.target, 1)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, fit for `trainer_state.json`."""
        return {
            "moments": self.moments.state_dict(),
            "kl": self.kl.state_dict(),
            "diversity": self.diversity.state_dict(),
            "policy_start": self.policy_start,
            "rollouts": self.rollouts,
            "steps": self.steps.state_dict(),
            "penalty": self.penalty.state_dict() if self.penalty is not None else {},
        }

    def load_state_dict(self, saved: dict[str, Any], step: int) -> None:
        """Go on from a checkpoint.

        A warm-up that was over stays over. One that was not is as long as this run's `critic_warmup_steps`.

        Args:
            saved: What `state_dict` returned; or that of version 0.1, which held `warmup_done`, and whose learning
                rate had counted the policy's steps from the first step of the run on.
            step: Optimizer steps that the checkpoint has behind it.
        """
        self.moments.load_state_dict(saved["moments"])
        self.kl.load_state_dict(saved["kl"])
        if "diversity" in saved:
            self.diversity.load_state_dict(saved["diversity"])
        elif self.diversity.target > 0:
            self.diversity.target = 0.0
            LOGGER.warning(
                "the checkpoint is of a version that kept no diversity, and what the policy began with is not known: "
                "diversity_target is off for the rest of this run"
            )
        self.rollouts = int(saved["rollouts"])
        self.steps.load_state_dict(saved.get("steps", {}))
        if self.penalty is not None and saved.get("penalty"):
            self.penalty.load_state_dict(saved["penalty"])
        start = saved.get("policy_start", 0 if saved.get("warmup_done") else step + 1)
        self.policy_start = start if start <= step else max(self.policy_start, step)
