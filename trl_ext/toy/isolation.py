"""Keeps the toy trainings to themselves: the console, the progress bars and the random states of the caller."""

import contextlib
import random
import warnings
from collections.abc import Iterator
from typing import Any

import datasets
import numpy
import torch
import transformers
from tqdm.auto import tqdm
from transformers import TrainerCallback


@contextlib.contextmanager
def quiet_console() -> Iterator[None]:
    """Hide what a toy training would print beside its own progress bar.

    That is the progress bars of `datasets` (tokenizing, filtering) and `transformers` (reading and writing weights),
    the latter's report that the base's checkpoint has no score head, and the warnings that `gradient_checkpointing`
    will be called `activation_checkpointing`: TRL's own code uses the name of today.
    """
    datasets_shown = datasets.is_progress_bar_enabled()
    transformers_shown = transformers.utils.logging.is_progress_bar_enabled()
    verbosity = transformers.utils.logging.get_verbosity()
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*gradient_checkpointing` is deprecated", category=FutureWarning)
            yield
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
        if datasets_shown:
            datasets.enable_progress_bars()
        if transformers_shown:
            transformers.utils.logging.enable_progress_bar()


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Restore the global random states of python, numpy and torch on leaving, on every device."""
    python_state, numpy_state = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)


class StageProgress(TrainerCallback):
    """One named progress bar for a training, instead of the trainer's own bar and printed logs."""

    def __init__(self, description: str):
        self.description = description
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = tqdm(total=state.max_steps, desc=self.description, unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(1)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()
