"""How well scores order pairs of answers: functions of columns of numbers, one entry per pair.

A column is a list, a numpy array or a tensor of shape (N,), on any device and in any precision; all is computed in
float64. What is not defined (a correlation with a constant, the accuracy over no pairs) is NaN. A value that is a mean
over pairs has its standard error beside it, as `<name>_standard_error`.

Scores that are equal count as half right. Scores computed in bfloat16 are often equal (`ties`): score in float32.
"""

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]
Results = dict[str, Any]

QUANTILES = (5, 25, 50, 75, 95)


def as_column(name: str, values: Any) -> Array:
    """`values` as a float64 array, (N,).

    Raises:
        ValueError: not one-dimensional, empty, not numbers, or not finite; it names the column and the value.
    """
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = (values.double() if values.is_floating_point() else values).numpy()
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"{name} must have one number per pair, shape (N,), got shape {array.shape}: flatten it")
    if array.size == 0:
        raise ValueError(f"{name} is empty: pass at least one pair")
    if array.dtype.kind not in "iuf":
        wrong = next((value for value in values if isinstance(value, bool | str | None)), values[0])
        raise ValueError(f"{name} must be numbers, got {wrong!r}: convert the column, or drop pairs without a value")
    array = array.astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(array))
    if bad.size:
        raise ValueError(
            f"{name}[{bad[0]}] is {array[bad[0]]}, and {bad.size} of {array.size} values are not finite: find out why "
            "(overflow in float16, an empty answer), or drop these pairs"
        )
    return array


def as_columns(**columns: Any) -> list[Array]:
    """Every column as a float64 array, (N,), all of one length.

    Raises:
        ValueError: see `as_column`; or the lengths differ.
    """
    arrays = {name: as_column(name, values) for name, values in columns.items()}
    if len({array.size for array in arrays.values()}) > 1:
        sizes = ", ".join(f"{name} {array.size}" for name, array in arrays.items())
        raise ValueError(f"these columns must have one entry per pair each: {sizes}; pass the same pairs to all")
    return list(arrays.values())


def preference_accuracy(chosen: Any, rejected: Any, strength: Any = None, bins: int = 10) -> Results:
    """The share of pairs whose chosen answer scores higher, overall and by the strength of the preference.

        o = 1 if chosen > rejected, 1/2 if equal, else 0        accuracy = mean(o)
        standard error = sqrt(mean((o - accuracy)^2) / N), which is sqrt(p (1 - p) / N) where nothing is tied

    Bins of strength hold equal numbers of pairs, but equal strengths are never torn apart: bins that would share a
    value merge, and a strength of at most `bins` distinct values gets one bin per value.

    Args:
        chosen: scores of the chosen answers, (N,).
        rejected: scores of the rejected answers, (N,).
        strength: how much better the chosen answer is, in any unit, (N,).
        bins: the most bins of strength; 10 are deciles.

    Returns:
        `accuracy` (with its standard error, which is 0 where all pairs come out alike, however few they are), `count`
        (N), `ties` (share of pairs with equal scores), and with `strength` also `by_strength`, a list from weak to
        strong of: `strength` (mean), `lower`, `upper` (least and greatest), `accuracy` (with its error), `count`.

    Raises:
        ValueError: a column is not fit (see `as_column`), the lengths differ, or bins < 1.
    """
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    columns = {"chosen": chosen, "rejected": rejected} | ({} if strength is None else {"strength": strength})
    chosen, rejected, *rest = as_columns(**columns)
    outcome = _outcome(chosen - rejected)
    results = _mean("accuracy", outcome) | {"count": outcome.size, "ties": float(np.mean(chosen == rejected))}
    if rest:
        strength = rest[0]
        groups = _equal_count_bins(strength, bins)
        results["by_strength"] = [
            {
                "strength": float(strength[group].mean()),
                "lower": float(strength[group].min()),
                "upper": float(strength[group].max()),
                **_mean("accuracy", outcome[group]),
                "count": int(group.sum()),
            }
            for group in groups
        ]
    return results


def accuracy_by_source(chosen: Any, rejected: Any, sources: Any, names: dict[str, int]) -> Results:
    """`preference_accuracy` of the pairs of each source, as of the sets of a mixture.

    Args:
        chosen: scores of the chosen answers, (N,).
        rejected: scores of the rejected answers, (N,).
        sources: the number of each pair's source, (N,).
        names: name of a source -> its number.

    Returns:
        `by_source`: name -> accuracy, its standard error, count and ties; sources without a pair are left out.

    Raises:
        ValueError: a column is not fit (see `as_column`), or the lengths differ.
    """
    chosen, rejected, sources = as_columns(chosen=chosen, rejected=rejected, sources=sources)
    found = {}
    for name, number in names.items():
        own = sources == number
        if own.any():
            found[name] = preference_accuracy(chosen[own], rejected[own])
    return {"by_source": found}


