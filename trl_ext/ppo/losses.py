"""PPO's losses, and how well the critic explains the returns.

A loss is a sum over the tokens that count, divided by `num_tokens`, by default their number. A trainer that splits one
batch over micro-batches or processes passes the number of the whole batch: the gradients of the parts then sum to the
gradient of the whole. Statistics are those of the tensors given, detached.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from trl_ext.ops.kl import kl_estimate
from trl_ext.ops.masking import check_same_shape, masked_mean, masked_mean_var
from trl_ext.ops.precision import sum_dtype


def policy_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float,
    clip_high: float,
    *,
    num_tokens: Tensor | float | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped surrogate, as a loss.

        r = exp(logps - old_logps)
        loss = sum w max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)) / num_tokens

    Source: Schulman et al. 2017, arXiv 1707.06347, equation 7.

    Args:
        logps: log-probabilities of the sampled tokens under the policy, (B, T). The only input with a gradient.
        old_logps: the same under the policy that sampled them, (B, T).
        advantages: A, (B, T).
        mask: 1 on response tokens, (B, T).
        clip_low: how far below 1 the ratio may pull, in [0, 1].
        clip_high: how far above 1 the ratio may pull, at least 0.
        num_tokens: what the sum is divided by; the number of tokens in `mask` by default.
        weights: what each token's term counts, (B, T): importance weights where an engine sampled. Default: 1.

    Returns:
        (loss, stats), loss a scalar, 0 where the mask is empty. stats: `ratio_mean`, `ratio_max`, `clip_fraction`
        (share of tokens whose gradient the clip removes), `approx_kl` (k3 estimate of KL(old, new) per token).

    Raises:
        ValueError: the shapes differ, or a clip range is out of bounds.
    """
    check_same_shape(logps=logps, old_logps=old_logps, advantages=advantages, mask=mask)
    _check_clip(clip_low, clip_high)
    mask = mask.bool()
    logps, old_logps, advantages = _masked(mask, logps, old_logps, advantages)
    ratio = torch.exp(logps - old_logps)
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = _token_mean(_weighted(torch.maximum(unclipped, clipped), weights, mask), mask, num_tokens)
    clip_fraction = masked_mean((clipped > unclipped).to(ratio.dtype), mask)
    return loss, _ratio_stats(ratio, kl_estimate(old_logps, logps, "k3"), mask) | {"clip_fraction": clip_fraction}


