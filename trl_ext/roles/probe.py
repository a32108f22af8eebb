"""Try a model on a few tokens, instead of keeping lists of what each architecture can do."""

import warnings
from typing import Any

import torch
from torch import Tensor

from trl_ext.ops.packing import PackedBatch, in_order, pack
from trl_ext.roles.passes import packed_hidden_states, takes_positions

# Largest relative difference of hidden states, packed and alone, that is rounding.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}


def column_limit(backbone: Any) -> int | None:
    """The widest packed row of models that see a bounded past (sliding windows, GPT-Neo's buffer), else None.

    A packed row is wider than its sequences. Its mask replaces the model's own window, or the model counts its window
    in columns; both are harmless while the whole row fits into the window. 0 stands for models that take no positions,
    or whose attention takes no mask of its own (flash attention).
    """
    config = backbone.config.get_text_config()
    if not takes_positions(backbone) or config._attn_implementation not in ("eager", "sdpa"):
        return 0
    limits = [b.shape[-1] for name, b in backbone.named_buffers() if name.endswith(".bias") and b.ndim == 4]
    if getattr(config, "use_sliding_window", True):
        limits.append(getattr(config, "sliding_window", None))
    limits.append(getattr(config, "attention_chunk_size", None))
    if "local" in getattr(config, "attention_layers", []):
        limits.append(config.window_size)
    return min((limit for limit in limits if limit), default=None)


@torch.no_grad()
def can_share_prompts(backbone: Any) -> bool:
    """Whether two responses packed after one prompt are computed as if alone; tried out on a few tokens.

    Warns, with the reason, where they are not: the sequences have to be run one by one then.
    """
    reason = ""
    if column_limit(backbone) == 0:
        reason = "it takes no position ids, or its attention takes no mask (use attn_implementation='sdpa')"
    else:
        ids = [i % backbone.config.get_text_config().vocab_size for i in range(3, 11)]
        groups = [[[*ids[:4], *ids[4:6]], [*ids[:4], *ids[6:]]]]
        was_training, device = backbone.training, backbone.get_input_embeddings().weight.device
        backbone.eval()
        together, alone = (_last_states(backbone, pack(groups, [[4, 4]], 0, share=on), device) for on in (True, False))
        backbone.train(was_training)
        error = float((together - alone).norm() / alone.norm())
        if not error <= TOLERANCE.get(backbone.dtype, 1e-1):
            reason = f"packed hidden states differ from separate ones by {error:.1e}"
    if reason:
        warnings.warn(
            f"{type(backbone).__name__} cannot compute the responses to a prompt in one sequence: {reason}. Each is "
            "run with its own copy of the prompt, which is slower.",
            stacklevel=3,
        )
    return not reason


def _last_states(backbone: Any, parts: list[PackedBatch], device: torch.device) -> Tensor:
    parts = [part.to(device) for part in parts]
    return in_order(parts, [packed_hidden_states(backbone, part)[part.ends] for part in parts]).float()
