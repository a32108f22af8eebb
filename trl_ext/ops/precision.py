"""The floating-point types to compute in, and to add up in."""

import torch


def best_dtype(use_cpu: bool = False) -> torch.dtype:
    """bfloat16 on a CUDA card that has it, float16 on an older one (a T4), float32 without a card.

    Args:
        use_cpu: Compute on the CPU though there is a card.
    """
    if use_cpu or not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def sum_dtype(device: torch.device) -> torch.dtype:
    """The type for sums over a batch: float64, float32 on MPS, which has none."""
    return torch.float32 if device.type == "mps" else torch.float64
