"""Before and after on the same prompts, with bootstrap intervals.

    change = mean over prompts of (after - before); 95 % interval: the 2.5 and 97.5 percentiles of the change over
    resamples of the prompts, drawn with replacement, each prompt with both its values

Source: Efron 1979, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7. The interval is of the
sampling of prompts (and of one completion each); it knows nothing of other seeds of training.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from trl_ext.report.lines import Line
from trl_ext.report.loading import is_number
from trl_ext.report.samples import pair_shares, text_of

RESAMPLES, SEED = 2000, 0
SHARE = 0.95
FEWEST = 8  # prompts, below which an interval would say more than is known
KL = "KL from the reference, nats"  # a figure's name, by which it is found


@dataclass(frozen=True)
class Change:
    """A figure before and after.

    Attributes:
        name: Of the figure.
        count: Prompts that have it before and after.
        before, after: Means.
        before_interval, after_interval, interval: Of the two means and of the change; None for fewer than `FEWEST`.
        better: Whether more is better, less is, or None: neither.
    """

    name: str
    count: int
    before: float
    after: float
    before_interval: tuple[float, float] | None
    after_interval: tuple[float, float] | None
    interval: tuple[float, float] | None
    better: bool | None = None

    @property
    def change(self) -> float:
        """After less before."""
        return self.after - self.before


def compare(
    name: str,
    before: Sequence[Any],
    after: Sequence[Any],
    better: bool | None = None,
    kind: Literal["mean", "ratio", "perplexity"] = "mean",
) -> Change:
    """Means of paired values, and intervals by resampling the pairs.

    Args:
        name: Of the figure.
        before, after: N values each, of the same prompts in the same order.
        better: See `Change`.
        kind: "mean" of the values; or they are (N, 2), numerator and denominator: "ratio" is sum / sum, "perplexity"
            exp(sum / sum).

    Raises:
        ValueError: Not as many after as before, or none.
    """
    x, y = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    if len(x) != len(y) or not len(x):
        raise ValueError(f"{name}: {len(x)} values before and {len(y)} after cannot be compared in pairs.")

    def mean(values: np.ndarray) -> np.ndarray:
        """(..., N), or (..., N, 2) -> (...)."""
        if kind == "mean":
            return values.mean(-1)
        ratio = values[..., 0].sum(-1) / np.maximum(values[..., 1].sum(-1), 1)
        return np.exp(ratio) if kind == "perplexity" else ratio

    found: list[tuple[float, float] | None] = [None, None, None]
    if len(x) >= FEWEST:
        drawn = np.random.default_rng(SEED).integers(0, len(x), (RESAMPLES, len(x)))
        a, b = mean(x[drawn]), mean(y[drawn])
        found = [_interval(each) for each in (a, b, b - a)]
    return Change(name, len(x), float(mean(x)), float(mean(y)), found[0], found[1], found[2], better)


def _interval(values: np.ndarray) -> tuple[float, float]:
    edge = 100 * (1 - SHARE) / 2
    low, high = np.percentile(values, [edge, 100 - edge])
    return float(low), float(high)


def changes(before: Mapping[str, Line], after: Mapping[str, Line]) -> list[Change]:
    """What has changed between two evaluations of the same prompts: every figure that both have.

    Args:
        before, after: key -> sample.
    """
    keys = [key for key in before if key in after]

    def column(name: str, value: Callable[[Line], Any], better: bool | None) -> list[Change]:
        rows = [(value(before[key]), value(after[key])) for key in keys]
        rows = [(x, y) for x, y in rows if is_number(x) and is_number(y)]
        return [compare(name, [x for x, _ in rows], [y for _, y in rows], better)] if rows else []

    found = column("reward", lambda row: row.get("reward"), True)
    names = list(dict.fromkeys(name for key in keys for name in (before[key].get("rewards") or {})))
    if len(names) > 1:
        for name in (name for name in names if name != "reward"):
            found += column(name, lambda row, name=name: (row.get("rewards") or {}).get(name), True)  # type: ignore[misc]
    found += column(KL, lambda row: row.get("kl"), None)
    found += column("length, tokens", lambda row: row.get("tokens"), None)
    found += column("share cut by the length limit", lambda row: _share(row.get("truncated")), False)
    texts = [[text_of(rows[key].get("completion")) for key in keys] for rows in (before, after)]
    if keys:  # how often a pair of words stands in all texts is not drawn anew
        found.append(compare("distinct-2", pair_shares(texts[0]), pair_shares(texts[1]), True, kind="ratio"))
    for name, key in (("perplexity under the reference", "reference_nll"), ("perplexity under the policy", "nll")):
        rows = [(before[k], after[k]) for k in keys]
        pairs = [tuple((row.get(key), row.get("tokens")) for row in both) for both in rows]
        pairs = [both for both in pairs if all(is_number(value) for row in both for value in row)]
        if pairs:
            found.append(compare(name, [x for x, _ in pairs], [y for _, y in pairs], kind="perplexity"))
    return found


def _share(value: Any) -> float | None:
    return float(value) if isinstance(value, bool) else None
