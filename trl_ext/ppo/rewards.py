"""From the score of a response to a reward for each of its tokens."""

import math
from collections.abc import Callable, Sequence

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


@torch.no_grad()
def shape_placed(placed: Tensor, scores: Tensor, moments: RunningMoments, mode: str, clip: float | None) -> Tensor:
    """Parts of scores that are paid before the end, on the scale of the shaped scores.

        s' = k (s - m)        placed' = k placed min(1, clip / |s'|)        k = 1 / std or 1, m = mean or 0, by mode

    The statistics are those of whole responses, and so is the bound: a response of many good steps is not worth more
    than `clip`, however it is paid. A row that the clip shortens has all of its parts shortened alike. What a response
    gets in all is its shaped score: `token_rewards` pays on the last token what the parts leave of it, the mean that is
    taken off included.

    Args:
        placed: raw, weighted parts, (B, T).
        scores: raw scores of the whole responses, the parts included, (B,).
        moments: with this batch: after `shape_scores`.
        mode: "norm", "scale" or "none".
        clip: bound of the shaped score, positive; None for no clip.

    Returns:
        (B, T), in the dtype of `placed`.

    Raises:
        ValueError: the shapes do not fit, or a part is not finite.
    """
    if placed.ndim != 2 or scores.shape != placed.shape[:1]:
        raise ValueError(f"placed must be (B, T) and scores (B,), got {tuple(placed.shape)}, {tuple(scores.shape)}")
    if not placed.isfinite().all():
        raise ValueError(
            f"placed rewards of rows {(~placed.isfinite()).any(1).nonzero().flatten().tolist()} not finite"
        )
    whole = scores.to(sum_dtype(scores.device))
    scale = 1 / moments.std if mode != "none" and moments.std >= STD_FLOOR else 1.0
    whole = scale * (whole - (moments.mean if mode == "norm" else 0.0))
    factor = torch.ones_like(whole) if clip is None else clip / whole.abs().clamp(min=clip)
    return (placed.to(whole.dtype) * scale * factor.unsqueeze(1)).to(placed.dtype)


def onto_actions(placed: Tensor, mask: Tensor) -> Tensor:
    """Parts that were placed on an environment's tokens, on the last token that the policy wrote before them.

    Args:
        placed: (B, T).
        mask: 1 on tokens of the policy, (B, T).

    Returns:
        (B, T), 0 where mask is 0; what stands before the first token of the policy is on that.
    """
    check_same_shape(placed=placed, mask=mask)
    mask = mask.bool()
    number = (mask.cumsum(1) - 1).clamp(min=0)
    return torch.where(mask, torch.zeros_like(placed).scatter_add(1, number, placed).gather(1, number), 0)


def sigmoid_scores(scores: Tensor, references: Sequence[Sequence[float]]) -> Tensor:
    """Scores as the chance to be preferred over the reference answers to the same prompt (PAR).

        s' = mean_m sigmoid(s - s_m)

    Source: Fu et al. 2025, "Reward Shaping to Mitigate Reward Hacking in RLHF" (arXiv 2502.18770), "Preference
    As Reward", with the scores s_m of answers by the policy that training starts from.

    Args:
        scores: s, (B,).
        references: B lists of at least one finite number, not of the same length everywhere.

    Returns:
        (B,), each in (0, 1), in the dtype of `scores`.

    Raises:
        ValueError: another number of lists than scores, or an empty one.
    """
    if len(references) != len(scores) or not all(references):
        raise ValueError(f"{len(scores)} scores need as many lists of reference scores, each with a number")
    pairs = zip(scores, references, strict=True)
    return torch.stack([torch.sigmoid(score - score.new_tensor(list(given))).mean() for score, given in pairs])


def best_answer_weights(scores: Tensor, lengths: Tensor, least: float, total: Callable[[Tensor], Tensor]) -> Tensor:
    """What each answer counts in `losses.best_answers_loss`.

    Args:
        scores: raw, (B,).
        lengths: tokens of each answer, (B,).
        least: the score from which on an answer is one of the best.
        total: from the number of tokens of this process's best answers to what the sum is divided by.

    Returns:
        (B,) float32, 0 for the others, and everywhere where none is good enough.
    """
    best = scores >= least
    return best.float() / total(lengths[best].sum().float())


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, coef: float, placed: Tensor | None = None) -> Tensor:
    """The penalty for leaving the reference on every token, and the score on the last one, or in parts where it arises.

        r_t = -coef kl_t + placed_t + [t is the last token] (score - sum_u placed_u)

    so that the score is what the response gets in all, however it is placed.

    Source: Ziegler et al. 2019, arXiv 1909.08593, equation 2; Zheng et al. 2023, arXiv 2307.04964, section 5.3.

    Args:
        scores: shaped score of each response, (B,).
        kl: estimate of the KL of each token, (B, T).
        mask: 1 on response tokens, (B, T).
        coef: coefficient of the penalty.
        placed: parts of the score that belong to a token, (B, T); default: none.

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
    penalty = torch.where(mask, -coef * kl, 0)
    if placed is None:
        return penalty + torch.where(is_last, scores.unsqueeze(1), 0)
    check_same_shape(placed=placed, mask=mask)
    placed = torch.where(mask, placed, 0)
    return penalty + placed + torch.where(is_last, (scores - placed.sum(1)).unsqueeze(1), 0)
