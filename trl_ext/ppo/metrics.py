"""What a run logs. Every figure is over all processes unless it says otherwise."""

import math
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather
from accelerate.utils.memory import clear_device_cache
from torch import Tensor

from trl_ext.ops.masking import masked_mean_var
from trl_ext.ppo.losses import explained_variance
from trl_ext.ppo.rollout import Rollout

if TYPE_CHECKING:
    from trl_ext.ppo.config import PPOMaxConfig


class PhaseTimer:
    """Seconds and tokens of each phase of an iteration, on this process."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.tokens: dict[str, int] = {}
        self.running = "update"  # the phase that is going on: what is neither generated nor scored is the update's
        self._update: tuple[int, float] | None = None

    def add(self, name: str, tokens: int, seconds: float) -> None:
        self.seconds[name], self.tokens[name] = seconds, tokens

    @contextmanager
    def phase(self, name: str, tokens: int = 0) -> Iterator[None]:
        """Time some code. What the last phase cached is given back first: its tensors have other sizes.

        CUDA runs behind, so wait for it at both ends.
        """
        _synchronize()
        clear_device_cache()
        self.running = name
        start = time.perf_counter()
        yield
        _synchronize()
        self.running = "update"
        self.add(name, tokens, time.perf_counter() - start)

    def start_update(self, tokens: int) -> None:
        """The update follows the rollout and ends with its last optimizer step, before an evaluation or a save."""
        _synchronize()
        clear_device_cache()
        self._update = tokens, time.perf_counter()

    def end_update(self) -> None:
        if self._update is not None:
            _synchronize()
            tokens, start = self._update
            self.add("update", tokens, time.perf_counter() - start)
            self._update = None

    def metrics(self) -> dict[str, float]:
        """What was timed since the last call."""
        out = {f"seconds/{name}": seconds for name, seconds in self.seconds.items()}
        for name, seconds in self.seconds.items():
            out[f"tokens_per_second/{name}"] = self.tokens[name] / max(seconds, 1e-9)
        self.seconds.clear()
        return out


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def rollout_metrics(rollout: Rollout, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """KL, rewards, perplexities, lengths, and how well the critic did on one rollout batch."""
    mask = rollout.completion_mask.bool()
    lengths = mask.sum(1)
    count, tokens, truncated, empty, nll, entropy = reduce(
        torch.stack(
            [
                torch.tensor(float(len(mask)), device=mask.device),
                mask.sum().float(),
                rollout.truncated.float().sum(),
                (lengths == 0).float().sum(),
                -torch.where(mask, rollout.logps, 0.0).sum(),
                torch.where(mask, rollout.entropy, 0.0).sum(),
            ]
        )
    ).tolist()
    tokens = max(tokens, 1.0)
    out = {
        "entropy": entropy / tokens,
        "perplexity": math.exp(min(nll / tokens, 50.0)),
        "completions/truncated_ratio": truncated / count,
        "completions/empty": empty,
    }
    every_row = torch.ones_like(rollout.scores, dtype=torch.bool)
    for name, values, where in (
        ("reward", rollout.scores, every_row),
        ("reward_shaped", rollout.shaped_scores, every_row),
        ("value", rollout.values, mask),
        ("return", rollout.returns, mask),
        ("advantage", rollout.advantages, mask),
    ):
        mean, var = masked_mean_var(values, where, reduce)
        out[f"{name}_mean" if name in ("value", "return") else name] = mean.item()
        out[f"{name}_std"] = var.clamp(min=0).sqrt().item()
    del out["advantage"]
    if rollout.uncertainty is not None:
        out["reward_uncertainty"] = masked_mean_var(rollout.uncertainty, every_row, reduce)[0].item()
    explained = explained_variance(rollout.values, rollout.returns, mask, reduce=reduce)
    out["explained_variance"] = explained.item()
    if rollout.reference_logps is not None:
        difference = torch.where(mask, rollout.logps - rollout.reference_logps, 0.0)
        total, reference_nll = reduce(
            torch.stack([difference.sum(), -torch.where(mask, rollout.reference_logps, 0.0).sum()])
        ).tolist()
        out |= {
            "kl": total / count,
            "kl_per_token": total / tokens,
            "perplexity_reference": math.exp(min(reference_nll / tokens, 50.0)),
        }
    return out


def reward_metrics(names: list[str], per_function: Tensor, role_scores: Tensor | None) -> dict[str, float]:
    """Mean and standard deviation of each reward source, over the samples it applies to."""
    columns = dict(zip(names, per_function.T, strict=True))
    if role_scores is not None:
        columns["reward_role"] = role_scores
    out = {}
    for name, column in columns.items():
        values = gather(column.contiguous())
        values = values[~values.isnan()]
        out[f"rewards/{name}/mean"] = values.mean().item() if len(values) else math.nan
        out[f"rewards/{name}/std"] = values.std(unbiased=False).item() if len(values) else math.nan
    return out


def memory_metrics(device: torch.device) -> dict[str, float]:
    """Peak memory of this process so far in GiB: allocated on the card, or resident on a CPU."""
    if device.type == "cuda":
        return {"peak_memory_gib": torch.cuda.max_memory_allocated(device) / 2**30}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}


def average_over_processes(stats: dict[str, Tensor]) -> dict[str, float]:
    """Means of scalars over processes, the largest for names that end in `max`, by one collective call."""
    stacked = torch.stack([value.detach().float() for value in stats.values()])
    rows = gather(stacked.unsqueeze(0))
    means, largest = rows.mean(0).tolist(), rows.amax(0).tolist()
    return {name: largest[i] if name.endswith("max") else means[i] for i, name in enumerate(stats)}


def warn_about_off_policy_sampling(args: "PPOMaxConfig") -> None:
    """Warpers other than the temperature sample from another distribution than the one whose ratio PPO clips."""
    used = {"top_p": args.top_p < 1, "top_k": bool(args.top_k), "min_p": bool(args.min_p)}
    used["repetition_penalty"] = args.repetition_penalty != 1
    names = [name for name, on in used.items() if on]
    if names:
        warnings.warn(
            f"{', '.join(names)} change the distribution that completions are sampled from, but not the "
            "log-probabilities of PPO: the data is off-policy. Only `temperature` is accounted for.",
            stacklevel=3,
        )
