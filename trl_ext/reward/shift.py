"""How far a policy's answers have left what its reward models know: scores and their spread over a run."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FEWEST = 4  # samples of a moment, below which its means say nothing


def shift_over_run(steps: Sequence[int], scores: Tensor, gold: Tensor | None = None) -> list[dict[str, Any]]:
    """What an ensemble of reward models says of samples, moment by moment.

        mean_t = mean of the members' mean score        spread_t = mean of the members' standard deviation
        shift_t = (mean_t - mean_0) / std_0        doubt_t = spread_t / spread_0

    The means are over the samples of a moment, std_0 is over those of the first. A policy that stays where the
    reward models were trained raises the mean at an even spread; where the spread grows with it, the members guess,
    each in its own way, and the reward is less and less to be trusted (Coste et al. 2023, arXiv 2310.02743).

    Args:
        steps: Optimizer step of each sample, N.
        scores: Normalised scores, (N, M), of at least two members.
        gold: Another reward of the samples, (N,), to compare with; NaN where there is none.

    Returns:
        In the order of the steps, those with fewer than `FEWEST` samples left out: `step`, `count`, `mean`, `std` over
        the samples, `spread`, `shift`, `doubt`, and `gold`, its mean, where there is one.

    Raises:
        ValueError: Shapes that do not fit, fewer than two members, or no moment with enough samples.
    """
    if scores.ndim != 2 or scores.shape[1] < 2 or len(scores) != len(steps):
        raise ValueError(
            f"scores {tuple(scores.shape)} of {len(steps)} samples must be (N, M) of at least two reward models: one "
            "alone has no spread."
        )
    at, found = torch.tensor(list(steps)), []
    for step in sorted(set(steps)):
        own = scores[at == step]
        if len(own) < FEWEST:
            continue
        means = own.mean(1)
        moment: dict[str, Any] = {
            "step": step,
            "count": len(own),
            "mean": float(means.mean()),
            "std": float(means.std(unbiased=False)),
            "spread": float(own.std(1, unbiased=False).mean()),
        }
        if gold is not None and not bool(gold[at == step].isnan().all()):
            moment["gold"] = float(gold[at == step].nanmean())
        found.append(moment)
    if not found:
        raise ValueError(f"no moment of the run has {FEWEST} samples: there is nothing to compare.")
    first = found[0]
    for moment in found:
        moment["shift"] = (moment["mean"] - first["mean"]) / first["std"] if first["std"] else float("nan")
        moment["doubt"] = moment["spread"] / first["spread"] if first["spread"] else float("nan")
    return found
