"""Run a base without its LM head: last hidden states of padded and of packed sequences."""

import inspect
from typing import Any

from torch import Tensor

from trl_ext.ops.packing import PackedBatch


def hidden_states(backbone: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """(B, L), (B, L) -> (B, L, H): last hidden states.

    Positions follow the mask, so that padding on the left does not shift learned position embeddings.
    """
    kwargs: dict[str, Any] = {"attention_mask": attention_mask, "use_cache": False}
    if takes_positions(backbone):
        kwargs["position_ids"] = positions_from_mask(attention_mask)
    return backbone(input_ids=input_ids, **kwargs).last_hidden_state


def packed_hidden_states(backbone: Any, part: PackedBatch) -> Tensor:
    """(b * L, H): last hidden states of a part's tokens, to be picked by its `ends` and `sources`."""
    inputs = part.model_inputs(backbone.dtype)
    if not takes_positions(backbone):
        del inputs["position_ids"]  # each row is one sequence, padded on the right: the model's own positions are these
    return backbone(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)


def takes_positions(backbone: Any) -> bool:
    """Whether a model can be told the position of each token."""
    return "position_ids" in inspect.signature(backbone.forward).parameters


def positions_from_mask(attention_mask: Tensor) -> Tensor:
    """(B, L) mask -> (B, L) positions that start at 0 on each row's first real token, whatever the padding side."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
