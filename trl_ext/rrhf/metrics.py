"""What a run logs, from sums over responses, pairs and prompts."""

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from trl_ext.ops.precision import sum_dtype
from trl_ext.rrhf.losses import best_responses, ordered_pairs

Ratio = tuple[Tensor | float, Tensor | float]


class RunningMeans:
    """Metrics as sum / count, so that a figure over many batches and processes is that of all their samples."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}

    def add(self, ratios: Mapping[str, Ratio]) -> None:
        """Add to the sums and counts of one or more metrics."""
        flat = [x for ratio in ratios.values() for x in ratio]
        device = next((x.device for x in flat if isinstance(x, Tensor)), None)
        numbers = torch.stack([torch.as_tensor(x, device=device).detach().float() for x in flat]).tolist()
        for name, total, count in zip(ratios, numbers[::2], numbers[1::2], strict=True):
            old = self.sums.setdefault(name, [0.0, 0.0])
            old[0] += total
            old[1] += count

    def take(self, reduce: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, float]:
        """The metrics since the last call, over all processes; a name that counted nothing is left out.

        `perplexity*` are exp of their ratio. Every process must have added to the same names.
        """
        names = sorted(self.sums)
        if not names:
            return {}
        sums = torch.tensor([self.sums[name] for name in names], dtype=sum_dtype(device), device=device)
        total = reduce(sums).tolist()
        self.sums.clear()
        means = {name: a / b for name, (a, b) in zip(names, total, strict=True) if b > 0}
        return {k: math.exp(min(v, 50.0)) if k.startswith("perplexity") else v for k, v in means.items()}


@torch.no_grad()
def ranking_metrics(
    scores: Tensor, rewards: Tensor, logps: Tensor, mask: Tensor, group: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """How well the policy's order of the responses is that of their rewards, and how likely the best ones are.

    Args:
        scores: the policy's, of `sequence_scores`, (N,).
        rewards: (N,).
        logps, mask: log-probabilities of the response tokens and where they are, (N, T).
        group: number of the prompt that each response answers, (N,).

    Returns:
        name -> (sum, count). `ranking_accuracy`: share of the pairs with different rewards that the scores order
        alike. `kendall_tau`: Kendall's tau-b of scores and rewards of one prompt, mean over the prompts that have one
        (both differ somewhere). `perplexity_best`: log perplexity of the best responses, by token. `pairs`: pairs with
        different rewards per prompt. `score_best` and `score_mean`: of the best response, of all.
    """
    pairs = ordered_pairs(rewards, group)
    right = pairs & (scores[:, None] < scores[None, :])
    wrong = pairs & (scores[:, None] > scores[None, :])
    tied = (group[:, None] == group[None, :]) & (scores[:, None] == scores[None, :])
    prompts, owner = group.unique(return_inverse=True)
    dtype = sum_dtype(scores.device)

    def per_prompt(matrix: Tensor) -> Tensor:
        zeros = torch.zeros(len(prompts), dtype=dtype, device=scores.device)
        return zeros.index_add(0, owner, matrix.sum(1).to(dtype))

    size = owner.bincount().to(dtype)
    ordered_by_score = (size * size - per_prompt(tied)) / 2
    normalizer = (per_prompt(pairs) * ordered_by_score).sqrt()
    tau = (per_prompt(right) - per_prompt(wrong)) / normalizer.clamp(min=1e-9)
    best = best_responses(rewards, group)
    count = torch.tensor(len(prompts), device=scores.device)
    return {
        "ranking_accuracy": (right.sum(), pairs.sum()),
        "kendall_tau": (tau[normalizer > 0].sum(), (normalizer > 0).sum()),
        "perplexity_best": (-torch.where(mask, logps, 0)[best].sum(), mask[best].sum()),
        "pairs": (pairs.sum(), count),
        "score_best": (scores[best].sum(), count),
        "score_mean": (scores.sum(), torch.tensor(len(scores), device=scores.device)),
    }


@torch.no_grad()
def kl_metrics(logps: Tensor, reference_logps: Tensor, mask: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """`kl`: mean over responses of log policy - log reference; an estimate of the KL where the policy sampled them."""
    difference = torch.where(mask, logps - reference_logps, 0)
    return {"kl": (difference.sum(), torch.tensor(len(mask), device=mask.device))}


def means(values: dict[str, Tensor], count: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Means over `count` samples, as ratios."""
    return {k: (v.detach() * count, torch.tensor(count, device=v.device)) for k, v in values.items()}


def mean_of(values: Iterable[float]) -> Ratio:
    """A list of numbers, as a ratio."""
    numbers = list(values)
    return float(sum(numbers)), float(len(numbers))
