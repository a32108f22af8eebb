"""Completions that a server samples in the background, and how they pass through a checkpoint."""

import threading
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from trl_ext.generation.vllm_server import Completion, Prompt

Completions = list[list[Completion]]
Work = Callable[[threading.Event], Completions]


class Ahead:
    """Completions of some prompts, by a thread that works from now on and never keeps the process from ending.

    Args:
        prompts: Of all processes, in order.
        work: Samples one completion of each; it begins no request once its event is set.
    """

    def __init__(self, prompts: Sequence[Prompt], work: Work):
        self.prompts = list(prompts)
        self.stop = threading.Event()
        self._found: Completions = []
        self._error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, args=(work,), daemon=True, name="rollout ahead")
        self.thread.start()

    def _run(self, work: Work) -> None:
        try:
            self._found = work(self.stop)
        except BaseException as error:  # raised where the completions are asked for
            self._error = error

    def result(self) -> Completions:
        """Wait for the completions.

        Raises:
            BaseException: What the work has raised.
        """
        self.thread.join()
        if self._error is not None:
            raise self._error
        return self._found

    def write(self, path: Path) -> bool:
        """Wait for the completions, and write them and their prompts into a safetensors file.

        Returns:
            False, and no file, where the work has failed: that is told where the completions are asked for.
        """
        self.thread.join()
        if self._error is not None:
            return False
        completions = [group[0] for group in self._found]
        tensors = {
            "prompts": torch.tensor([i for prompt in self.prompts for i in prompt.ids], dtype=torch.int64),
            "prompt_lengths": torch.tensor([len(prompt.ids) for prompt in self.prompts]),
            "completions": torch.tensor([i for each in completions for i in each.ids], dtype=torch.int64),
            "completion_lengths": torch.tensor([len(each.ids) for each in completions]),
            "logps": torch.tensor([logp for each in completions for logp in each.logps], dtype=torch.float64),
        }
        save_file(tensors, path)
        return True

    @classmethod
    def read(cls, path: Path) -> "Ahead":
        """What `write` has written.

        Raises:
            ValueError: It is damaged; names the file.
        """
        try:
            with safe_open(path, framework="pt") as file:
                columns = {name: file.get_tensor(name).tolist() for name in file.keys()}  # noqa: SIM118
            prompts = _cut(columns["prompts"], columns["prompt_lengths"])
            ids = _cut(columns["completions"], columns["completion_lengths"])
            logps = _cut(columns["logps"], columns["completion_lengths"])
            asked = [Prompt(tuple(prompt), 1, 0) for prompt in prompts]  # nothing is asked for again
            found = [[Completion(*each)] for each in zip(ids, logps, strict=True)]
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise ValueError(
                f"{path} is damaged ({str(error)[:80]}): the checkpoint is not whole. Take another one."
            ) from error
        return cls(asked, lambda stop: found)


def _cut(flat: list, lengths: list[int]) -> list[list]:
    ends = list(accumulate(lengths))
    if ends and ends[-1] != len(flat):
        raise ValueError(f"{len(flat)} values where {ends[-1]} belong")
    return [flat[end - length : end] for end, length in zip(ends, lengths, strict=True)]
