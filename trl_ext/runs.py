"""What all trainers ask of a run: its precision, and that it stops before it goes wrong without a word."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trl_ext.ops.precision import best_dtype

FIRST_KL_TOLERANCE = 1e-6


BF16_HELP = "Compute in bfloat16. Default, with fp16 unset too: what the card can do, else float16; float32 on a CPU."


def choose_mixed_precision(args: Any) -> None:
    """Set `bf16` and `fp16` of training arguments to what the card does best, where neither was given.

    TRL's default is bfloat16 everywhere; a T4 has none, and a CPU is slower with it.

    Args:
        args: `TrainingArguments` before their `__post_init__`, their default for `bf16` None.
    """
    if args.bf16 is None:
        dtype = torch.float16 if args.fp16 else best_dtype(args.use_cpu)
        args.bf16, args.fp16 = dtype == torch.bfloat16, dtype == torch.float16


def check_not_sharded(accelerator: Any) -> None:
    """The base is whole on every process: how many passes a batch takes depends on the lengths of its sequences.

    Args:
        accelerator: `Accelerator`.

    Raises:
        ValueError: FSDP or ZeRO stage 3, whose processes gather weights at every pass and would wait for each other.
    """
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if accelerator.distributed_type == "FSDP" or (plugin is not None and plugin.zero_stage == 3):
        raise ValueError(
            "FSDP and DeepSpeed stage 3 split the base over the processes, which would wait for each other forever: "
            "they take different numbers of passes. Use data parallelism (accelerate launch --multi_gpu) or stage 2."
        )


def check_finite(what: str, terms: dict[str, Tensor], step: int, output_dir: str) -> None:
    """Stop before a non-finite loss or gradient reaches the weights.

    Args:
        what: what the terms are, for the error: "loss", "gradient norm".
        terms: scalars by name.
        step: optimizer steps that were taken.
        output_dir: where the run's checkpoints lie.

    Raises:
        RuntimeError: What it is, the step, the terms with their values, and the last checkpoint.
    """
    values = dict(zip(terms, torch.stack([t.detach().float() for t in terms.values()]).tolist(), strict=True))
    bad = {name: value for name, value in values.items() if not math.isfinite(value)}
    if not bad:
        return
    raise RuntimeError(
        f"non-finite {what} at step {step}: {bad}. The weights have not been changed by it. "
        f"{last_checkpoint(output_dir)} Lower the learning rate (in PPO that of the role), or compute in float32 or "
        "bfloat16 instead of float16."
    )


def last_checkpoint(output_dir: str | None) -> str:
    """A sentence about the checkpoint that a stopped run can go on from."""
    checkpoints = sorted(Path(str(output_dir)).glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
    return f"The last good checkpoint is {checkpoints[-1]}." if checkpoints else "There is no checkpoint yet."


def check_first_kl(logps: Tensor, reference_logps: Tensor) -> None:
    """Before the first update the policy is the reference; if not, the KL is anchored somewhere else.

    Args:
        logps, reference_logps: log-probabilities of the same tokens, of one shape.

    Raises:
        RuntimeError: They differ.
    """
    worst = float((logps - reference_logps).detach().abs().max())
    if worst > FIRST_KL_TOLERANCE:
        raise RuntimeError(
            f"before the first update the policy's log-probabilities differ from the reference's by up to {worst}: the "
            "KL would be measured from another model. Is dropout on (disable_dropout=False), or was the policy changed "
            "after the SharedBaseModel was made?"
        )
