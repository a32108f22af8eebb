"""One score from several reward models."""

import math

from torch import Tensor

ENSEMBLE_MODES = ("mean", "min", "variance")


def combine_scores(scores: Tensor, mode: str = "mean", coef: float = 0.5) -> tuple[Tensor, Tensor]:
    """One score for a response from those of K reward models, and how much they disagree.

        mean: mean_k s_k        min: min_k s_k (worst case)        variance: mean_k s_k - coef var_k s_k

    Variance and disagreement are those of the K models themselves, divided by K.

    Source: Coste et al. 2023, "Reward Model Ensembles Help Mitigate Overoptimization" (arXiv 2310.02743), equations 2
    (worst-case) and 3 (uncertainty-weighted).

    Args:
        scores: s, (B, K), a column for each model.
        mode: "mean", "min" or "variance".
        coef: lambda of "variance", at least 0.

    Returns:
        Score (B,) and standard deviation over the models (B,), 0 where K is 1.

    Raises:
        ValueError: scores are not (B, K) with K of at least 1, an unknown mode, or a negative coefficient.
    """
    if scores.ndim != 2 or scores.shape[1] < 1:
        raise ValueError(f"scores must be (B, K) with at least one reward model, got {tuple(scores.shape)}")
    if mode not in ENSEMBLE_MODES:
        raise ValueError(f"unknown ensemble mode {mode!r}; choose one of {', '.join(ENSEMBLE_MODES)}")
    if not (math.isfinite(coef) and coef >= 0):
        raise ValueError(f"coef must be a number of at least 0, got {coef}")
    variance = scores.var(dim=1, unbiased=False)
    if mode == "min":
        return scores.amin(dim=1), variance.sqrt()
    return scores.mean(dim=1) - (coef * variance if mode == "variance" else 0), variance.sqrt()
