"""What a run leaves behind: figures, sample completions, and words for a card that was too small.

Every figure is over all processes unless it says otherwise.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather, gather_object
from accelerate.utils.memory import clear_device_cache
from torch import Tensor

from trl_ext.ops.masking import masked_mean_var
from trl_ext.ppo.losses import explained_variance
from trl_ext.ppo.rollout import Rollout
from trl_ext.report.machine import peak_memory_gib
from trl_ext.report.recorder import RunRecorder
from trl_ext.roles import Role
from trl_ext.runs import last_checkpoint

REMEDIES = {
    "generate": "per_device_generate_batch_size (now {generate}), or max_completion_length",
    "score": "per_device_score_batch_size (now {score})",
    "update": "per_device_train_batch_size (now {train}; raise gradient_accumulation_steps and steps_per_generation as "
    "much, so that learning does not change), or set gradient_checkpointing: true",
    "evaluation": "per_device_eval_batch_size (now {eval})",
}


class PhaseTimer:
    """Seconds and tokens of each phase of an iteration, on this process; `tokens` are filled in by who knows them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.tokens: dict[str, int] = {}
        self.running = "update"  # the phase that is going on: what is neither generated nor scored is the update's
        self._update: tuple[int, float] | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
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
        self.seconds[name] = time.perf_counter() - start

    def start_update(self, tokens: int) -> None:
        """The update follows the rollout and ends with its last optimizer step, before an evaluation or a save."""
        _synchronize()
        clear_device_cache()
        self._update = tokens, time.perf_counter()

    def end_update(self) -> None:
        if self._update is not None:
            _synchronize()
            tokens, start = self._update
            self.tokens["update"], self.seconds["update"] = tokens, time.perf_counter() - start
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
    mask = rollout.actions
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
    out["explained_variance/monte_carlo"] = rollout.explained
    out["baseline_is_critic"] = float(rollout.baseline_is_critic)
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


def step_metrics(ended: dict[Role, dict[str, float]]) -> dict[str, float]:
    """How far each role moved in an update, under the names of the log."""
    out = {}
    for role, stats in ended.items():
        if stats:
            out["update_kl" if role is Role.POLICY else f"update_distance/{role.value}"] = stats["distance"]
            out |= {f"step/{name}/{role.value}": stats[name] for name in ("scale", "steps", "shortened")}
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
    """Peak memory of this process so far, GiB."""
    return {"peak_memory_gib": peak_memory_gib(device)}


def average_over_processes(stats: dict[str, Tensor]) -> dict[str, float]:
    """Means of scalars over processes, the largest for names that end in `max`, by one collective call."""
    stacked = torch.stack([value.detach().float() for value in stats.values()])
    rows = gather(stacked.unsqueeze(0))
    means, largest = rows.mean(0).tolist(), rows.amax(0).tolist()
    return {name: largest[i] if name.endswith("max") else means[i] for i, name in enumerate(stats)}


# ---------------------------------------------------------------------- samples, and what reward functions report


def log_samples(logs: dict[str, Any], names: Sequence[str], rollout: Rollout) -> None:
    """Fill the table that `log_completions` prints, of all processes.

    Args:
        logs: TRL's columns.
        names: Of the reward functions.
        rollout: With its advantages.
    """
    logs["prompt"].extend(gather_object(rollout.prompts))
    logs["completion"].extend(gather_object(rollout.completions))
    for name, column in zip(names, gather(rollout.per_function.contiguous()).T, strict=True):
        logs["rewards"][name].extend(column.tolist())
    logs["rewards"]["total"].extend(gather(rollout.scores).tolist())
    lengths = rollout.actions.sum(1).clamp(min=1)
    logs["advantages"].extend(gather(rollout.advantages.sum(1) / lengths).tolist())


