"""The next rollout batch, sampled by a server while the present one is trained on: when, and of which prompts."""

from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback

from trl_ext.generation.vllm import VLLMGeneration
from trl_ext.text import TextEncoder

FILE = "rollout_ahead.safetensors"


class Coming:
    """The batches of an epoch, of which those to come can be looked at."""

    def __init__(self) -> None:
        self._source: Any = None
        self._seen: deque[Any] = deque()

    def of(self, source: Iterator[Any]) -> "Coming":
        """Itself, over an epoch's iterator: the one that it has, or a new one."""
        if source is not self._source:
            self._source, self._seen = source, deque()
        return self

    def __iter__(self) -> "Coming":
        return self

    def __next__(self) -> Any:
        return self._seen.popleft() if self._seen else next(self._source)

    def look(self, place: int) -> Any:
        """The batch that comes after `place` others; None where the epoch has no more."""
        while len(self._seen) <= place:
            try:
                self._seen.append(next(self._source))
            except StopIteration:
                return None
        return self._seen[place]


class RolloutAhead(TrainerCallback):
    """Begins the next rollout once the policy's present version is at the server, and keeps it through checkpoints.

    The rollout of step k is sampled by the policy of the rollout before. One has no such policy, or none that is
    meant, and is sampled when it begins: the first of a run, of an `IterableDataset` the first of each epoch, and the
    first after the guard has gone back to an earlier policy.

    Args:
        generation: Samples.
        encoder: Of the model's tokenizer.
        args: `PPOMaxConfig`.
        checkpoint: Gives the folder that training goes on from.
    """

    def __init__(
        self, generation: VLLMGeneration, encoder: TextEncoder, args: Any, checkpoint: Callable[[], str | None]
    ):
        self.generation, self.encoder, self.args, self.checkpoint = generation, encoder, args, checkpoint
        self.coming = Coming()
        self._loader: Any = None

    def begin(self, micro_batch: int, state: Any) -> None:
        """Begin the rollout after the one whose first micro-batch has this number in the run.

        Args:
            micro_batch: Of the present rollout; counted from the run's start.
            state: `TrainerState`. No rollout is begun that `max_steps` leaves out.
        """
        per_step = self.args.gradient_accumulation_steps
        per_rollout = self.args.steps_per_update * per_step
        left = per_rollout - micro_batch % per_rollout
        if state.global_step + left // per_step >= state.max_steps:
            return
        rows = self.coming.look(left - per_step)  # those of the present step are taken already
        prompts = self._first_of_next_epoch(state.epoch) if rows is None else [row["prompt"] for row in rows]
        if prompts is not None:
            self.generation.begin([self.encoder.prompt_ids(prompt) for prompt in prompts])

    def _first_of_next_epoch(self, epoch: float | None) -> list[Any] | None:
        """This process's prompts; None of a dataset without numbers for its rows."""
        sampler, dataset = self._loader.batch_sampler, self._loader.dataset
        if not isinstance(dataset, Dataset):
            return None
        generator = getattr(getattr(getattr(sampler, "batch_sampler", sampler), "sampler", None), "generator", None)
        if generator is not None:
            generator.manual_seed(seed_of_epoch(self.args.seed, epoch) + 1)  # the epoch will seed it so itself
        return [dataset[i]["prompt"] for i in next(iter(sampler))]

    def drop(self) -> None:
        """Want the rollout that was begun no more."""
        self.generation.engine.drop()

    def save(self, checkpoint: Path) -> None:
        """Write the rollout that was begun into a checkpoint."""
        if self.args.should_save:
            checkpoint.mkdir(parents=True, exist_ok=True)
        self.generation.engine.save_ahead(checkpoint / FILE)

    def on_train_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        self._loader = train_dataloader
        self.drop()
        folder = self.checkpoint()
        if folder is not None:
            self.generation.engine.load_ahead(Path(folder) / FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A run that was stopped between two rollouts leaves one, which its checkpoint holds."""
        self.drop()


def seed_of_epoch(seed: int, epoch: float | None) -> int:
    """What the order of an epoch is drawn from, whenever in it that is asked."""
    return seed + int((epoch or 0) + 1e-6)
