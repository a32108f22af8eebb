"""Whether tokens were drawn from the distributions that they are said to be drawn from."""

import math
from itertools import pairwise

import torch
from torch import Tensor


def deviations(logits: list[Tensor], tokens: list[list[int]], ends: list[int]) -> dict[str, float]:
    """How far draws are from their distributions, in standard deviations of what chance makes; each about N(0, 1).

    Args:
        logits: Of every completion (T, V): from row t the token t was drawn.
        tokens: The completions, T ids each.
        ends: End tokens.

    Returns:
        surprise: -log p of the tokens against the entropies. end: how many end tokens against their probabilities.
        most likely: how often that was drawn. neighbours: how far the draws of one position in two completions that
        follow each other go together.
    """
    sums = {name: [0.0, 0.0] for name in ("surprise", "end", "most likely")}
    marks: list[Tensor] = []
    for rows, ids in zip(logits, tokens, strict=True):
        logp, token = rows.double().log_softmax(-1), torch.tensor(ids)
        p = logp.exp()
        entropy = -(p * logp).sum(-1)
        surprise = -logp.gather(1, token[:, None])[:, 0]
        likely = p.amax(-1)
        ending = p[:, ends].sum(-1)
        for name, found, expected, variance in (
            ("surprise", surprise, entropy, (p * logp**2).sum(-1) - entropy**2),
            ("end", torch.isin(token, torch.tensor(ends)), ending, ending * (1 - ending)),
            ("most likely", token == p.argmax(-1), likely, likely * (1 - likely)),
        ):
            sums[name][0] += float((found.double() - expected).sum())
            sums[name][1] += float(variance.sum())
        marks.append((surprise - entropy) / ((p * logp**2).sum(-1) - entropy**2).clamp(min=1e-12).sqrt())
    pairs = [(a[: len(b)], b[: len(a)]) for a, b in pairwise(marks)]
    products = torch.cat([a * b for a, b in pairs])
    together = float(products.sum() / products.square().sum().sqrt())
    return {name: total / math.sqrt(variance) for name, (total, variance) in sums.items()} | {"neighbours": together}