def preference_calibration(chosen: Any, rejected: Any, bins: int = 10) -> Results:
    """Whether the model is right as often as its probabilities claim.

        p = sigmoid(chosen - rejected)        confidence = max(p, 1 - p), in [0.5, 1]
        expected calibration error = sum_b n_b / N |accuracy_b - confidence_b|
        log loss = -mean(log p)

    over bins (lower, upper] of equal width in confidence; accuracy is that of `preference_accuracy`. Chance alone lifts
    the error of a finite sample above 0: compare models on the same pairs.

    Source: Guo et al. 2017, arXiv 1706.04599, equation 3; the probabilities are Bradley and Terry's.

    Args:
        chosen: scores of the chosen answers, (N,), as logits: on the scale that the loss was computed on.
        rejected: scores of the rejected answers, (N,).
        bins: their number.

    Returns:
        `expected_calibration_error`, `log_loss` (with its standard error; log 2 = 0.693 is a coin), and
        `calibration_bins`, those that are not empty, a list of: `lower`, `upper`, `confidence` (mean), `accuracy` (with
        its standard error), `count`.

    Raises:
        ValueError: a column is not fit (see `as_column`), the lengths differ, or bins < 1.
    """
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    chosen, rejected = as_columns(chosen=chosen, rejected=rejected)
    difference = chosen - rejected
    outcome = _outcome(difference)
    confidence = np.exp(-np.logaddexp(0, -np.abs(difference)))
    edges = np.linspace(0.5, 1, bins + 1)
    which = np.searchsorted(edges[1:-1], confidence, side="left")
    table = [
        {
            "lower": float(edges[b]),
            "upper": float(edges[b + 1]),
            "confidence": float(confidence[which == b].mean()),
            **_mean("accuracy", outcome[which == b]),
            "count": int((which == b).sum()),
        }
        for b in np.unique(which)
    ]
    gaps = [row["count"] * abs(row["accuracy"] - row["confidence"]) for row in table]
    return {
        "expected_calibration_error": sum(gaps) / outcome.size,
        **_mean("log_loss", np.logaddexp(0, -difference)),
        "calibration_bins": table,
    }


def length_bias(chosen: Any, rejected: Any, chosen_lengths: Any, rejected_lengths: Any) -> Results:
    """How far scores follow length.

    A model that reads length instead of quality is right where the chosen answer is the longer one, and wrong where the
    rejected one is.

    Args:
        chosen: scores of the chosen answers, (N,).
        rejected: scores of the rejected answers, (N,).
        chosen_lengths: lengths of the chosen answers, in any unit, (N,).
        rejected_lengths: lengths of the rejected answers, (N,).

    Returns:
        `accuracy_longer_chosen`, `accuracy_longer_rejected`, `accuracy_equal_length`: the accuracy over the pairs whose
        chosen answer is longer, shorter, as long, each with its standard error and `count_...`;
        `longer_is_chosen`: the accuracy of always preferring the longer answer, with its standard error (equal lengths
        count one half);
        `length_spearman`: rank correlation of score and length over all 2N answers;
        `length_within_pair`: rank correlation inside the pairs (Kendall's tau-b), 1 for a model that always prefers the
        longer answer, -1 the shorter. The labels themselves have 2 longer_is_chosen - 1 if no lengths are equal.

    Raises:
        ValueError: a column is not fit (see `as_column`), the lengths differ, or an answer has a negative length.
    """
    chosen, rejected, chosen_lengths, rejected_lengths = as_columns(
        chosen=chosen, rejected=rejected, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths
    )
    for name, lengths in (("chosen_lengths", chosen_lengths), ("rejected_lengths", rejected_lengths)):
        if lengths.min() < 0:
            raise ValueError(f"{name}[{lengths.argmin()}] is {lengths.min()}: pass lengths, which are not negative")
    outcome = _outcome(chosen - rejected)
    longer = np.sign(chosen_lengths - rejected_lengths)
    results: Results = {}
    for name, sign in (("longer_chosen", 1), ("longer_rejected", -1), ("equal_length", 0)):
        results |= _mean(f"accuracy_{name}", outcome[longer == sign])
        results[f"count_{name}"] = int((longer == sign).sum())
    prefers = np.sign(chosen - rejected)
    norm = math.sqrt(np.abs(prefers).sum() * np.abs(longer).sum())
    return results | {
        **_mean("longer_is_chosen", (1 + longer) / 2),
        "length_spearman": spearman(
            np.concatenate([chosen, rejected]), np.concatenate([chosen_lengths, rejected_lengths])
        ),
        "length_within_pair": float((prefers * longer).sum() / norm) if norm else math.nan,
    }


