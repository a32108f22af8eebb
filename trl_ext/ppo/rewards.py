"""From one score for a response to a reward for each of its tokens."""

import math

import torch
from torch import Tensor

from trl_ext.ops.masking import check_same_shape
from trl_ext.ops.moments import RunningMoments
from trl_ext.ops.precision import sum_dtype

BASELINES = ("explained", "always")
SCORE_MODES = ("norm", "scale", "none")
STD_FLOOR = 1e-8


@torch.no_grad()
def shape_scores(
    scores: Tensor, moments: RunningMoments, mode: str, clip: float | None, *, update: bool = True
) -> Tensor:
    """Scores on a scale that holds through training: normalised by everything seen so far, then clipped.

        norm: (s - mean) / std        scale: s / std        none: s        then clip to [-clip, clip]

    The moments take in this batch first, in every mode. A std below 1e-8 means that all scores seen were equal:
    nothing is divided by it then, which would blow up rounding errors and, in `scale`, the score itself.

    Source: Zheng et al. 2023, arXiv 2307.04964, section 5.3, equation 18.

    Args:
        scores: s, this process's own, (B,). `moments` adds those of the others.
        moments: running mean and unbiased std; updated in place, on every process.
        mode: "norm", "scale" or "none".
        clip: bound, positive; None for no clip.
        update: False leaves the moments as they are and uses them: for evaluation.

    Returns:
        The shaped scores, (B,), in the dtype of `scores`.

    Raises:
        ValueError: scores are not (B,) or not finite, the mode is unknown, or clip is not positive.
    """
    if scores.ndim != 1 or not scores.is_floating_point():
        raise ValueError(f"scores must be floats of shape (B,), got {scores.dtype} of shape {tuple(scores.shape)}")
    if mode not in SCORE_MODES:
        raise ValueError(f"unknown score mode {mode!r}; choose one of {', '.join(SCORE_MODES)}")
    if clip is not None and not (math.isfinite(clip) and clip > 0):
        raise ValueError(f"clip must be positive, or None for no clip, got {clip}")
    mean, std = moments.update(scores) if update else (moments.mean, moments.std)
    shaped = scores.to(sum_dtype(scores.device))
    if mode == "norm":
        shaped = shaped - mean
    if mode != "none" and std >= STD_FLOOR:
        shaped = shaped / std
    if clip is not None:
        shaped = shaped.clamp(-clip, clip)
    return shaped.to(scores.dtype)


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, coef: float) -> Tensor:
    """The penalty for leaving the reference on every token, and the score on the last one.

        r_t = -coef kl_t + [t is the last token] score

    Source: Ziegler et al. 2019, arXiv 1909.08593, equation 2; Zheng et al. 2023, arXiv 2307.04964, section 5.3.

    Args:
        scores: shaped score of each response, (B,).
        kl: estimate of the KL of each token, (B, T).
        mask: 1 on response tokens, (B, T).
        coef: coefficient of the penalty.

    Returns:
        Rewards, (B, T), 0 where mask is 0. A row without tokens is all 0: its score is not used.

    Raises:
        ValueError: the shapes do not fit.
    """
    check_same_shape(kl=kl, mask=mask)
    if kl.ndim != 2 or scores.shape != kl.shape[:1]:
        raise ValueError(f"scores must be (B,) and kl (B, T), got scores {tuple(scores.shape)}, kl {tuple(kl.shape)}")
    mask = mask.bool()
    is_last = mask & (mask.cumsum(dim=1) == mask.sum(dim=1, keepdim=True))
    return torch.where(mask, -coef * kl, 0) + torch.where(is_last, scores.unsqueeze(1), 0)
