"""What a judge found: wins, win rate, length-controlled win rate, with intervals; agreement with people's labels."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trl_ext.feedback.exchange import count_votes
from trl_ext.feedback.judge import Judged
from trl_ext.feedback.labels import Label

Array = NDArray[np.float64]
RIDGE = 1.0  # weight of the prior on the length's coefficient
STEPS = 100
VALUES = {"a": 1.0, "tie": 0.5, "b": 0.0}


@dataclass(frozen=True)
class WinRate:
    """How often A wins against B.

    Attributes:
        judged: Pairs with a verdict.
        wins, ties, losses: Of A.
        inconsistent: Ties that are ties because the verdict changed with the order.
        failed: Pairs without a verdict, which count for nothing else.
        rate: Mean of 1 for a win, 1/2 for a tie, 0 for a loss; NaN where nothing was judged.
        interval: Of the rate, 95 %.
        controlled: Length-controlled rate.
        controlled_interval: 95 %.
        length_effect: What one standard deviation of the difference of lengths does at most, in log-odds.
        lengths: Mean characters of A's and of B's answers.
    """

    judged: int
    wins: int
    ties: int
    losses: int
    inconsistent: int
    failed: int
    rate: float
    interval: tuple[float, float]
    controlled: float
    controlled_interval: tuple[float, float]
    length_effect: float
    lengths: tuple[float, float]

    def rows(self) -> list[tuple[str, str]]:
        """(label, value) for a table."""

        def within(value: float, interval: tuple[float, float]) -> str:
            return f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"

        return [
            ("pairs judged", f"{self.judged:,}"),
            ("A wins, ties, loses", f"{self.wins:,}, {self.ties:,}, {self.losses:,}"),
            ("inconsistent, counted as ties", f"{self.inconsistent:,}"),
            ("failed, not counted", f"{self.failed:,}"),
            ("win rate of A", within(self.rate, self.interval)),
            ("length-controlled win rate", within(self.controlled, self.controlled_interval)),
            ("effect of length, log-odds", f"{self.length_effect:.2f}"),
            ("mean length of A and B, characters", f"{self.lengths[0]:.0f}, {self.lengths[1]:.0f}"),
        ]


def length_controlled(outcomes: Array, differences: Array) -> tuple[float, float]:
    """Win rate of A if its answers were as long as those of B, and the effect of length.

        P(A wins | x) = sigmoid(theta + phi tanh(d_x / std(d)))        rate = sigmoid(theta)

    theta and phi maximise sum_x [y log P + (1 - y) log(1 - P)] - 1/2 phi^2, by Newton's method. Where all outcomes are
    the same, or all differences, length cannot be told from quality: the rate is the plain one, and phi is 0.

    Source: Dubois et al. 2024, "Length-Controlled AlpacaEval" (arXiv 2404.04475), equation 2, as used by AlpacaEval 2.
    Different here: no term for the difficulty of an instruction, which is estimated from many models, and a fixed ridge
    on phi in place of its cross-validated one.

    Args:
        outcomes: y, (N,): 1, 1/2 or 0.
        differences: d, (N,): length of A's answer minus that of B's.

    Returns:
        The rate and phi.

    Raises:
        ValueError: No outcomes, or not as many differences.
    """
    if outcomes.ndim != 1 or outcomes.shape != differences.shape or not len(outcomes):
        raise ValueError(f"outcomes and differences must be (N,) each, got {outcomes.shape} and {differences.shape}.")
    mean, spread = float(outcomes.mean()), float(differences.std())
    if mean in (0.0, 1.0) or spread == 0:
        return mean, 0.0
    features = np.stack([np.ones(len(outcomes)), np.tanh(differences / spread)], axis=1)
    prior = np.array([0.0, RIDGE])

    def objective(weights: Array) -> float:
        logits = features @ weights
        return float(outcomes @ logits - np.logaddexp(0, logits).sum() - 0.5 * prior @ weights**2)

    weights = np.array([math.log(mean / (1 - mean)), 0.0])
    for _ in range(STEPS):
        p = 1 / (1 + np.exp(-(features @ weights)))
        gradient = features.T @ (outcomes - p) - prior * weights
        hessian = (features * (p * (1 - p))[:, None]).T @ features + np.diag(prior)
        step = np.linalg.solve(hessian, gradient)
        size = 1.0
        while objective(weights + size * step) < objective(weights) and size > 1e-6:
            size /= 2
        weights = weights + size * step
        if np.abs(gradient).max() < 1e-9:
            break
    return 1 / (1 + math.exp(-weights[0])), float(weights[1])


def win_rate(judged: Sequence[Judged], resamples: int = 1000, seed: int = 0) -> WinRate:
    """Wins of A and its win rates, with percentile bootstrap intervals over pairs.

    Args:
        judged: Of `judge_pairs`.
        resamples: For the intervals.
        seed: Of the resamples.
    """
    counted = [record for record in judged if record.verdict in VALUES]
    verdicts = [record.verdict for record in counted]
    outcomes = np.array([VALUES[verdict] for verdict in verdicts])
    long_a, long_b = (np.array([float(len(getattr(r.pair, side))) for r in counted]) for side in ("a", "b"))
    nothing = (math.nan, math.nan)
    rate, controlled, effect, interval, controlled_interval = math.nan, math.nan, math.nan, nothing, nothing
    if counted:
        difference = long_a - long_b
        rate = float(outcomes.mean())
        controlled, effect = length_controlled(outcomes, difference)
        rng = np.random.default_rng(seed)
        draws = [rng.integers(0, len(counted), len(counted)) for _ in range(resamples)]
        interval = _interval([float(outcomes[draw].mean()) for draw in draws])
        controlled_interval = _interval([length_controlled(outcomes[draw], difference[draw])[0] for draw in draws])
    return WinRate(
        len(counted),
        verdicts.count("a"),
        verdicts.count("tie"),
        verdicts.count("b"),
        sum(not record.consistent for record in counted),
        len(judged) - len(counted),
        rate,
        interval,
        controlled,
        controlled_interval,
        effect,
        (float(long_a.mean()), float(long_b.mean())) if counted else nothing,
    )


def _interval(draws: Sequence[float]) -> tuple[float, float]:
    if not draws:
        return math.nan, math.nan
    low, high = np.quantile(np.array(draws), [0.025, 0.975])
    return float(low), float(high)


def agreement_with_people(judged: Iterable[Judged], labels: Iterable[Label]) -> dict[str, Any]:
    """How often the judge says what most people say.

    Returns:
        "pairs": with a verdict of the judge and labels of people; "same": share with the same of a, tie, b;
        "decided": pairs in which both prefer an answer; "same_where_decided": share of these with the same one.
    """
    votes = count_votes(labels)
    both = []
    for record in judged:
        vote = votes.get(record.pair.id)
        if vote is not None and record.verdict in VALUES:
            people = "tie" if vote.soft_label == 0.5 else "a" if vote.soft_label > 0.5 else "b"
            both.append((record.verdict, people))
    decided = [(judge, people) for judge, people in both if "tie" not in (judge, people)]

    def share(couples: list[tuple[str, str]]) -> float:
        return sum(judge == people for judge, people in couples) / len(couples) if couples else math.nan

    return {
        "pairs": len(both),
        "same": share(both),
        "decided": len(decided),
        "same_where_decided": share(decided),
    }