def score_distribution(chosen: Any, rejected: Any) -> Results:
    """Where the scores of the chosen answers, of the rejected ones, and their differences lie.

    Args:
        chosen: scores of the chosen answers, (N,).
        rejected: scores of the rejected answers, (N,).

    Returns:
        For each of `chosen`, `rejected`, `difference`: `..._mean` (with its standard error), `..._std` (divided by
        N - 1), `..._min`, `..._max`, and the quantiles `..._q05`, `_q25`, `_q50`, `_q75`, `_q95`.

    Raises:
        ValueError: a column is not fit (see `as_column`), or the lengths differ.
    """
    chosen, rejected = as_columns(chosen=chosen, rejected=rejected)
    results: Results = {}
    for name, values in (("chosen", chosen), ("rejected", rejected), ("difference", chosen - rejected)):
        results |= _mean(f"{name}_mean", values)
        results[f"{name}_std"] = float(values.std(ddof=1)) if values.size > 1 else math.nan
        results[f"{name}_min"], results[f"{name}_max"] = float(values.min()), float(values.max())
        for q, value in zip(QUANTILES, np.percentile(values, QUANTILES), strict=True):
            results[f"{name}_q{q:02d}"] = float(value)
    return results


def reward_agreement(first: Any, second: Any) -> Results:
    """Whether two reward models prefer the same answers.

        kappa = (agreement - by chance) / (1 - by chance), by chance = sum_s share_1(s) share_2(s), s in {-, 0, +}

    Two good models agree often for being right often; kappa leaves out what each model's own share explains.

    Source: kappa is Cohen 1960, doi 10.1177/001316446002000104.

    Args:
        first: chosen - rejected scores of the one model, (N,).
        second: the same of the other model, for the same pairs in the same order, (N,).

    Returns:
        `agreement` (share of pairs whose differences have the same sign, with its standard error; 0 agrees only with
        0), `kappa`, `pearson` and `spearman` (correlations of the differences), `count` (N).

    Raises:
        ValueError: a column is not fit (see `as_column`), or the lengths differ.
    """
    first, second = as_columns(first=first, second=second)
    signs = np.sign(first), np.sign(second)
    results = _mean("agreement", (signs[0] == signs[1]).astype(np.float64))
    by_chance = sum(np.mean(signs[0] == s) * np.mean(signs[1] == s) for s in (-1, 0, 1))
    kappa = (results["agreement"] - by_chance) / (1 - by_chance) if by_chance < 1 else math.nan
    return results | {
        "kappa": float(kappa),
        "pearson": pearson(first, second),
        "spearman": spearman(first, second),
        "count": first.size,
    }


def pearson(x: Array, y: Array) -> float:
    """The linear correlation of two columns, (N,) each; NaN where one of them is constant."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    x, y = x - x.mean(), y - y.mean()
    return float(np.clip((x @ y) / math.sqrt((x @ x) * (y @ y)), -1, 1))


def spearman(x: Array, y: Array) -> float:
    """The rank correlation of two columns, (N,) each: Pearson's of the ranks, ties at their average rank."""
    return pearson(_ranks(x), _ranks(y))


def _ranks(x: Array) -> Array:
    """Ranks from 1 to N; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _outcome(difference: Array) -> Array:
    """1 where the chosen answer scores higher, 1/2 for a tie, else 0."""
    return (1 + np.sign(difference)) / 2


def _mean(name: str, values: Array) -> Results:
    """The mean and its standard error sqrt(mean((x - mean)^2) / N); NaN over no values."""
    mean, error = (values.mean(), values.std() / math.sqrt(values.size)) if values.size else (math.nan, math.nan)
    return {name: float(mean), f"{name}_standard_error": float(error)}


def _equal_count_bins(values: Array, bins: int) -> list[NDArray[np.bool_]]:
    """At most `bins` groups of nearly equal size, in rising order, that never part equal values; one mask each."""
    distinct = np.unique(values)
    # The last value of each bin but the last, by whole numbers: a quantile rounded in floating point is one pair off.
    last = [-(-b * values.size // bins) - 1 for b in range(1, bins)]
    edges = distinct[:-1] if distinct.size <= bins else np.unique(np.sort(values)[last])
    which = np.searchsorted(edges, values, side="left")
    return [which == b for b in np.unique(which)]
