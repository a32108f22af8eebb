"""PPO-Max: `PPOMaxConfig` and `PPOMaxTrainer`, imported when first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = ["PPOMaxConfig", "PPOMaxTrainer"]

if TYPE_CHECKING:
    from trl_ext.ppo.config import PPOMaxConfig
    from trl_ext.ppo.trainer import PPOMaxTrainer


def __getattr__(name: str) -> Any:
    sources = {"PPOMaxConfig": "trl_ext.ppo.config", "PPOMaxTrainer": "trl_ext.ppo.trainer"}
    if name not in sources:
        raise AttributeError(f"module 'trl_ext.ppo' has no attribute {name!r}")
    return getattr(import_module(sources[name]), name)
