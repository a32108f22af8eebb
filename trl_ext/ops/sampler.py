"""What the difference between the policy that was trained and the engine that sampled from it costs, and how to pay it.

An engine has kernels and types of its own: its log-probabilities of the tokens that it drew are not quite the trainer's
of the same weights. The samples are off-policy by that ratio, which importance weights take back.
"""

import torch
from torch import Tensor

from trl_ext.ops.masking import check_same_shape
from trl_ext.ops.precision import sum_dtype


@torch.no_grad()
def importance_weights(logps: Tensor, sampler_logps: Tensor, mask: Tensor, largest: float) -> Tensor:
    """Token-wise truncated importance weights.

        w_t = min(exp(logps_t - sampler_logps_t), largest)

    Source: Ionides 2008, "Truncated Importance Sampling"; Yao et al. 2025, "Your Efficient RL Framework Secretly Brings
    You Off-Policy RL Training", for engines.

    Args:
        logps: Of the sampled tokens under the trainer's policy, at the rollout, (B, T).
        sampler_logps: Under the engine that sampled them, (B, T).
        mask: 1 on response tokens, (B, T).
        largest: What a weight is cut to, above 0.

    Returns:
        (B, T), 1 outside the mask.

    Raises:
        ValueError: The shapes differ.
    """
    check_same_shape(logps=logps, sampler_logps=sampler_logps, mask=mask)
    ratio = torch.where(mask.bool(), logps.float() - sampler_logps.float(), 0.0).exp()
    return ratio.clamp(max=largest)


@torch.no_grad()
def sampler_sums(logps: Tensor, sampler_logps: Tensor, weights: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """What `sampler_figures` needs of one process.

    Args:
        logps, sampler_logps, mask: See `importance_weights`; (B, T) each.
        weights: What it returned, (B, T).

    Returns:
        Sums over processes: tokens, |difference|, ratio, weights, squared weights, (5,). And the largest: of
        |difference|, of the ratio, and minus its smallest, (3,). Both of `ops.precision.sum_dtype`.

    Raises:
        ValueError: The shapes differ.
    """
    check_same_shape(logps=logps, sampler_logps=sampler_logps, weights=weights, mask=mask)
    mask, dtype = mask.bool(), sum_dtype(logps.device)
    off = (logps.to(dtype) - sampler_logps.to(dtype))[mask]
    ratio, weights = off.exp(), weights.to(dtype)[mask]
    sums = torch.stack([mask.sum().to(dtype), off.abs().sum(), ratio.sum(), weights.sum(), weights.square().sum()])
    largest = torch.stack([x.amax() if len(x) else x.new_tensor(-torch.inf) for x in (off.abs(), ratio, -ratio)])
    return sums, largest


def sampler_figures(sums: Tensor, largest: Tensor) -> dict[str, float]:
    """Mean and largest difference (nats a token), ratio trainer / sampler, and the share of tokens that count.

    The share is the effective sample size of the weights over the number of tokens, (sum w)^2 / (n sum w^2).

    Source: Kish 1965, "Survey Sampling".

    Args:
        sums: Of `sampler_sums`, of all processes, (5,).
        largest: The same, the largest of all processes, (3,).

    Returns:
        By the names of the log; nothing where there is no token.
    """
    tokens, off, ratio, weights, squares = sums.tolist()
    if tokens == 0:
        return {}
    off_max, ratio_max, ratio_min = largest.tolist()
    return {
        "sampling/sampling_logp_difference/mean": off / tokens,
        "sampling/sampling_logp_difference/max": off_max,
        "sampling/importance_sampling_ratio/mean": ratio / tokens,
        "sampling/importance_sampling_ratio/max": ratio_max,
        "sampling/importance_sampling_ratio/min": -ratio_min,
        "sampling/effective_sample_size": weights**2 / (tokens * squares) if squares > 0 else 0.0,
    }
