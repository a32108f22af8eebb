"""How well annotators agree: share, Cohen's kappa, Krippendorff's alpha; by annotator and by topic; who is off.

Alpha comes from the package `krippendorff`. Intervals are percentile bootstraps over
pairs (Efron and Tibshirani 1993, chapter 13).
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trl_ext.feedback.labels import Label
from trl_ext.feedback.pairs import Pair

Table = NDArray[np.float64]  # (annotators, pairs): values -2 to 2, NaN where there is no label
SURE = 0.995  # share of the resamples that must say so before someone is said to be off
NEED_EXTRA = "agreement needs the package krippendorff: pip install 'trl_ext[label]'."


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval.

    Attributes:
        value: NaN where it is not defined, as for annotators who share no pair, or always say the same.
        low, high: The interval; NaN where too few resamples define it.
        count: Pairs that it rests on.
    """

    value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        if math.isnan(self.value):
            return f"- ({self.count})"
        if math.isnan(self.low):
            return f"{self.value:.2f} ({self.count})"
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}] ({self.count})"


@dataclass
class AgreementReport:
    """All of `agreement_report`.

    Attributes:
        pairs: With at least one label.
        shared: With labels of at least two annotators.
        share: Share of agreement over all couples of labels of one pair.
        alpha: Krippendorff's, of the direction (first, tie, second; nominal).
        alpha_strength: Krippendorff's, of the five steps from much better to much better (ordinal).
        kappa: (one, other) -> Cohen's, of the direction.
        annotators: Name -> "labels", "agreement" with the others, "ties" (share), "left" (share of decided labels for
            the answer on the left).
        topics: Topic -> "share" and "alpha".
        off: What is off: a sentence for each.
    """

    pairs: int
    shared: int
    share: Estimate
    alpha: Estimate
    alpha_strength: Estimate
    kappa: dict[tuple[str, str], Estimate] = field(default_factory=dict)
    annotators: dict[str, dict[str, Any]] = field(default_factory=dict)
    topics: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    off: list[str] = field(default_factory=list)


def label_table(labels: Iterable[Label]) -> tuple[list[str], list[str], Table]:
    """Names of A annotators, ids of N pairs, and the values of their labels, (A, N), NaN where there is none."""
    listed = list(labels)
    names = sorted({label.annotator for label in listed})
    pairs = list(dict.fromkeys(label.pair for label in listed))
    table = np.full((len(names), len(pairs)), np.nan)
    rows, columns = ({x: i for i, x in enumerate(each)} for each in (names, pairs))
    for label in listed:
        table[rows[label.annotator], columns[label.pair]] = label.value
    return names, pairs, table


def share_of_agreement(table: Table) -> float:
    """Share of equal directions among all couples of labels that two annotators gave one pair; NaN without any.

    Args:
        table: (A, N), see `label_table`.
    """
    signs = np.sign(table)
    equal = couples = 0
    for value in (-1.0, 0.0, 1.0):
        n = (signs == value).sum(0)
        equal += int((n * (n - 1)).sum())
    given = (~np.isnan(table)).sum(0)
    couples = int((given * (given - 1)).sum())
    return equal / couples if couples else math.nan


