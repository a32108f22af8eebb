"""The floating-point type to compute in."""

from typing import Any

import torch


def best_dtype(use_cpu: bool = False) -> torch.dtype:
    """bfloat16 on a CUDA card that has it, float16 on an older one (a T4), float32 without a card.

    Args:
        use_cpu: Compute on the CPU though there is a card.
    """
    if use_cpu or not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def choose_mixed_precision(args: Any) -> None:
    """Set `bf16` and `fp16` of training arguments to what the card does best, where neither was given.

    TRL's default is bfloat16 everywhere; a T4 has none, and a CPU is slower with it.

    Args:
        args: `TrainingArguments` before their `__post_init__`, their default for `bf16` None.
    """
    if args.bf16 is None:
        dtype = torch.float16 if args.fp16 else best_dtype(args.use_cpu)
        args.bf16, args.fp16 = dtype == torch.bfloat16, dtype == torch.float16
