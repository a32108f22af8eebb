"""The evaluation of a reward model on preference pairs: `evaluate.Metric`s, all of them at once, and as a table.

The metrics need no download and keep what they are given in memory: no cache files, no locks, any number at once. The
functions behind them are in `pair_statistics`.
"""

import math
import os
from collections.abc import Callable
from typing import Any, ClassVar

import evaluate
from datasets import Features, Value

from trl_ext.reward.pair_statistics import (
    Results,
    as_columns,
    length_bias,
    preference_accuracy,
    preference_calibration,
    reward_agreement,
    score_distribution,
)

# Key of the results -> what the table calls it.
LABELS = {
    "accuracy": "accuracy",
    "ties": "ties, share of pairs",
    "expected_calibration_error": "expected calibration error",
    "log_loss": "log loss (coin: 0.693)",
    "longer_is_chosen": "accuracy of preferring the longer answer",
    "accuracy_longer_chosen": "accuracy where the chosen answer is longer",
    "accuracy_longer_rejected": "accuracy where the rejected answer is longer",
    "accuracy_equal_length": "accuracy where both are as long",
    "length_spearman": "rank correlation of reward and length",
    "length_within_pair": "rank correlation of reward and length within pairs",
    "chosen_mean": "reward of chosen, mean",
    "chosen_std": "reward of chosen, standard deviation",
    "rejected_mean": "reward of rejected, mean",
    "rejected_std": "reward of rejected, standard deviation",
    "difference_mean": "chosen - rejected, mean",
    "difference_std": "chosen - rejected, standard deviation",
    "agreement": "agreement of the two models",
    "kappa": "agreement beyond chance (Cohen's kappa)",
    "pearson": "linear correlation of the differences",
    "spearman": "rank correlation of the differences",
}


def evaluate_pairs(
    chosen: Any, rejected: Any, chosen_lengths: Any = None, rejected_lengths: Any = None, strength: Any = None
) -> Results:
    """Everything that can be said of one reward model from its scores of N preference pairs.

    Args:
        chosen: scores of the chosen answers, (N,).
        rejected: scores of the rejected answers, (N,).
        chosen_lengths: lengths of the chosen answers, (N,); with them and `rejected_lengths` the length bias is added.
        rejected_lengths: lengths of the rejected answers, (N,).
        strength: how much better the chosen answer is, (N,); with it the accuracy by strength decile is added.

    Returns:
        The results of `preference_accuracy`, `preference_calibration`, `score_distribution` and `length_bias` in one
        dict: numbers, but for the two lists of bins `by_strength` and `calibration_bins`.

    Raises:
        ValueError: a column is not fit (see `as_column`), the lengths differ, or only one of the columns of lengths is
            given.
    """
    if (chosen_lengths is None) != (rejected_lengths is None):
        missing = "chosen_lengths" if chosen_lengths is None else "rejected_lengths"
        raise ValueError(f"{missing} is None: pass the lengths of both answers, or of neither")
    results = preference_accuracy(chosen, rejected, strength)
    results |= preference_calibration(chosen, rejected)
    if chosen_lengths is not None:
        results |= length_bias(chosen, rejected, chosen_lengths, rejected_lengths)
    return results | score_distribution(chosen, rejected)


def result_rows(results: Results) -> list[tuple[str, str]]:
    """Results of this file as rows of a table: (what it is, "value ± standard error").

    What is not in `results`, or NaN, has no row. Of the bins, those by strength have rows.
    """
    rows = [("pairs", str(results["count"]))] if "count" in results else []
    for key, label in LABELS.items():
        if key in results and not math.isnan(results[key]):
            pairs = results.get(key.replace("accuracy", "count"), 0) if key.startswith("accuracy_") else 0
            rows.append((f"{label} ({pairs} pairs)" if pairs else label, _value(results, key)))
    bins = results.get("by_strength", [])
    for i, row in enumerate(bins, 1):
        label = f"accuracy at strength {row['strength']:.3g} (bin {i} of {len(bins)}, {row['count']} pairs)"
        rows.append((label, _value(row, "accuracy")))
    for name, own in results.get("by_source", {}).items():
        rows.append((f"accuracy on {name} ({own['count']} pairs)", _value(own, "accuracy")))
    return rows


