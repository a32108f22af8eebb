"""What TRL's logs take from a rollout beside its own figures: sample completions, and what reward functions report."""

from typing import TYPE_CHECKING, Any

from accelerate.utils import gather, gather_object
from torch import Tensor

from trl_ext.ppo.rollout import Rollout

if TYPE_CHECKING:
    from trl_ext.ppo.trainer import PPOMaxTrainer


def log_samples(
    trainer: "PPOMaxTrainer", prompts: list[Any], completions: list[Any], per_function: Tensor, rollout: Rollout
) -> None:
    """Fill the table that `log_completions` prints, of all processes."""
    if not trainer.log_completions:
        return
    logs = trainer._logs
    logs["prompt"].extend(gather_object(prompts))
    logs["completion"].extend(gather_object(completions))
    for name, column in zip(trainer.reward_func_names, gather(per_function.contiguous()).T, strict=True):
        logs["rewards"][name].extend(column.tolist())
    logs["rewards"]["total"].extend(gather(rollout.scores).tolist())
    lengths = rollout.completion_mask.sum(1).clamp(min=1)
    logs["advantages"].extend(gather(rollout.advantages.sum(1) / lengths).tolist())


def log_what_functions_report(trainer: "PPOMaxTrainer", count: int) -> None:
    """Hand on what reward functions gave to TRL's `log_extra` (columns of that table) and `log_metric` (means).

    Args:
        trainer: whose functions they are.
        count: number of this process's completions.
    """
    # Sorted over all processes: each must make the same collective calls in the same order.
    for column in sorted(set(gather_object(list(trainer._pending_extra_logs)))):
        cells = trainer._pending_extra_logs.get(column, [None] * count)
        trainer._logs["extra"][column].extend(gather_object(cells))
    for name in sorted(set(gather_object(list(trainer._pending_metrics)))):
        values = gather_object(trainer._pending_metrics.get(name, []))
        trainer.record({name: sum(values) / len(values)})
    trainer._pending_extra_logs.clear()
    trainer._pending_metrics.clear()
