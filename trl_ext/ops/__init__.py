"""Tensors in, tensors out: the arithmetic that every method shares. Nothing here knows a model, a config or TRL."""

from trl_ext.ops.advantages import gae
from trl_ext.ops.kl import AdaptiveKL, FixedKL, KLController, PenaltyKL, kl_estimate
from trl_ext.ops.logprobs import token_logprobs
from trl_ext.ops.masking import check_same_shape, masked_mean, masked_mean_var, masked_whiten
from trl_ext.ops.moments import RunningMoments

__all__ = [
    "AdaptiveKL",
    "FixedKL",
    "KLController",
    "PenaltyKL",
    "RunningMoments",
    "check_same_shape",
    "gae",
    "kl_estimate",
    "masked_mean",
    "masked_mean_var",
    "masked_whiten",
    "token_logprobs",
]