def kl_penalty_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    coef: float,
    *,
    num_tokens: Tensor | float | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's penalised surrogate, as a loss: the KL to the policy that sampled takes the place of the clip.

        r = exp(logps - old_logps)
        loss = sum w (-A r + coef (r - 1 - log r)) / num_tokens

    r - 1 - log r estimates KL(old, new) without bias and is never negative (k3). `ops.kl.PenaltyKL` moves the
    coefficient after every update.

    Source: Schulman et al. 2017, arXiv 1707.06347, equation 8.

    Args:
        logps: log-probabilities of the sampled tokens under the policy, (B, T). The only input with a gradient.
        old_logps: the same under the policy that sampled them, (B, T).
        advantages: A, (B, T).
        mask: 1 on response tokens, (B, T).
        coef: weight of the KL, not negative.
        num_tokens: what the sum is divided by; the number of tokens in `mask` by default.
        weights: what each token's term counts, (B, T): importance weights where an engine sampled. Default: 1.

    Returns:
        (loss, stats), loss a scalar, 0 where the mask is empty. stats: `ratio_mean`, `ratio_max` and `approx_kl` as
        those of `policy_loss`.

    Raises:
        ValueError: the shapes differ, or the coefficient is negative.
    """
    check_same_shape(logps=logps, old_logps=old_logps, advantages=advantages, mask=mask)
    if not coef >= 0:
        raise ValueError(f"coef must be >= 0, got {coef}")
    mask = mask.bool()
    logps, old_logps, advantages = _masked(mask, logps, old_logps, advantages)
    ratio, kl = torch.exp(logps - old_logps), kl_estimate(old_logps, logps, "k3")
    loss = _token_mean(_weighted(coef * kl - advantages * ratio, weights, mask), mask, num_tokens)
    return loss, _ratio_stats(ratio, kl, mask)


def dis_loss(
    logps: Tensor,
    sampler_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float,
    clip_high: float,
    *,
    num_tokens: Tensor | float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The importance-weighted surrogate of the tokens whose ratio is near 1; the others contribute nothing (DIS).

        r = exp(logps - sampler_logps)
        loss = sum [1 - clip_low <= r <= 1 + clip_high] (-A r) / num_tokens

    The gradient of a token inside is -A r grad(logps), as that of A sg(r) logps; outside it is 0, whatever the sign of
    A. A clip keeps the gradient of half of those: of a token that has become rarer, where A is positive.

    Source: Hou et al. 2026, "Single-Rollout Asynchronous Optimization for Agentic Reinforcement Learning" (SAO, arXiv
    2607.07508), section 3.1 and equation 3, direct double-sided importance sampling. The ratio is to the policy that
    sampled, as the engine gave it: a second ratio, of the trainer's policy to the engine's, is not needed.

    Args:
        logps: log-probabilities of the sampled tokens under the policy, (B, T). The only input with a gradient.
        sampler_logps: the same under the policy that sampled them, (B, T).
        advantages: A, (B, T).
        mask: 1 on response tokens, (B, T).
        clip_low: how far below 1 a ratio counts, in [0, 1].
        clip_high: how far above 1 a ratio counts, at least 0.
        num_tokens: what the sum is divided by; the number of tokens in `mask` by default, of those outside too.

    Returns:
        (loss, stats), loss a scalar, 0 where the mask is empty. stats: as those of `policy_loss`; `clip_fraction` is
        the share of tokens that contribute nothing.

    Raises:
        ValueError: the shapes differ, or a bound is out of range.
    """
    check_same_shape(logps=logps, sampler_logps=sampler_logps, advantages=advantages, mask=mask)
    _check_clip(clip_low, clip_high)
    mask = mask.bool()
    logps, sampler_logps, advantages = _masked(mask, logps, sampler_logps, advantages)
    difference = logps - sampler_logps
    inside = mask & (difference.detach().exp() >= 1 - clip_low) & (difference.detach().exp() <= 1 + clip_high)
    # An infinite ratio outside must not reach the gradient, not even times 0
    counted = torch.where(inside, difference, 0).exp()
    loss = _token_mean(torch.where(inside, -advantages * counted, 0), mask, num_tokens)
    stats = _ratio_stats(difference.detach().exp(), kl_estimate(sampler_logps, logps, "k3"), mask)
    return loss, stats | {"clip_fraction": masked_mean((~inside).to(logps.dtype), mask)}


