"""One matrix product for a LoRA layer instead of three, where the base is float32.

PEFT computes `x W' + s (x A') B'`: three products and two passes over the output. With many tokens and a small matrix
it is cheaper to add the adapter to the weight for the moment, `x (W + s B A)'`, which costs as much as `in * out / (in
+ out)` more tokens would. Only in float32: in bfloat16 the sum would round most of the adapter away.
"""

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn


class _FoldedLinear(torch.autograd.Function):
    """y = x (W + s B A)' + b, with gradients for x, A and B; the folded weight is made again in backward, not kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, a, b)
        ctx.scaling = scaling
        return F.linear(x, torch.addmm(weight, b, a, alpha=scaling), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b = ctx.saved_tensors
        grad_x = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ torch.addmm(weight, b, a, alpha=ctx.scaling)
        if ctx.needs_input_grad[3]:
            # Products with the thin matrix on the left: several times faster on a CPU than their transposes.
            rows, out = x.flatten(0, -2), grad.flatten(0, -2)
            grad_a = (b.T @ out.T).mul_(ctx.scaling) @ rows
            grad_b = ((rows @ a.T).mul_(ctx.scaling).T @ out).T
        return grad_x, None, None, grad_a, grad_b, None


def fold(layer: Any) -> None:
    """Let a plain LoRA layer on a float32 `nn.Linear` choose the folded product where it is cheaper.

    Any other layer is left alone. The result is PEFT's to rounding; its `forward` is still what runs for few tokens,
    under autocast, with dropout, merged adapters or mixed batches, and for reward adapters, whose scores stay bit-equal
    to those of the reward model they were read from.
    """
    base = layer.base_layer if isinstance(layer, LoraLinear) else None
    if type(base) is not nn.Linear or base.weight.dtype != torch.float32:
        return
    if "forward" in vars(layer) or "forward" in vars(base):  # someone else's, as Accelerate's for offloaded weights
        return
    layer.forward = MethodType(_forward, layer)  # bound: a deep copy binds its own


def unfold(layer: Any) -> None:
    """Let a layer compute as PEFT does again, however many tokens there are.

    ZeRO fills its buckets with gradients in the order in which they come, on each process by itself, and sums buckets.
    The folded product gives A's gradient before B's, PEFT's gives B's first. Which one is cheaper hangs on the number
    of tokens: the processes would sum gradients of different weights, and nothing would say so.
    """
    if getattr(vars(layer).get("forward"), "__func__", None) is _forward:
        del layer.forward


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    base, names = layer.base_layer, layer.active_adapters
    name = names[0] if len(names) == 1 else ""
    worthwhile = base.in_features * base.out_features // (base.in_features + base.out_features)
    if (
        args
        or kwargs
        or layer.disable_adapters
        or layer.merged
        or name.startswith("reward")
        or name not in layer.lora_A
        or name in layer.lora_variant
        or x.numel() < worthwhile * base.in_features
        or x.dtype != torch.float32
        or base.weight.dtype != torch.float32
        or base.weight.requires_grad
        or torch.is_autocast_enabled(x.device.type)
        or (layer.training and getattr(layer.lora_dropout[name], "p", 0.0) > 0)
        or layer.lora_A[name].weight.dtype != torch.float32
    ):
        return type(layer).forward(layer, x, *args, **kwargs)
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    return _FoldedLinear.apply(x, base.weight, base.bias, a, b, layer.scaling[name])
