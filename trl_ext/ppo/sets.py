"""Several evaluation sets, each with names of its own in the log."""

from typing import Any

from transformers import Trainer


class SeveralSets(Trainer):
    """What `RLOOTrainer` lacks to be evaluated on several sets; it logs them all under one name."""

    model: Any
    _metrics: Any
    _evaluated_set = ""  # name of the one that is being evaluated

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
        """As `RLOOTrainer.log`, which knows no sets."""
        if self._evaluated_set and not self.model.training:
            metrics = self._metrics["eval"]
            renamed = {f"{self._evaluated_set}_{name}": values for name, values in metrics.items()}
            metrics.clear()
            metrics.update(renamed)
        super().log(logs, start_time)