def best_answers_loss(logps: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
    """Minus the log-likelihood of the best answers, a mean over their tokens.

        loss = - sum_i w_i sum_t logps_{i,t}        w_i = [answer i is one of the best] / (tokens of all of them)

    Source: Yue et al. 2025, VAPO (arXiv 2504.05118), "Positive Example LM Loss".

    Args:
        logps: log-probabilities of the sampled tokens under the policy, (B, T).
        mask: 1 on response tokens, (B, T).
        weights: w, (B,): see `rewards.best_answer_weights`.

    Returns:
        A scalar.

    Raises:
        ValueError: the shapes do not fit.
    """
    check_same_shape(logps=logps, mask=mask)
    if weights.shape != logps.shape[:1]:
        raise ValueError(f"weights must be (B,), got {tuple(weights.shape)} for logps {tuple(logps.shape)}")
    return -(torch.where(mask.bool(), logps, 0).sum(1) * weights.detach()).sum()


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip_range: float | None,
    *,
    num_tokens: Tensor | float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The critic's squared error, with the move away from its old value clipped.

        V' = V_old + clip(V - V_old, -clip_range, clip_range)
        loss = 1/2 sum max((V - R)^2, (V' - R)^2) / num_tokens

    Source: the implementation of arXiv 1707.06347 (OpenAI Baselines, ppo2); used by arXiv 2307.04964, section 5.3.

    Args:
        values: V, (B, T). The only input with a gradient.
        old_values: V_old, the critic's values at the rollout, (B, T).
        returns: R, (B, T).
        mask: 1 on response tokens, (B, T).
        clip_range: None for no clip, else not negative.
        num_tokens: what the sum is divided by; the number of tokens in `mask` by default.

    Returns:
        (loss, stats), loss a scalar, 0 where the mask is empty. stats: `clip_fraction` (share of tokens whose gradient
        the clip removes), `value_mean`, `return_mean` and `mse` (mean of (V - R)^2).

    Raises:
        ValueError: the shapes differ, or clip_range is negative.
    """
    check_same_shape(values=values, old_values=old_values, returns=returns, mask=mask)
    if clip_range is not None and not clip_range >= 0:
        raise ValueError(f"clip_range must be >= 0, or None for no clip, got {clip_range}")
    mask = mask.bool()
    values = torch.where(mask, values, 0)
    old_values = torch.where(mask, old_values, 0).detach()
    returns = torch.where(mask, returns, 0).detach()

    unclipped = (values - returns).square()
    clipped = unclipped
    if clip_range is not None:
        clipped = (old_values + (values - old_values).clamp(-clip_range, clip_range) - returns).square()
    loss = 0.5 * _token_mean(torch.maximum(unclipped, clipped), mask, num_tokens)
    with torch.no_grad():
        stats = {
            "clip_fraction": masked_mean((clipped > unclipped).to(values.dtype), mask),
            "value_mean": masked_mean(values, mask),
            "return_mean": masked_mean(returns, mask),
            "mse": masked_mean(unclipped, mask),
        }
    return loss, stats


@torch.no_grad()
def explained_variance(
    values: Tensor, returns: Tensor, mask: Tensor, *, reduce: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """The share of the returns' variance that the critic explains: 1 is perfect, 0 no better than a constant.

        1 - var(R - V) / var(R)

    0 where the returns do not vary: there is nothing to explain, however far off the values are.

    Args:
        values: V, (B, T).
        returns: R, (B, T).
        mask: 1 on response tokens, (B, T).
        reduce: sums a small tensor over all processes (see `ops.masking.masked_mean_var`).

    Returns:
        A scalar of `ops.precision.sum_dtype`, at most 1 and possibly negative.

    Raises:
        ValueError: the shapes differ.
    """
    check_same_shape(values=values, returns=returns, mask=mask)
    dtype = sum_dtype(returns.device)
    _, residual_var = masked_mean_var(returns.to(dtype) - values.to(dtype), mask, reduce)
    _, return_var = masked_mean_var(returns, mask, reduce)
    return torch.where(return_var > 0, 1 - residual_var / return_var, 0)


def _check_clip(clip_low: float, clip_high: float) -> None:
    if not 0 <= clip_low <= 1 or not clip_high >= 0:
        raise ValueError(f"clip_low must be in [0, 1] and clip_high >= 0, got {clip_low} and {clip_high}")


def _masked(mask: Tensor, logps: Tensor, *constants: Tensor) -> list[Tensor]:
    """0 outside the mask, before exp: an infinite ratio there would turn the gradient of the whole row into NaN."""
    return [torch.where(mask, logps, 0), *(torch.where(mask, x, 0).detach() for x in constants)]


def _weighted(terms: Tensor, weights: Tensor | None, mask: Tensor) -> Tensor:
    """The terms of a loss, (B, T), times what each counts; 0 outside the mask."""
    if weights is None:
        return terms
    check_same_shape(weights=weights, terms=terms)
    return terms * torch.where(mask, weights, 0).detach()


@torch.no_grad()
def _ratio_stats(ratio: Tensor, kl: Tensor, mask: Tensor) -> dict[str, Tensor]:
    return {
        "ratio_mean": masked_mean(ratio, mask),
        "ratio_max": torch.where(mask, ratio, 0).amax(),
        "approx_kl": masked_mean(kl, mask),
    }


def _token_mean(x: Tensor, mask: Tensor, num_tokens: Tensor | float | None) -> Tensor:
    """sum(x where mask) / num_tokens; 0, with a graph, where there are no tokens."""
    count = mask.sum() if num_tokens is None else torch.as_tensor(num_tokens, device=x.device)
    return torch.where(mask, x, 0).sum() / torch.where(count > 0, count, 1)
