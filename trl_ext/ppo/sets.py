"""Several evaluation sets, each with names of its own in the log."""

import math
from collections.abc import Sequence
from typing import Any

from transformers import Trainer


class SeveralSets(Trainer):
    """What `RLOOTrainer` lacks to be evaluated on several sets: it logs them all under one name.

    And on a set whose last batch is smaller than the others: it counts as much as a whole one there.
    """

    model: Any
    _metrics: Any
    _evaluated_set = ""  # name of the one that is being evaluated
    _evaluated_rows: tuple[int, ...] = ()  # of each batch since the last log

    def record(self, values: dict[str, float], rows: int = 0) -> None:
        """Add values to the means that the next log prints; those of `rows` rows begin a batch of an evaluation."""
        mode = "train" if self.model.training else "eval"
        if rows and mode == "eval":
            self._evaluated_rows += (rows,)
        for name, value in values.items():
            self._metrics[mode][name].append(float(value))

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As `Trainer.evaluate`; of several sets each has names of its own, `eval_<set>_reward` and so on."""
        before, self._evaluated_set = self._evaluated_set, metric_key_prefix.removeprefix("eval").removeprefix("_")
        try:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self._evaluated_set = before

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `RLOOTrainer.log`, which knows no sets; means of an evaluation are over its rows."""
        metrics, rows = self._metrics["eval"], self._evaluated_rows
        if not self.model.training:
            self._evaluated_rows = ()
            for name, values in metrics.items():
                if len(values) == len(rows):
                    metrics[name] = [mean_over_rows(values, rows)]
        if self._evaluated_set and not self.model.training:
            renamed = {f"{self._evaluated_set}_{name}": values for name, values in metrics.items()}
            metrics.clear()
            metrics.update(renamed)
        super().log(logs, start_time)


def mean_over_rows(values: Sequence[float], rows: Sequence[int]) -> float:
    """Mean of batches' values, each as often as it has rows; of NaN, a value that does not apply, none."""
    known = [(value, count) for value, count in zip(values, rows, strict=True) if not math.isnan(value)]
    return sum(value * count for value, count in known) / sum(count for _, count in known) if known else math.nan
