"""Statistics over the tokens that count.

A mask is 1 (or True) where a token counts. Whatever stands at the other positions, NaN and infinity included, changes
neither a value nor a gradient: it is replaced (`torch.where`), never multiplied by zero.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from trl_ext.ops.precision import sum_dtype

WHITEN_EPS = 1e-8


def check_same_shape(**tensors: Tensor) -> None:
    """Raises ValueError, naming every tensor and its shape, unless all shapes are equal."""
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"these tensors must have the same shape: {shapes}")


def masked_mean(x: Tensor, mask: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """The mean of `x` where `mask` is 1; 0 where nothing is.

    Args:
        x: values, any shape.
        mask: 1 where a value counts, same shape.
        dim: dimensions to reduce, all of them by default.

    Returns:
        The mean over `dim`.

    Raises:
        ValueError: the shapes differ.
    """
    check_same_shape(x=x, mask=mask)
    mask = mask.bool()
    return torch.where(mask, x, 0).sum(dim) / mask.sum(dim).clamp(min=1)


def masked_mean_var(x: Tensor, mask: Tensor, reduce: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of `x` where `mask` is 1, over all processes if `reduce` is given; 0 where nothing is.

        mean = sum(x) / n        var = sum((x - mean)^2) / n

    In two passes and in float64 (float32 on MPS): E[x^2] - E[x]^2 loses every digit when the mean is large beside the
    spread.

    Args:
        x: values, any shape.
        mask: 1 where a value counts, same shape.
        reduce: returns the sum over all processes of the small tensor it is given, for instance
            `functools.partial(accelerator.reduce, reduction="sum")`. It is called exactly twice, on every process,
            also on one whose mask is empty.

    Returns:
        (mean, var), scalars of `precision.sum_dtype`.

    Raises:
        ValueError: the shapes differ.
    """
    check_same_shape(x=x, mask=mask)
    mask = mask.bool()
    dtype = sum_dtype(x.device)
    x = torch.where(mask, x, 0).to(dtype)
    total = torch.stack([x.sum(), mask.sum().to(dtype)])
    if reduce is not None:
        total = reduce(total)
    count = total[1].clamp(min=1)
    mean = total[0] / count
    squares = torch.where(mask, x - mean, 0).square().sum().reshape(1)
    if reduce is not None:
        squares = reduce(squares)
    return mean, squares[0] / count


def masked_whiten(
    x: Tensor, mask: Tensor, shift_mean: bool = True, *, reduce: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """`x` scaled to variance 1, and shifted to mean 0, over the positions where `mask` is 1; 0 elsewhere.

        (x - mean) / sqrt(var + 1e-8)        + mean, if `shift_mean` is False

    with the biased variance (divided by n). Values that are all equal whiten to 0.

    Source: advantage normalisation, arXiv 2307.04964, section 5.3; the constants are those of N+ (arXiv 2403.17031).

    Args:
        x: values, any shape.
        mask: 1 where a value counts, same shape.
        shift_mean: False keeps the mean where it was.
        reduce: sums a small tensor over all processes (see `masked_mean_var`), so that mean and variance are those
            of the batch over all of them.

    Returns:
        The whitened values, shape and dtype of `x`.

    Raises:
        ValueError: the shapes differ, or `x` is not a floating point tensor.
    """
    if not x.is_floating_point():
        raise ValueError(f"only floating point values can be whitened, x is {x.dtype}")
    mean, var = masked_mean_var(x, mask, reduce)
    mask = mask.bool()
    whitened = (torch.where(mask, x, 0).to(mean.dtype) - mean) * torch.rsqrt(var + WHITEN_EPS)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, 0).to(x.dtype)
