"""Losses of a reward model. The textbook prints some of them with wrong signs; every one here is to be minimised.

Deviation: where margin and label smoothing meet, which no paper writes down, both orders are of d - m: the smoothed
target is a lead of m.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def preference_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | float | None = None, label_smoothing: Tensor | float = 0.0
) -> Tensor:
    """Negative log-likelihood of the labels under the Bradley-Terry model, a mean over pairs.

        d = chosen - rejected - m        loss = mean[-(1 - eps) log sigma(d) - eps log sigma(-d)]

    Source: Ouyang et al. 2022, arXiv 2203.02155, equation 1; margin and label smoothing: Wang et al. 2024, arXiv
    2401.06080, equations 5 and 6.

    Args:
        chosen: scores of the preferred responses, (B,).
        rejected: scores of the others, (B,).
        margin: m, by how much the preferred one should lead, (B,) or one number.
        label_smoothing: eps, the probability that a label is wrong, (B,) or one number, from 0 to below 0.5; what
            `smoothing_of` makes of a soft label, from 0 to 1.

    Returns:
        Scalar.

    Raises:
        ValueError: shapes that differ, or no pair.
    """
    return pair_losses(chosen, rejected, margin, label_smoothing).mean()


def smoothing_of(soft_label: float, label_smoothing: float = 0.0) -> float:
    """Label smoothing with which `preference_loss` is the cross-entropy with a soft label.

        loss = -p log sigma(d) - (1 - p) log sigma(-d),    p = q (1 - eps) + (1 - q) eps    so its smoothing is 1 - p

    q is the share of votes for the chosen response, or another probability that it is the better one. At the minimum
    of a pair that several annotators label, sigma(d) is the share of them. With q = 1 it is plain label smoothing.

    Source: the log-likelihood of Bradley and Terry 1952 for repeated comparisons of one pair, divided by their number;
    Wang et al. 2024, arXiv 2401.06080, equation 6, is the case of one q for all pairs.

    Args:
        soft_label: q, from 0 to 1.
        label_smoothing: eps, the probability that a label is wrong.

    Raises:
        ValueError: q is no probability.
    """
    if not 0 <= soft_label <= 1:
        raise ValueError(f"soft_label={soft_label!r} must be from 0 to 1: the probability that the chosen is better.")
    return 1 - (soft_label * (1 - label_smoothing) + (1 - soft_label) * label_smoothing)


def pair_losses(
    chosen: Tensor, rejected: Tensor, margin: Tensor | float | None = None, label_smoothing: Tensor | float = 0.0
) -> Tensor:
    """`preference_loss` of each pair, (B,)."""
    if chosen.ndim != 1 or chosen.shape != rejected.shape or not len(chosen):
        raise ValueError(
            f"chosen {tuple(chosen.shape)} and rejected {tuple(rejected.shape)} must both be (B,), with a pair."
        )
    for name, value in (("margin", margin), ("label_smoothing", label_smoothing)):
        if isinstance(value, Tensor) and value.shape not in (chosen.shape, torch.Size([])):
            raise ValueError(f"{name} has shape {tuple(value.shape)}, the scores have {tuple(chosen.shape)}.")
    lead = chosen - rejected - (0.0 if margin is None else margin)
    right, wrong = -F.logsigmoid(lead), -F.logsigmoid(-lead)
    return right + label_smoothing * (wrong - right)


def imitation_loss(logps: Tensor) -> Tensor:
    """Token mean of the cross-entropy of the preferred responses, -mean log p: keeps the base a language model.

    Source: Zheng et al. 2023, arXiv 2307.04964, equation 2 (there with the sign of a reward).

    Args:
        logps: log-probabilities of response tokens, (M,).

    Raises:
        ValueError: no token.
    """
    if not logps.numel():
        raise ValueError("no response token to imitate: the preferred responses are empty.")
    return -logps.mean()


def centering_losses(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(chosen + rejected)^2 of each pair, (B,): holds the scores around 0, which the preference loss leaves free.

    Source: Eisenstein et al. 2023, arXiv 2312.09244, equation 2, there a mean over pairs.
    """
    return (chosen + rejected) ** 2