def cohen_kappa(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Cohen's kappa of two annotators' directions over the pairs that both labelled; NaN where it is not defined.

        kappa = (p_o - p_e) / (1 - p_e)

    p_o is the share of equal directions, p_e what it would be if both drew theirs by chance, each as often as they do.

    Source: Cohen 1960, "A coefficient of agreement for nominal scales".

    Args:
        one, other: (N,) each, NaN where there is no label.
    """
    both = ~(np.isnan(one) | np.isnan(other))
    if not both.any():
        return math.nan
    steps = np.array([[-1.0], [0.0], [1.0]])
    first, second = (np.sign(x[both]) == steps for x in (one, other))  # (3, N): which direction
    observed = float((first & second).sum() / both.sum())
    expected = float(first.mean(1) @ second.mean(1))
    return (observed - expected) / (1 - expected) if expected < 1 else math.nan


def krippendorff_alpha(table: Table, strengths: bool = False) -> float:
    """Krippendorff's alpha of the directions (nominal), or of the five strengths (ordinal); NaN where not defined.

    Source: Krippendorff 2011, "Computing Krippendorff's alpha-reliability"; computed by the package `krippendorff`.

    Args:
        table: (A, N), see `label_table`.
        strengths: Whether much better counts for more than better.

    Raises:
        ImportError: `krippendorff` is missing.
    """
    try:
        import krippendorff
    except ImportError as error:
        raise ImportError(NEED_EXTRA) from error
    shared = table[:, (~np.isnan(table)).sum(0) >= 2]
    values = shared if strengths else np.sign(shared)
    if len(np.unique(values[~np.isnan(values)])) < 2:
        return math.nan
    level: Any = "ordinal" if strengths else "nominal"
    return float(krippendorff.alpha(reliability_data=values, level_of_measurement=level))


def bootstrap(
    statistic: Callable[[Table], float], table: Table, count: int, resamples: int, rng: np.random.Generator
) -> Estimate:
    """A statistic with its 95 % interval, pairs resampled; resamples that do not define it are left out.

    Args:
        statistic: Of a table (A, N).
        table: (A, N).
        count: Pairs that it rests on, for the report.
        resamples: How many. 0: no interval.
        rng: Where resamples come from.
    """
    value = statistic(table)
    draws = []
    if not math.isnan(value) and count > 1:
        draws = [statistic(_resampled(table, rng)) for _ in range(resamples)]
    defined = [draw for draw in draws if not math.isnan(draw)]
    if len(defined) < max(1, resamples // 2):
        return Estimate(value, math.nan, math.nan, count)
    low, high = (float(np.quantile(defined, q)) for q in (0.025, 0.975))
    return Estimate(value, low, high, count)


def _resampled(table: Table, rng: np.random.Generator) -> Table:
    return table[:, rng.integers(0, table.shape[1], table.shape[1])] if table.shape[1] else table


def _surely_below_zero(draw: Callable[[], float], resamples: int) -> bool:
    """Whether nearly all draws lie below 0, and at least half of them are defined."""
    defined = [value for value in (draw() for _ in range(resamples)) if not math.isnan(value)]
    return bool(defined) and 2 * len(defined) >= resamples and float(np.quantile(defined, SURE)) < 0


def with_the_others(table: Table, row: int) -> float:
    """Share of equal directions among the couples of one annotator's label with another's of the same pair."""
    signs = np.sign(table)
    others = np.delete(signs, row, axis=0)
    couples = int((~np.isnan(others) & ~np.isnan(signs[row])).sum())
    return float((others == signs[row]).sum()) / couples if couples else math.nan


def agreement_report(
    labels: Iterable[Label],
    pairs: Sequence[Pair] = (),
    topic: str | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> AgreementReport:
    """How well annotators agree.

    An annotator is off if they agree with the others less than the others among themselves, in 99.5 % of the resamples
    of the pairs; that takes three annotators. A topic is off if annotators agree on it less than on all other topics,
    in 99.5 % of the resamples.

    Args:
        labels: That hold.
        pairs: What was labelled, for topics.
        topic: Column of the pairs with a topic.
        resamples: For intervals.
        seed: Of the resamples.

    Raises:
        ValueError: A topic column that no pair has.
        ImportError: `krippendorff` is missing.
    """
    listed = list(labels)
    names, ids, table = label_table(listed)
    rng = np.random.default_rng(seed)
    shared = (~np.isnan(table)).sum(0) >= 2
    within = table[:, shared]  # what pairs with one label do not change
    count = int(shared.sum())
    report = AgreementReport(
        len(ids),
        count,
        bootstrap(share_of_agreement, within, count, resamples, rng),
        bootstrap(krippendorff_alpha, within, count, resamples, rng),
        bootstrap(lambda t: krippendorff_alpha(t, strengths=True), within, count, resamples, rng),
    )
    for i, j in combinations(range(len(names)), 2):
        both = table[[i, j]][:, ~np.isnan(table[[i, j]]).any(0)]
        estimate = bootstrap(lambda t: cohen_kappa(t[0], t[1]), both, both.shape[1], resamples, rng)
        report.kappa[names[i], names[j]] = estimate
    for i, name in enumerate(names):
        mine = within[:, ~np.isnan(within[i])]
        agreement = bootstrap(partial(with_the_others, row=i), mine, mine.shape[1], resamples, rng)
        report.annotators[name] = _habits(listed, name) | {"agreement": agreement}
        rest = share_of_agreement(np.delete(within, i, axis=0))

        def lead(i: int = i) -> float:
            drawn = _resampled(within, rng)
            return with_the_others(drawn, i) - share_of_agreement(np.delete(drawn, i, axis=0))

        if _surely_below_zero(lead, resamples):
            report.off.append(
                f"annotator {name} agrees with the others on {agreement.value:.0%} of their common labels, the others "
                f"among themselves on {rest:.0%}"
            )
    if topic is not None:
        _add_topics(report, ids, table, _topics(pairs, topic), resamples, rng)
    return report


def _habits(labels: Sequence[Label], name: str) -> dict[str, Any]:
    own = [label for label in labels if label.annotator == name]
    sided = [label for label in own if label.value and label.left is not None]
    left = sum((label.value > 0) == (label.left == "a") for label in sided)
    return {
        "labels": len(own),
        "ties": sum(label.value == 0 for label in own) / len(own),
        "left": left / len(sided) if sided else math.nan,
    }


def _topics(pairs: Sequence[Pair], column: str) -> Mapping[str, str]:
    found = {pair.id: str(pair.columns[column]) for pair in pairs if pair.columns.get(column) is not None}
    if not found:
        there = sorted({name for pair in pairs for name in pair.columns})
        raise ValueError(f"topic={column!r}: no pair has this column; there are {', '.join(there) or 'none'}.")
    return found


def _add_topics(
    report: AgreementReport,
    ids: Sequence[str],
    table: Table,
    topics: Mapping[str, str],
    resamples: int,
    rng: np.random.Generator,
) -> None:
    of_pair = np.array([topics.get(pair, "") for pair in ids], dtype=object)
    for name in sorted(set(topics.values())):
        part = table[:, (of_pair == name)]
        part = part[:, (~np.isnan(part)).sum(0) >= 2]
        share = bootstrap(share_of_agreement, part, part.shape[1], resamples, rng)
        alpha = bootstrap(krippendorff_alpha, part, part.shape[1], resamples, rng)
        report.topics[name] = {"share": share, "alpha": alpha}
        others = table[:, of_pair != name]
        rest = share_of_agreement(others)

        def lead(part: Table = part, others: Table = others) -> float:
            return share_of_agreement(_resampled(part, rng)) - share_of_agreement(_resampled(others, rng))

        if _surely_below_zero(lead, resamples):
            report.off.append(
                f"topic {name}: annotators agree on {share.value:.0%} of their common labels, on all other topics on "
                f"{rest:.0%}"
            )
