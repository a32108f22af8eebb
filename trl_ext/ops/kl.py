"""The KL penalty: its estimate from samples, and the controllers of its coefficient."""

import math
from typing import Any, Protocol

from torch import Tensor

from trl_ext.ops.masking import check_same_shape

KL_ESTIMATORS = ("k1", "k2", "k3")
FIRST = 5  # rollout batches whose diversity the later ones are compared with
FEWEST, MOST = 3, 2 * FIRST  # of the last rollout batches, taken together
TOGETHER = 32  # completions that they are of, at least
HIGHER = 1.9  # times the KL: the most that a loss of diversity counts for


def kl_estimate(logps: Tensor, ref_logps: Tensor, estimator: str) -> Tensor:
    """An estimate of KL(policy, reference) from each token, which the policy sampled.

    With d = logps - ref_logps:

        k1 = d                      unbiased, may be negative
        k2 = d^2 / 2                biased, never negative; its gradient is, on average, that of the KL
        k3 = exp(-d) - 1 + d        unbiased, never negative

    Source: Schulman, "Approximating KL Divergence", http://joschu.net/blog/kl-approx.html.

    Args:
        logps: log-probabilities under the policy, any shape.
        ref_logps: log-probabilities of the same tokens under the reference, same shape.
        estimator: "k1", "k2" or "k3".

    Returns:
        The estimate, elementwise, same shape.

    Raises:
        ValueError: the shapes differ, or the estimator is unknown.
    """
    check_same_shape(logps=logps, ref_logps=ref_logps)
    difference = logps - ref_logps
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference.square()
    if estimator == "k3":
        return (-difference).expm1() + difference
    raise ValueError(f"unknown KL estimator {estimator!r}; choose one of {', '.join(KL_ESTIMATORS)}")


class KLController(Protocol):
    """What the trainer needs of a controller: a coefficient that follows the KL seen after each rollout."""

    coef: float

    def update(self, kl: float, n: int) -> float: ...

    def state_dict(self) -> dict[str, float]: ...

    def load_state_dict(self, state: dict[str, float]) -> None: ...


class FixedKL:
    """A coefficient that never changes.

    Args:
        coef: the coefficient, finite and not negative.

    Raises:
        ValueError: a bad argument; in `update`, a KL that is not finite.
    """

    def __init__(self, coef: float) -> None:
        self.coef = _non_negative("coef", coef)

    def update(self, kl: float, n: int) -> float:
        """Takes a batch's mean KL of a sequence, in nats, and its number of sequences. Returns the coefficient."""
        _check_observation(kl, n)
        return self.coef

    def state_dict(self) -> dict[str, float]:
        """All that changes during training: the coefficient."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continues from what `state_dict` returned."""
        self.coef = _non_negative("coef", state["coef"])


class AdaptiveKL(FixedKL):
    """A proportional controller: the coefficient grows while the KL is above its target and shrinks below it.

        e = clip(KL / target - 1, -0.2, 0.2)        coef <- coef (1 + e n / horizon)

    Source: Ziegler et al. 2019, arXiv 1909.08593, section 2.2.

    Args:
        coef: the starting coefficient, finite and not negative.
        target: the KL of a sequence to hold, in nats, positive.
        horizon: how slow to be, in samples, positive: at the bound of e, `horizon` samples change coef by 20 %.

    Raises:
        ValueError: a bad argument; in `update`, a KL that is not finite, or a batch of 5 horizons or more, which could
            make the coefficient zero or negative.
    """

    def __init__(self, coef: float, target: float, horizon: float) -> None:
        super().__init__(coef)
        self.target = _positive("target", target)
        self.horizon = _positive("horizon", horizon)

    def update(self, kl: float, n: int) -> float:
        """Takes a batch's mean KL of a sequence, in nats, and its number of sequences. Returns the new coefficient."""
        kl = _check_observation(kl, n)
        if n >= 5 * self.horizon:
            raise ValueError(f"horizon={self.horizon} (in samples) is too short for a batch of {n}; raise it")
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * n / self.horizon
        return self.coef


