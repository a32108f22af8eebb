"""One score from several reward models."""

import math
from collections.abc import Sequence

from torch import Tensor, tensor

ENSEMBLE_MODES = ("mean", "min", "variance")


def check_weights(weights: Sequence[float] | None, mode: str, count: int | None = None) -> None:
    """Check the weights of an ensemble.

    Args:
        weights: One for each reward model; None: all the same.
        mode: How scores are combined.
        count: Of reward models, where it is known.

    Raises:
        ValueError: A weight that is none, all of them 0, not one for each model, or weights of "min".
    """
    if weights is None:
        return
    if not all(math.isfinite(w) and w >= 0 for w in weights) or not sum(weights) > 0:
        raise ValueError(f"ensemble weights {list(weights)} must be numbers of at least 0, one of them above 0.")
    if mode == "min":
        raise ValueError("the worst case of an ensemble ('min') has no weights: leave them out, or choose 'mean'.")
    if count is not None and len(weights) != count:
        raise ValueError(f"{len(weights)} ensemble weights for {count} reward models: give one for each.")


def combine_scores(
    scores: Tensor, mode: str = "mean", coef: float = 0.5, weights: Sequence[float] | None = None
) -> tuple[Tensor, Tensor]:
    """One score for a response from those of K reward models, and how much they disagree.

        mean: mean_k s_k        min: min_k s_k (worst case)        variance: mean_k s_k - coef var_k s_k

    Variance and disagreement are those of the K models themselves, divided by K. With weights w_k, as of a helpful and
    a harmless model, mean_k x_k is sum_k w_k x_k / sum_k w_k, in the variance too.

    Source: Coste et al. 2023, "Reward Model Ensembles Help Mitigate Overoptimization" (arXiv 2310.02743), equations 2
    (worst-case) and 3 (uncertainty-weighted).

    Args:
        scores: s, (B, K), a column for each model.
        mode: "mean", "min" or "variance".
        coef: lambda of "variance", at least 0.
        weights: w, (K,); see `check_weights`. Default: all the same.

    Returns:
        Score (B,) and standard deviation over the models (B,), 0 where K is 1.

    Raises:
        ValueError: scores are not (B, K) with K of at least 1, an unknown mode, a negative coefficient, or
            weights that are none.
    """
    if scores.ndim != 2 or scores.shape[1] < 1:
        raise ValueError(f"scores must be (B, K) with at least one reward model, got {tuple(scores.shape)}")
    if mode not in ENSEMBLE_MODES:
        raise ValueError(f"unknown ensemble mode {mode!r}; choose one of {', '.join(ENSEMBLE_MODES)}")
    if not (math.isfinite(coef) and coef >= 0):
        raise ValueError(f"coef must be a number of at least 0, got {coef}")
    check_weights(weights, mode, scores.shape[1])
    if weights is None:
        mean, variance = scores.mean(dim=1), scores.var(dim=1, unbiased=False)
    else:
        share = tensor([w / sum(weights) for w in weights], dtype=scores.dtype, device=scores.device)
        mean = scores @ share
        variance = (scores - mean[:, None]).square() @ share
    if mode == "min":
        return scores.amin(dim=1), variance.sqrt()
    return mean - (coef * variance if mode == "variance" else 0), variance.sqrt()
