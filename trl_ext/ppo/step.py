"""Steps of the right size, whatever the learning rate: one control for the policy, one for the critic.

A ratio clip bounds the gradient of a sample, not the step: Adam moves every weight by about the learning rate, and a
rate that is ten times too high destroys a policy in one step. Here how far a role has moved in an update is measured on
the rollout itself, in the pass that the next step makes anyway, and answered in three ways: the rate changes from
update to update so that an update covers its target; a policy that has covered it rests for the passes that are left;
and an update that went much too far is taken back and shortened. It is the update, and not its last step alone: each
check sees a part of the rollout, and may find too late that a step before the last went too far for other rows.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from trl_ext.ops.kl import kl_estimate
from trl_ext.roles import Role

Reduce: TypeAlias = Callable[[Tensor], Tensor]
Rows: TypeAlias = Mapping[str, Tensor]
CRITIC_TARGET = 0.25  # of the critic's squared error: see `critic_distance`
TOO_FAR = 2.0  # times the target: the step is shortened
SLOWER, FASTER = 1 / 3, 2.0  # bounds of the rate's change from one update to the next
LEAP = 8.0  # the upper one where the rate is far too low, for half of the way to what it should be
SLOWEST, FASTEST = 1e-5, 1e3  # bounds of the rate's factor
SHORTEST, LONGEST, TRIES = 0.1, 0.7, 6  # bounds of one try to shorten a step, and the number of them
FLOOR = 1e-6  # distances below are rounding in float32
TINY = 1e-12


@torch.no_grad()
def policy_distance(rows: Rows, logps: Tensor, reduce: Reduce) -> float:
    """KL(policy that sampled, policy) of a sequence, nats: the mean over sequences of the sum of k3 over their tokens.

    Source: Schulman, "Approximating KL Divergence", http://joschu.net/blog/kl-approx.html.

    Args:
        rows: Of a rollout: "completion_mask", "action_mask" where there is one, and "logps", those at sampling, (B, T)
            each.
        logps: Those of the policy now, (B, T).
        reduce: Sums a small tensor over all processes.
    """
    mask = _mask(rows)
    old, new = (torch.where(mask, x.detach().float(), 0) for x in (rows["logps"], logps))
    return _ratio(kl_estimate(old, new, "k3").sum(), old.new_tensor(float(len(mask))), reduce)


@torch.no_grad()
def critic_distance(rows: Rows, values: Tensor, reduce: Reduce) -> float:
    """How far the critic has moved, in its own error: mean (V - V_old)^2 / mean (R - V_old)^2, without a unit.

    A step that halves the error covers 0.25; above 1 the values have moved further than they were off.

    Args:
        rows: Of a rollout: "completion_mask", "values", those at sampling, and "returns", (B, T) each.
        values: Those of the critic now, (B, T).
        reduce: Sums a small tensor over all processes.
    """
    mask, old = _mask(rows), rows["values"].float()
    moved, error = (torch.where(mask, (x.detach().float() - old).square(), 0).sum() for x in (values, rows["returns"]))
    return _ratio(moved, error, reduce)


def _mask(rows: Rows) -> Tensor:
    return rows.get("action_mask", rows["completion_mask"]).bool()


def _ratio(numerator: Tensor, denominator: Tensor, reduce: Reduce) -> float:
    above, below = reduce(torch.stack([numerator, denominator])).tolist()
    return float(above / max(below, TINY))


class StepControl:
    """Keeps the distance that one role covers in an update at a target.

    With d the distance after k of K optimizer steps, and f the largest factor of the schedule in the update:

        budget = max(target f^2, noise)
        rate of the next update: times clip(r, 1/3, max(2, min(r / 2, 8))), r = sqrt(target f^2 / (d (K / k)^2)),
            because d grows with its square; at most 2 for a role that does not rest
        d > budget: the role rests until the next rollout, if it `rests`
        d > 2 budget: what the update has moved so far is shortened, at first by sqrt(budget / d), until d is within 2
            budgets; after 6 tries it is taken back. Adam's moments stay: they come from gradients before that step.

    The noise is the distance before the first step of an update, which is not 0 in 16 bits, where a pass over other
    rows rounds in another way. It is taken off d. A step that a float16 scaler skipped is none.

    Every process decides alike, since distances are those of all of them. All that outlives an update is `scale`.

    Args:
        target: Of the distance, at the schedule's full rate.
        steps: Optimizer steps of an update, K.
        rests: Whether the role rests when the budget is spent.

    Attributes:
        scale: The factor on the learning rate.
        resting: No step until the next rollout.
        unchecked: A step was taken since the distance was measured.
        shortened: What was left of this update's way; 1 where it was not shortened.
    """

    def __init__(self, target: float, steps: int, rests: bool):
        self.target, self.steps, self.rests = target, steps, rests
        self.scale = 1.0
        self._weights: list[nn.Parameter] = []
        self._group: dict[str, Any] | None = None
        self.begin()

    def begin(self) -> None:
        """Begin an update, whatever was left of another."""
        self._kept: list[Tensor] = []
        self.taken, self.distance, self.wanted, self.shortened = 0, 0.0, 0.0, 1.0
        self.resting = self.unchecked = False
        self.noise: float | None = None

    def before_step(self, group: dict[str, Any]) -> None:
        """Set the rate of an optimizer's group for one step; before the first of an update keep its weights."""
        self._group, self._rate, self._weights = group, group["lr"], group["params"]
        full = group.get("initial_lr", self._rate)
        self.wanted = max(self.wanted, self.target * (self._rate / full if full else 0.0) ** 2)
        group["lr"] = self._rate * self.scale
        if not self._kept:
            self._kept = [weight.detach().clone() for weight in self._weights]

    def after_step(self, skipped: bool = False) -> None:
        """Give the group back the rate of its schedule; `skipped`: a float16 scaler left the weights as they were."""
        if self._group is not None:
            self._group["lr"], self._group = self._rate, None
            if not skipped:
                self.taken += 1
                self.unchecked = True

    @property
    def waits(self) -> bool:
        """Whether a distance is asked for: before the first step of an update, and after each."""
        return self.unchecked or (self.noise is None and not self.taken)

    @property
    def budget(self) -> float:
        """The distance that the update may cover."""
        return max(self.wanted, self.noise or 0.0, FLOOR)

    def _without_noise(self, distance: float) -> float:
        return max(distance - (self.noise or 0.0), 0.0) if math.isfinite(distance) else math.inf

    def check(self, distance: float, measure: Callable[[], float]) -> bool:
        """Answer to a distance: the one before the first step of an update is noise, the others are of a step.

        Args:
            distance: Between the role at the rollout and now.
            measure: Measures it anew on the same rows.

        Returns:
            Whether the weights have changed, or the role rests from now on: what was computed with them is void.
        """
        if not self.taken:
            self.noise = distance if math.isfinite(distance) else 0.0
            return False
        self.unchecked = False
        distance = self._without_noise(distance)
        shorten = distance > TOO_FAR * self.budget
        if shorten:
            distance = self._shorten(distance, measure)
        self.distance = distance
        self.resting = self.rests and (shorten or distance > self.budget)
        return shorten or self.resting

    @torch.no_grad()
    def _shorten(self, distance: float, measure: Callable[[], float]) -> float:
        ways = [weight.detach() - kept for weight, kept in zip(self._weights, self._kept, strict=True)]
        share = 1.0
        for _ in range(TRIES):
            wanted = math.sqrt(self.budget / distance)  # 0 where the distance is infinite
            share *= min(max(wanted, SHORTEST), LONGEST)
            for weight, kept, way in zip(self._weights, self._kept, ways, strict=True):
                weight.copy_(kept + share * way)
            distance = self._without_noise(measure())
            if distance <= TOO_FAR * self.budget:
                break
        else:
            self.shortened = 0.0
            for weight, kept in zip(self._weights, self._kept, strict=True):
                weight.copy_(kept)
            distance = self._without_noise(measure())
        self.shortened *= share
        self.scale = self._bounded(self.scale * share)
        return distance

    def _bounded(self, scale: float) -> float:
        return min(max(scale, SLOWEST), FASTEST)

    def end(self, measure: Callable[[], float]) -> dict[str, float]:
        """Close an update: check it on rows that are the same for every update, and set the rate of the next.

        Args:
            measure: Measures the distance on some rows of the rollout.

        Returns:
            `distance` covered, the one `wanted`, `scale` of the rate, `steps` taken of those planned, `shortened`;
            nothing where the role took no step.
        """
        if not self.taken:
            return {}
        stats = {"scale": self.scale, "steps": self.taken / self.steps}
        self.check(measure(), measure)  # a role that rests too: a micro-batch of few rows may have let it rest
        if self.wanted > 0 and self.shortened == 1:
            planned = max(self.distance, TINY) * (self.steps / self.taken) ** 2
            ratio = math.sqrt(self.wanted / planned)
            largest = max(FASTER, min(ratio / 2, LEAP)) if self.rests else FASTER
            self.scale = self._bounded(self.scale * min(max(ratio, SLOWER), largest))
        stats |= {"distance": self.distance, "wanted": self.wanted, "shortened": self.shortened}
        self.begin()
        return stats


