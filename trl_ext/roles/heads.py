"""What turns a hidden state into something: the scalar head into a reward or a value, the LM head into a token."""

from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from trl_ext.ops.logprobs import token_logprobs
from trl_ext.roles.sharding import with_weights


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

    def __init__(self, hidden_size: int, weight: Tensor | None = None):
        super().__init__()
        if weight is not None and tuple(weight.shape) != (1, hidden_size):
            raise ValueError(
                f"the scalar head has weight of shape {tuple(weight.shape)}, but the base has hidden size "
                f"{hidden_size}: it needs (1, {hidden_size}). Use an adapter trained on this base with num_labels=1."
            )
        self.weight = nn.Parameter(torch.zeros(1, hidden_size))
        if weight is not None:
            self.weight.data.copy_(weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., H) -> (...), float32, outside autocast."""
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden.to(self.weight.dtype), self.weight).squeeze(-1)


@dataclass(frozen=True)
class LMHead:
    """The base's frozen language-model head, and what its architecture does to `W h + b`.

        a = factor (W h + b)        logits = cap tanh(a / cap), without a cap a

    Attributes:
        layer: The base's own linear layer, so that its weight is always where the base is.
        factor: On the logits: of Cohere, Granite and others.
        cap: Bound of the logits (Gemma 2), or None.
    """

    layer: Any
    factor: float = 1.0
    cap: float | None = None

    @property
    def weight(self) -> Tensor:
        """(V, H)."""
        return self.layer.weight

    @property
    def bias(self) -> Tensor | None:
        """(V,), or None."""
        return getattr(self.layer, "bias", None)

    def logits(self, products: Tensor) -> Tensor:
        """`W h + b` -> logits, both (..., V)."""
        a = products * self.factor
        return a if self.cap is None else self.cap * (a / self.cap).tanh()

    def logprobs(
        self,
        hidden: Tensor,
        targets: Tensor,
        temperature: float = 1.0,
        with_entropy: bool = False,
        entropy_grad: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probability of each target, and the entropy if asked: `ops.token_logprobs` under this head.

        Args:
            hidden: (N, H), last hidden states.
            targets: (N,) int64.
            temperature: Divides the logits.
            with_entropy: Return the entropy too.
            entropy_grad: Let gradient flow through it.

        Returns:
            (logps, entropy), (N,) each, in nats, on the device of the head; entropy is None if not asked for.
        """

        def logprobs(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
            return token_logprobs(
                hidden.to(self.weight.device),
                self.weight,
                targets.to(self.weight.device),
                bias=self.bias,
                temperature=temperature,
                softcap=self.cap,
                logit_scale=self.factor,
                with_entropy=with_entropy,
                entropy_grad=entropy_grad,
            )

        return with_weights(self.layer, logprobs, hidden, targets)


def possible_heads(base: Any) -> list[LMHead]:
    """The base's LM head with every factor and cap that its configuration may mean, the likeliest first.

    Numbers go by names such as `logit_scale`, `logits_scaling`, `lm_head_multiplier`, `final_logit_softcapping`. What a
    name means differs: by `logits_scaling` Granite divides and HyperCLOVA X multiplies. `probe.language_head` tries.

    Raises:
        TypeError: The base has no LM head.
    """
    layer = base.get_output_embeddings()
    if layer is None:
        raise TypeError(f"the base must be a causal language model, {type(base).__name__} has no LM head.")
    config = base.config.get_text_config()
    computed = (name for name in dir(type(config)) if isinstance(getattr(type(config), name), property))
    words = ("logit", "lm_head", "output_multiplier")
    named: dict[str, float] = {}
    for name in (name for name in (*vars(config), *computed) if any(word in name for word in words)):
        value = getattr(config, name)
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 0 and "router" not in name:
            named[name] = float(value)
    caps = {name: value for name, value in named.items() if "cap" in name}
    factors = {name: value for name, value in named.items() if name not in caps and "keep" not in name}
    likely = 1.0
    for name, value in factors.items():
        likely *= 1 / value if name == "logits_scaling" else value
    output_caps = [value for name, value in caps.items() if "attn" not in name]
    tried = [likely, 1.0, *factors.values(), *(1 / value for value in factors.values())]
    return [
        LMHead(layer, factor, cap)
        for factor, cap in product(dict.fromkeys(tried), dict.fromkeys([*output_caps, None, *caps.values()]))
    ]
