"""The scalar head that turns a hidden state into a reward or a value."""

import torch
from torch import nn


class ScalarHead(nn.Module):
    """A linear map from the hidden state to one number: `s = w . h`.

    The weight is kept in float32 whatever the base computes in, because a value or a reward is a regression target: in
    bfloat16 its resolution near 4 is 1/32.

    Args:
        hidden_size (`int`): Width H of the base.
        weight (`Tensor`, *optional*): (1, H), a trained head. Zeros when not given: a fresh critic predicts the mean
            of a normalised reward, and its first update is not spent on unlearning noise.

    Raises:
        ValueError: `weight` is not of shape (1, H).
    """

    def __init__(self, hidden_size: int, weight: torch.Tensor | None = None):
        super().__init__()
        if weight is not None and tuple(weight.shape) != (1, hidden_size):
            raise ValueError(
                f"the scalar head has weight of shape {tuple(weight.shape)}, but the base has hidden size "
                f"{hidden_size}: it needs (1, {hidden_size}). Use an adapter trained on this base with num_labels=1."
            )
        self.weight = nn.Parameter(torch.zeros(1, hidden_size))
        if weight is not None:
            self.weight.data.copy_(weight)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., H) -> (...), float32, outside autocast."""
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden.to(self.weight.dtype), self.weight).squeeze(-1)
