"""Generalised advantage estimation."""

import math

import torch
from torch import Tensor

from trl_ext.ops.masking import check_same_shape


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float | Tensor) -> tuple[Tensor, Tensor]:
    """Advantages and returns of responses that are padded on the right.

        delta_t = r_t + gamma V_{t+1} - V_t        A_t = delta_t + gamma lam A_{t+1}        R_t = A_t + V_t

    where V and A after the last token are 0: the response is over. Both results are targets and carry no gradient.

    Source: Schulman et al. 2016, arXiv 1506.02438, equation 16.

    Args:
        rewards: r, (B, T), floating point.
        values: V, the critic's value of the state before each token, (B, T).
        mask: 1 on the tokens of the response, a prefix of each row, (B, T). What `rewards` and `values` hold elsewhere
            does not matter.
        gamma: discount, in [0, 1].
        lam: 1 is Monte Carlo, 0 is one-step temporal difference, in [0, 1]; one for all responses, or one for each,
            (B,), as `length_adaptive_lambda` gives.

    Returns:
        (advantages, returns), (B, T) each, 0 where mask is 0.

    Raises:
        ValueError: the shapes differ or are not (B, T), gamma or lam is out of range, or a row of the mask is not a
            prefix of ones.
    """
    check_same_shape(rewards=rewards, values=values, mask=mask)
    if mask.ndim != 2:
        raise ValueError(f"rewards, values and mask must be (B, T), got {tuple(mask.shape)}")
    for name, number in (("gamma", gamma), ("lam", lam)):
        if isinstance(number, Tensor):
            if number.shape != rewards.shape[:1] or not ((number >= 0) & (number <= 1)).all():
                raise ValueError(f"{name} must be (B,) and in [0, 1], got {number} of shape {tuple(number.shape)}")
        elif not 0 <= number <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {number}")
    mask = mask.bool()
    if (mask[:, 1:] & ~mask[:, :-1]).any():
        raise ValueError("mask must be a prefix of ones in each row (responses are padded on the right)")

    # Zeros after the last token make it an ordinary one: its next value is 0, and so is every delta behind it.
    rewards = torch.where(mask, rewards, 0)
    values = torch.where(mask, values, 0)
    next_values = torch.cat([values[:, 1:], values.new_zeros(values.shape[0], 1)], dim=1)
    advantages = rewards + gamma * next_values - values
    for t in reversed(range(mask.shape[1] - 1)):
        advantages[:, t] += gamma * lam * advantages[:, t + 1]
    return advantages, advantages + values


@torch.no_grad()
def gae_over_actions(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float | Tensor
) -> tuple[Tensor, Tensor]:
    """`gae` of responses whose mask has gaps: the token after the end of an action is the first of the next one.

    What stands in a gap, the words of an environment, is a part of the state and no decision: it is not discounted, has
    no advantage, and its value is not used.

    Args:
        rewards, values, mask, gamma, lam: See `gae`; the mask may have any form.

    Returns:
        (advantages, returns), (B, T) each, 0 where mask is 0.
    """
    check_same_shape(rewards=rewards, values=values, mask=mask)
    order = (~mask.bool()).int().argsort(dim=1, stable=True)  # actions first, in their order
    rewards, values, mask = (x.gather(1, order) for x in (rewards, values, mask))
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    return torch.zeros_like(advantages).scatter(1, order, advantages), torch.zeros_like(returns).scatter(
        1, order, returns
    )


@torch.no_grad()
def length_adaptive_lambda(lengths: Tensor, alpha: float) -> Tensor:
    """Lambda of the policy's advantages for responses of different lengths.

        lambda = max(1 - 1 / (alpha l), 0)

    so that the weights of the temporal differences sum to alpha l, a share of the response that is the same for all: a
    fixed 0.95 sees 20 tokens ahead, whether 50 or 5,000 are left.

    Source: Yue et al. 2025, VAPO (arXiv 2504.05118), "Length-Adaptive GAE". The paper's responses have
    thousands of tokens and its alpha is 0.05. Where alpha l is below 1 the formula would be negative; it is 0 here.

    Args:
        lengths: l, tokens of each response, (B,).
        alpha: above 0.

    Returns:
        (B,) float32, in [0, 1).

    Raises:
        ValueError: lengths are not (B,), or alpha is not positive.
    """
    if lengths.ndim != 1:
        raise ValueError(f"lengths must be (B,), got {tuple(lengths.shape)}")
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha must be a number above 0, got {alpha}")
    return (1 - 1 / (alpha * lengths.clamp(min=1).float())).clamp(min=0)