class PIKL(FixedKL):
    """A proportional-integral controller: the coefficient rises with the KL on its way up, against overshoot.

    With e = KL / target - 1, the change from the last batch d = (KL - KL_last) / target, and KL_last 0 at the start:

        log coef <- log coef + integral clip(e, +-1) + proportional clip(d, +-1)

    `AdaptiveKL` has the integral alone: below the target it lowers the coefficient all the way up, arrives with one
    that is too low, and overshoots. The proportional part adds `proportional` to log coef between a KL of 0 and the
    target, and takes it back when the KL falls.

    Source: the textbook controller in velocity form (Astrom and Murray 2008, "Feedback Systems", section 10.1), on the
    multiplier of a constraint as in Stooke et al. 2020, arXiv 2007.03964, section 5.

    Args:
        coef: the starting coefficient, finite and positive.
        target: the KL of a sequence to hold, in nats, positive.
        integral: change of log coef for one batch whose KL is 0 or twice the target, positive.
        proportional: change of log coef from KL 0 to the target, not negative.

    Raises:
        ValueError: a bad argument; in `update`, a KL that is not finite.
    """

    def __init__(self, coef: float, target: float, integral: float, proportional: float) -> None:
        super().__init__(_positive("coef", coef))
        self.target = _positive("target", target)
        self.integral = _positive("integral", integral)
        self.proportional = _non_negative("proportional", proportional)
        self.last = 0.0

    def update(self, kl: float, n: int) -> float:
        """Takes a batch's mean KL of a sequence, in nats, and its number of sequences. Returns the new coefficient."""
        kl = _check_observation(kl, n)
        error = min(max(kl / self.target - 1, -1.0), 1.0)
        change = min(max((kl - self.last) / self.target, -1.0), 1.0)
        self.coef *= math.exp(self.integral * error + self.proportional * change)
        self.last = kl
        return self.coef

    def state_dict(self) -> dict[str, float]:
        """The coefficient and the last KL."""
        return {"coef": self.coef, "last": self.last}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continues from what `state_dict` returned."""
        super().load_state_dict(state)
        self.last = float(state["last"])


class PenaltyKL(FixedKL):
    """PPO's adaptive penalty: the coefficient doubles or halves when the KL is 1.5 times off its target.

        KL > 1.5 target:  coef <- 2 coef        KL < target / 1.5:  coef <- coef / 2

    Source: Schulman et al. 2017, arXiv 1707.06347, section 4.

    Args:
        coef: the starting coefficient, finite and not negative.
        target: the KL of a sequence to hold, in nats, positive.

    Raises:
        ValueError: a bad argument; in `update`, a KL that is not finite.
    """

    def __init__(self, coef: float, target: float) -> None:
        super().__init__(coef)
        self.target = _positive("target", target)

    def update(self, kl: float, n: int) -> float:
        """Takes a batch's mean KL of a sequence, in nats, and its number of sequences. Returns the new coefficient."""
        kl = _check_observation(kl, n)
        if kl > 1.5 * self.target:
            self.coef *= 2
        elif kl < self.target / 1.5:
            self.coef /= 2
        return self.coef


class KeptDiversity:
    """The KL that a controller is told of where the policy has lost more of its diversity than it may.

    With D the mean distinct-2 of the last rollout batches over that of the first ones:

        KL <- max(KL, min(KL_target (1 - D) / (1 - target), 1.9 KL))

    One coefficient then holds what is further gone of two budgets, KL and diversity. 1.9 times the KL at most: where
    a task wants few different answers the policy still gets more than half of its KL.

    Source: ours; the multiplier of a constraint as in Stooke et al. 2020, arXiv 2007.03964, of two the more violated.

    Args:
        target: the share of the first distinct-2 that is kept, in [0, 1); 0 leaves the KL as it is.
        kl_target: the KL of a sequence that the controller holds, in nats, positive.
    """

    def __init__(self, target: float, kl_target: float) -> None:
        self.target, self.kl_target = _non_negative("target", target), _positive("kl_target", kl_target)
        self.begin(0)

    def begin(self, rows: int) -> None:
        """Compare with the rollout batches from here on, in which each process has so many sequences."""
        self.first: list[float] = []
        self.last: list[float] = []
        self.rows = rows

    def record(self, distinct_2: float, n: int, rows: int) -> None:
        """Take a rollout batch's distinct-2.

        Args:
            distinct_2: Mean over processes.
            n: Sequences of the batch; of small ones more are taken together.
            rows: Those of a process. Of more rows the share of different pairs is lower by itself: where they change,
                as on another number of processes, the comparison begins anew.
        """
        if rows != self.rows:
            self.begin(rows)
        if len(self.first) < FIRST:
            self.first.append(float(distinct_2))
        self.last = [*self.last, float(distinct_2)][-min(max(FEWEST, math.ceil(TOGETHER / n)), MOST) :]

    def held(self, kl: float) -> float:
        """The KL for the controller, in nats, from that of the batch recorded last."""
        start = sum(self.first) / max(len(self.first), 1)
        if self.target == 0 or len(self.first) < FIRST or not self.last or start <= 0 or kl <= 0:
            return kl
        lost = 1 - sum(self.last) / len(self.last) / start
        return max(kl, min(self.kl_target * lost / (1 - self.target), HIGHER * kl))

    def forget_last(self) -> None:
        """Leave out the last batches, of a policy that was undone."""
        self.last = []

    def state_dict(self) -> dict[str, Any]:
        """What was recorded of the first batches and of the last, and the target, which a run may have given up."""
        return {"target": self.target, "first": self.first, "last": self.last, "rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from what `state_dict` returned."""
        self.target, self.rows = _non_negative("target", state["target"]), int(state["rows"])
        self.first, self.last = list(state["first"]), list(state["last"])


def _non_negative(name: str, value: float) -> float:
    value = float(value)
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be finite and not negative, got {value}")
    return value


def _positive(name: str, value: float) -> float:
    value = float(value)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be finite and positive, got {value}")
    return value


def _check_observation(kl: float, n: int) -> float:
    kl = float(kl)
    if not math.isfinite(kl):
        raise ValueError(f"the observed KL is {kl}: the log-probabilities of this batch are not finite")
    if n < 1:
        raise ValueError(f"the KL must come from at least one sample, got n={n}")
    return kl
