"""What to do about a card that turns out too small in the middle of a run."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from trl_ext.runs import last_checkpoint

if TYPE_CHECKING:
    from trl_ext.ppo.trainer import PPOMaxTrainer

REMEDIES = {
    "generate": "per_device_generate_batch_size (now {generate}), or max_completion_length",
    "score": "per_device_score_batch_size (now {score})",
    "update": "per_device_train_batch_size (now {train}; raise gradient_accumulation_steps and steps_per_generation as "
    "much, so that learning does not change), or set gradient_checkpointing: true",
    "evaluation": "per_device_eval_batch_size (now {eval})",
}


@contextmanager
def explained_out_of_memory(trainer: "PPOMaxTrainer", plan: Any = None) -> Iterator[None]:
    """`with explained_out_of_memory(trainer): trainer.train()`: the error says which phase, and which option to lower.

    Args:
        trainer: Whose run it is.
        plan: `memory.MemoryPlan` of the run, for its figure beside.

    Raises:
        RuntimeError: In place of `torch.OutOfMemoryError`.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        args = trainer.args
        phase = trainer.timer.running if trainer.model.training else "evaluation"
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
            f"out of memory at step {trainer.state.global_step}, in the phase {phase}.{planned} Lower "
            f"{REMEDIES[phase].format(**batches)}. {last_checkpoint(args.output_dir)} recipes/plan_memory.py shows "
            f"what fits, and --auto_batch chooses it. PyTorch says: {error}"
        ) from error
