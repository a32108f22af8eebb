"""RRHF: its trainer, response sampling, and policies as reward models; imported when first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl_ext.rrhf.config import RRHFConfig
    from trl_ext.rrhf.implicit import ImplicitReward
    from trl_ext.rrhf.sampling import SamplingConfig, load_responses, sample_responses
    from trl_ext.rrhf.trainer import RRHFTrainer
    from trl_ext.scoring import ClassifierReward, ResponseScorer

_SOURCES = {
    "ClassifierReward": "trl_ext.scoring",
    "ImplicitReward": "trl_ext.rrhf.implicit",
    "RRHFConfig": "trl_ext.rrhf.config",
    "RRHFTrainer": "trl_ext.rrhf.trainer",
    "ResponseScorer": "trl_ext.scoring",
    "SamplingConfig": "trl_ext.rrhf.sampling",
    "load_responses": "trl_ext.rrhf.sampling",
    "sample_responses": "trl_ext.rrhf.sampling",
}
__all__ = [
    "ClassifierReward",
    "ImplicitReward",
    "RRHFConfig",
    "RRHFTrainer",
    "ResponseScorer",
    "SamplingConfig",
    "load_responses",
    "sample_responses",
]


def __getattr__(name: str) -> Any:
    if name not in _SOURCES:
        raise AttributeError(f"module 'trl_ext.rrhf' has no attribute {name!r}")
    return getattr(import_module(_SOURCES[name]), name)
