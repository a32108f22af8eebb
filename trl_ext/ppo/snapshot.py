"""Policies that a run may go back to: the last good one and the best one, with critic and optimizer."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


class Snapshot:
    """The weights that an optimizer trains, and what it keeps of each, as they were at one moment; in main memory.

    Attributes:
        info: Numbers that belong to it, among them "step"; empty while nothing was taken.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.info: dict[str, float] = {}

    @torch.no_grad()
    def take(self, optimizer: Any, **info: float) -> None:
        """Copy weights and states; what was there is forgotten."""
        self.info = {name: float(value) for name, value in info.items()}
        self.tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in _tensors(optimizer)}

    @torch.no_grad()
    def restore(self, optimizer: Any, with_states: bool = True) -> None:
        """Write the copies back.

        A weight that had no state when the copy was made has none again.

        Args:
            optimizer: The one of which it was taken, or the same of a run that goes on.
            with_states: Also what the optimizer keeps; else the weights alone.
        """
        optimizer = _inner(optimizer)
        for name, weight in _weights(optimizer):
            weight.copy_(self.tensors[name])
            if not with_states:
                continue
            state = optimizer.state.get(weight, {})
            if not any(key.startswith(f"{name}/") for key in self.tensors):
                optimizer.state.pop(weight, None)
                continue
            for key, value in state.items():
                if isinstance(value, Tensor):
                    value.copy_(self.tensors[f"{name}/{key}"])

    def save(self, path: Path) -> None:
        """Write a safetensors file, the numbers in its header."""
        save_file(self.tensors, path, metadata={"info": json.dumps(self.info)})

    def load(self, path: Path) -> None:
        """Read what `save` wrote.

        Raises:
            ValueError: It is missing or damaged; names the file.
        """
        try:
            with safe_open(path, framework="pt") as file:
                self.info = json.loads(file.metadata()["info"])
                self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is missing or damaged ({str(error)[:80]}): the checkpoint is not whole. Take another one."
            ) from error


def _inner(optimizer: Any) -> Any:
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _weights(optimizer: Any) -> Iterator[tuple[str, nn.Parameter]]:
    for group in optimizer.param_groups:
        for i, weight in enumerate(group["params"]):
            yield f"{group['role']}/{i}", weight


def _tensors(optimizer: Any) -> Iterator[tuple[str, Tensor]]:
    optimizer = _inner(optimizer)
    for name, weight in _weights(optimizer):
        yield name, weight
        for key, value in optimizer.state.get(weight, {}).items():
            if isinstance(value, Tensor):
                yield f"{name}/{key}", value
