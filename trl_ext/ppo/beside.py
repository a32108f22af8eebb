"""What a trainer of PPO does beside its loop: completions that no log knows of, and words for want of memory."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from transformers import Trainer

from trl_ext.generation.from_trl import Completions
from trl_ext.ppo import logging
from trl_ext.report.recorder import RunRecorder


class BesideTheLoop(Trainer):
    """A part of `PPOMaxTrainer`."""

    args: Any
    model: Any
    timer: logging.PhaseTimer
    recorder: RunRecorder
    log_completions: bool
    _logs: dict[str, Any]
    _metrics: Any
    _complete: Any
    _generate_and_score_completions: Any

    def complete(self, prompts: list[Any]) -> Completions:
        """Complete prompts by the role that is active, as a rollout would, and leave logs and model as they were.

        Returns:
            Prompts and completions in token ids, unpadded, and completions as texts or messages.
        """
        with self._aside():
            return self._complete(list(prompts))

    def complete_and_keep(self, rows: list[dict[str, Any]]) -> None:
        """Complete and score rows of a dataset for `samples.jsonl`, between two steps; logs know nothing of them.

        Args:
            rows: With `prompt`; as many on every process.
        """
        with self._aside():
            self._generate_and_score_completions(rows)
        self.recorder.end_evaluation(self.state.global_step, part=True)

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """The model in evaluation mode, and no word in any log of what happens inside the block."""
        training, logged = self.model.training, self.log_completions
        kept = [(table, {name: list(cells) for name, cells in table.items()}) for table in self._tables()]
        self.model.eval()
        self.log_completions = False
        try:
            yield
        finally:
            self.model.train(training)
            self.log_completions = logged
            for table, before in kept:
                for name in list(table):
                    table[name].clear()
                    table[name].extend(before.get(name, []))
                    if name not in before:
                        del table[name]

    def _tables(self) -> tuple[Any, Any]:
        """Metrics of evaluations, and what reward functions add to the table of completions: name -> values."""
        return self._metrics["eval"], self._logs["extra"]

    def explained_out_of_memory(self, plan: Any = None) -> AbstractContextManager[None]:
        """`with trainer.explained_out_of_memory(): trainer.train()`: the error says which option to lower.

        Args:
            plan: `memory.MemoryPlan` of the run, for its figure beside.

        Raises:
            RuntimeError: In place of `torch.OutOfMemoryError`.
        """

        def where() -> tuple[str, int]:
            return self.timer.running if self.model.training else "evaluation", self.state.global_step

        return logging.explained_out_of_memory(self.args, where, plan)
