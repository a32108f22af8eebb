"""Mean and standard deviation of everything seen so far, by all processes."""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from trl_ext.ops.precision import sum_dtype


class RunningMoments:
    """Running count, mean and unbiased standard deviation, the same on every process.

    Each batch, of n values with mean m and M = sum((x - m)^2) over all processes, is merged into what was seen before:

        delta = m - mean        mean <- mean + delta n / (count + n)
        M2 <- M2 + M + delta^2 count n / (count + n)        count <- count + n        std = sqrt(M2 / (count - 1))

    Exact: the result is that of one pass over all values, however they were split over batches and processes. A single
    value has no spread: until there are two, `std` is 1. Values that are all equal have `std` 0: whoever divides by it
    must look.

    Source: Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self._m2 = 0.0

    @property
    def std(self) -> float:
        """The unbiased standard deviation of everything seen; 1 until two values have been seen."""
        return math.sqrt(self._m2 / (self.count - 1)) if self.count > 1 else 1.0

    @torch.no_grad()
    def update(self, x: Tensor) -> tuple[float, float]:
        """Adds this process's values and, if torch.distributed is initialised, those of all others.

        A collective call: every process makes it, with its own values only (not gathered ones, which would be counted
        once for each process). Their numbers may differ, and be 0 on some.

        Args:
            x: values, any shape, on the device that the process group reduces on.

        Returns:
            (mean, std) of everything seen, this batch included.

        Raises:
            ValueError: a value is NaN or infinite, or no process has a value; raised on every process, and nothing is
                added.
        """
        x = x.detach().flatten().to(sum_dtype(x.device))
        bad = (~x.isfinite()).nonzero().flatten().tolist()
        total = _sum_over_processes(torch.stack([x.new_tensor(x.numel()), x.sum(), x.new_tensor(len(bad))]))
        n, batch_sum, all_bad = total.tolist()
        if bad:
            raise ValueError(f"values at index {', '.join(map(str, bad))} are not finite: {x[bad].tolist()}")
        if all_bad:
            raise ValueError(f"{int(all_bad)} values of other processes are not finite")
        if n == 0:
            raise ValueError("there are no values to update the running moments with")

        batch_mean = batch_sum / n
        batch_m2 = _sum_over_processes((x - batch_mean).square().sum()).item()
        count = self.count + int(n)
        delta = batch_mean - self.mean
        self.mean += delta * n / count
        self._m2 += batch_m2 + delta * delta * self.count * n / count
        self.count = count
        return self.mean, self.std

    def state_dict(self) -> dict[str, float]:
        """Plain numbers, fit for JSON."""
        return {"count": self.count, "mean": self.mean, "m2": self._m2}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continues from what `state_dict` returned."""
        self.count, self.mean, self._m2 = int(state["count"]), float(state["mean"]), float(state["m2"])


def _sum_over_processes(x: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(x)
    return x