def keep_samples(
    recorder: RunRecorder, names: Sequence[str], rollout: Rollout, args: Any, step: int | None = None
) -> None:
    """Give the samples of a rollout to what writes the run down: of an evaluation all, of all processes; else a few.

    Args:
        names: Of the reward functions.
        args: `PPOMaxConfig`.
        step: Optimizer steps so far; None: it is a part of an evaluation.
    """
    if step is None:
        recorder.evaluated(gather_object(sample_rows(names, rollout, range(len(rollout.prompts)))))
    else:
        count = len(rollout.prompts)
        recorder.sampled(lambda rows: sample_rows(names, rollout, rows), count, step, args.steps_per_update)


def sample_rows(names: Sequence[str], rollout: Rollout, rows: Sequence[int]) -> list[dict[str, Any]]:
    """Prompt, completion and figures of some of this process's completions; sums are over the tokens, in nats."""
    mask = rollout.actions
    columns = {"reward": rollout.scores, "tokens": mask.sum(1), "nll": -torch.where(mask, rollout.logps, 0.0).sum(1)}
    if rollout.reference_logps is not None:
        columns["reference_nll"] = -torch.where(mask, rollout.reference_logps, 0.0).sum(1)
        columns["kl"] = columns["reference_nll"] - columns["nll"]
    sources = dict(zip(names, rollout.per_function.T, strict=True))
    if rollout.role_scores is not None:
        sources["reward_role"] = rollout.role_scores
    figures = {name: column.tolist() for name, column in columns.items()}
    rewards = {name: column.tolist() for name, column in sources.items()}
    truncated = rollout.truncated.tolist()
    return [
        {
            "prompt": rollout.prompts[i],
            "completion": rollout.completions[i],
            **{name: values[i] for name, values in figures.items()},
            "truncated": truncated[i],
            "rewards": {name: values[i] for name, values in rewards.items()},
        }
        for i in rows
    ]


def take_reports(
    columns: dict[str, list[Any]], metrics: dict[str, list[float]], count: int
) -> tuple[dict[str, list[Any]], dict[str, float]]:
    """What reward functions gave to TRL's `log_extra` and `log_metric`, of all processes; both are emptied.

    Args:
        columns: Cells of the table of completions.
        metrics: Values of which the mean is logged.
        count: Number of this process's completions.
    """
    # Sorted over all processes: each must make the same collective calls in the same order.
    cells = {}
    for name in sorted(set(gather_object(list(columns)))):
        cells[name] = gather_object(columns.get(name, [None] * count))
    means = {}
    for name in sorted(set(gather_object(list(metrics)))):
        values = gather_object(metrics.get(name, []))
        means[name] = sum(values) / len(values)
    columns.clear()
    metrics.clear()
    return cells, means


# ---------------------------------------------------------------------- out of memory


@contextmanager
def explained_out_of_memory(args: Any, where: Callable[[], tuple[str, int]], plan: Any = None) -> Iterator[None]:
    """Inside the block an error for want of memory says in which phase, and which option to lower.

    Args:
        args: `PPOMaxConfig`.
        where: Gives the phase that is going on, one of `REMEDIES`, and the optimizer step.
        plan: `memory.MemoryPlan` of the run, for its figure beside.

    Raises:
        RuntimeError: In place of `torch.OutOfMemoryError`.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        phase, step = where()
        rows = args.per_device_train_batch_size * (args.steps_per_generation or 1)
        batches = {
            "generate": args.per_device_generate_batch_size or rows,
            "score": args.scored_at_a_time,
            "train": args.per_device_train_batch_size,
            "eval": args.per_device_eval_batch_size,
        }
        planned = ""
        if plan is not None and phase in plan.phases:
            planned = f" The plan says {plan.phases[phase].allocated / 2**30:.2f} GiB for it."
        raise RuntimeError(
            f"out of memory at step {step}, in the phase {phase}.{planned} Lower "
            f"{REMEDIES[phase].format(**batches)}. {last_checkpoint(args.output_dir)} trl-ext plan-memory shows "
            f"what fits, and --auto_batch chooses it. PyTorch says: {error}"
        ) from error
