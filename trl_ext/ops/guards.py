"""What stops a run before it goes wrong without a word."""

import math
from pathlib import Path

import torch
from torch import Tensor

FIRST_KL_TOLERANCE = 1e-6


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
    checkpoints = sorted(Path(output_dir).glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
    last = f"The last good checkpoint is {checkpoints[-1]}." if checkpoints else "There is no checkpoint yet."
    raise RuntimeError(
        f"non-finite {what} at step {step}: {bad}. The weights have not been changed by it. {last} Lower its "
        "learning rate, or compute in float32 or bfloat16 instead of float16."
    )


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