def _value(results: Results, key: str) -> str:
    error = results.get(f"{key}_standard_error", math.nan)
    return f"{results[key]:.3f}" if math.isnan(error) else f"{results[key]:.3f} ± {error:.3f}"


class _PairMetric(evaluate.Metric):
    """An `evaluate.Metric` around one function of columns of numbers.

    `compute(chosen=..., rejected=...)` in one go, or `add_batch(...)` as often as needed and `compute()`. For several
    processes that write to one file system pass `keep_in_memory=False`, and evaluate's own `num_process`, `process_id`.
    """

    FUNCTION: ClassVar[Callable[..., Results]]
    INPUTS: ClassVar[tuple[str, ...]] = ("chosen", "rejected")
    CITATION: ClassVar[str] = ""

    def __init__(self, config_name: str | None = None, keep_in_memory: bool = True, **kwargs: Any):
        super().__init__(config_name, keep_in_memory=keep_in_memory, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation=self.CITATION,
            inputs_description=type(self).FUNCTION.__doc__ or "",
            features=Features({name: Value("float64") for name in self.INPUTS}),
        )

    def _build_data_dir(self) -> str:
        """evaluate makes this folder in the user's cache, though in memory nothing is ever written to it."""
        if self.keep_in_memory:
            return os.path.join(self._data_dir_root, self.name, self.config_name)
        return super()._build_data_dir()

    def add_batch(self, **columns: Any) -> None:
        """Add some pairs.

        Raises:
            ValueError: a column is missing, unknown or not fit (see `as_column`), or the lengths differ.
        """
        self._check_names(columns)
        super().add_batch(**dict(zip(columns, as_columns(**columns), strict=True)))

    def compute(self, **columns: Any) -> Results | None:
        """The results over all pairs added, these included; None on all processes but the first.

        Raises:
            ValueError: no pairs were added; a column is missing or not fit (see `as_column`), or the lengths differ.
        """
        inputs = {name: columns[name] for name in self.INPUTS if columns.get(name) is not None}
        if inputs:
            self._check_names(inputs)
        elif self.writer is None:
            raise ValueError(f"{self.name} has no pairs: pass {', '.join(self.INPUTS)} here, or to add_batch before")
        return super().compute(**columns)

    def _check_names(self, columns: dict[str, Any]) -> None:
        if set(columns) != set(self.INPUTS):
            raise ValueError(f"{self.name} takes the columns {', '.join(self.INPUTS)}, got {', '.join(columns)}")

    def _compute(self, **columns: Any) -> Results:
        return type(self).FUNCTION(**columns)


class PreferenceAccuracy(_PairMetric):
    """The share of pairs whose chosen answer scores higher; by strength with `compute(..., strength=...)`."""

    FUNCTION = staticmethod(preference_accuracy)


class PreferenceCalibration(_PairMetric):
    """Expected calibration error and log loss of sigmoid(chosen - rejected)."""

    FUNCTION = staticmethod(preference_calibration)
    CITATION = "Guo et al. 2017, On Calibration of Modern Neural Networks, arXiv 1706.04599"


class LengthBias(_PairMetric):
    """Accuracy where the longer answer is the rejected one, and rank correlations of score and length."""

    FUNCTION = staticmethod(length_bias)
    INPUTS = ("chosen", "rejected", "chosen_lengths", "rejected_lengths")


class ScoreDistribution(_PairMetric):
    """Mean, spread and quantiles of the scores of chosen and rejected answers, and of their difference."""

    FUNCTION = staticmethod(score_distribution)


class RewardAgreement(_PairMetric):
    """Agreement of two reward models on the same pairs, from their differences chosen - rejected."""

    FUNCTION = staticmethod(reward_agreement)
    INPUTS = ("first", "second")
    CITATION = "Cohen 1960, A Coefficient of Agreement for Nominal Scales, doi 10.1177/001316446002000104"
