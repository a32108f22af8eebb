"""The embedded world: a text task with a known gold reward, a tiny model, and the three trainings that PPO needs.

Nothing is downloaded and nothing is shipped: the vocabulary and the texts come from `task`, the tokenizer and the model
from `model`, and `build_world` pretrains, fine-tunes and learns a reward model in about a minute on two CPU cores.

The names below are imported on first use, so that `import trl_ext.toy` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .model import build_model, build_tokenizer
    from .task import gold_reward
    from .trainer import ToyWorld, build_base, build_world

__all__ = ["ToyWorld", "build_base", "build_model", "build_tokenizer", "build_world", "gold_reward"]

_HOME = {
    "ToyWorld": "trainer",
    "build_base": "trainer",
    "build_model": "model",
    "build_tokenizer": "model",
    "build_world": "trainer",
    "gold_reward": "task",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