class StepControls(dict[Role, StepControl]):
    """The controls of the roles that have one; empty: none has.

    Args:
        update_kl_target: Of the policy, nats a sequence; 0 for no control of any role.
        steps: Optimizer steps of an update.
        policy_steps: Those that the policy takes part in. Default: all.
    """

    def __init__(self, update_kl_target: float, steps: int, policy_steps: int | None = None):
        super().__init__()
        if update_kl_target > 0:
            self[Role.POLICY] = StepControl(update_kl_target, policy_steps or steps, rests=True)
            self[Role.CRITIC] = StepControl(CRITIC_TARGET, steps, rests=False)

    def of_groups(self, groups: Iterable[dict[str, Any]]) -> Iterable[tuple[StepControl, dict[str, Any]]]:
        """Each control with the optimizer's group that it governs, of those that take a step now."""
        for group in groups:
            control = self.get(Role(group["role"])) if "role" in group else None
            if control is not None and any(weight.grad is not None for weight in group["params"]):
                yield control, group

    def resting(self, role: Role) -> bool:
        """Whether a role takes no step until the next rollout."""
        return role in self and self[role].resting

    def check(
        self, rows: Rows, outputs: dict[str, Tensor], measure: Callable[[Role, Rows], Tensor], reduce: Reduce
    ) -> bool:
        """Look at how far each role has moved, in the pass before a step.

        Args:
            rows: Of the rollout, those of the pass.
            outputs: Of it: "logps", "values".
            measure: Log-probabilities or values of a role as it is now, (B, T), for rows of a rollout.
            reduce: Sums a small tensor over all processes.

        Returns:
            Whether the pass has to be made anew.
        """
        void = False
        for role, control in self.items():
            if control.waits and OUTPUT[role] in outputs:
                distance = DISTANCE[role](rows, outputs[OUTPUT[role]], reduce)
                void |= control.check(distance, self._measured(role, rows, measure, reduce))
        return void

    def end(self, rows: Rows, measure: Callable[[Role, Rows], Tensor], reduce: Reduce) -> dict[Role, dict[str, float]]:
        """Close an update; `rows` are those of the rollout on which its last step is checked."""
        return {role: c.end(self._measured(role, rows, measure, reduce)) for role, c in self.items()}

    @staticmethod
    def _measured(
        role: Role, rows: Rows, measure: Callable[[Role, Rows], Tensor], reduce: Reduce
    ) -> Callable[[], float]:
        return lambda: DISTANCE[role](rows, measure(role, rows), reduce)

    def state_dict(self) -> dict[str, float]:
        """The factors on the learning rates, by role."""
        return {role.value: control.scale for role, control in self.items()}

    def load_state_dict(self, saved: dict[str, float]) -> None:
        """Continue from what `state_dict` returned; a role that it lacks begins anew."""
        for role, control in self.items():
            control.scale = float(saved.get(role.value, 1.0))


OUTPUT = {Role.POLICY: "logps", Role.CRITIC: "values"}
DISTANCE: dict[Role, Callable[[Rows, Tensor, Reduce], float]] = {
    Role.POLICY: policy_distance,
    Role.CRITIC: critic_distance,
}
