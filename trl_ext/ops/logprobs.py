"""Log-probability and entropy of tokens under a frozen language-model head, without the (N, V) tensor of logits."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# A chunk holds about 8 MiB of float32 logits, but at least so many rows that reading W pays.
CHUNK_ELEMENTS, CHUNK_ROWS = 2**21, 128


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_size: int | None = None,
    with_entropy: bool = True,
    entropy_grad: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each target, and entropy of the distribution that it is drawn from.

        a = logit_scale (W h + b)        z = softcap tanh(a / softcap) / temperature, without a cap a / temperature
        logp = z_y - logsumexp(z)        entropy = -sum_v p_v log p_v        p = softmax(z)

    The head is frozen, so the only gradients are those with respect to `h`: one row for each token. They are known as
    soon as the token's logits are, and are computed beside them, chunk by chunk; backward multiplies each row by the
    incoming gradient, and no logit is kept or computed again. With

        d z_v / d a_v = g_v = (1 - tanh^2(a_v / softcap)) / temperature, without a cap 1 / temperature
        d logp / d z_v = 1[v = y] - p_v        d entropy / d z_v = -p_v (log p_v + entropy)

    the rows are

        d logp / d h = logit_scale sum_v (1[v = y] - p_v) g_v W_v
        d entropy / d h = -logit_scale sum_v p_v (log p_v + entropy) g_v W_v

    Products with W are in its dtype, all else in float32 (float64 for float64 inputs). `hidden` is cast to the dtype
    of `weight`; under autocast both are cast once to its dtype, as a linear layer would. Where nothing needs a
    gradient, no row is computed.

    Args:
        hidden: h, last hidden states, (N, H). Pass only the tokens that count.
        weight: W, weight of the frozen head, (V, H).
        targets: y, token ids in [0, V), (N,), integers.
        bias: b, bias of the frozen head, (V,).
        temperature: positive.
        softcap: bound of the logits (Gemma's `final_logit_softcapping`), positive.
        logit_scale: factor on the logits (Cohere's `logit_scale`).
        chunk_size: tokens in a chunk; by default about 8 MiB of logits, and at least 128.
        with_entropy: False skips the entropy.
        entropy_grad: True lets gradient flow through the entropy too, at the price of a second product with W.

    Returns:
        (logps, entropy), (N,) each, float32 or float64, in nats; entropy is None if not asked for. Its gradient is
        detached unless `entropy_grad`.

    Raises:
        ValueError: a shape or dtype is wrong, a number is out of range, the head requires a gradient, or
            `entropy_grad` is asked for without `with_entropy`.
    """
    _check_inputs(hidden, weight, targets, bias, temperature, softcap, chunk_size)
    if entropy_grad and not with_entropy:
        raise ValueError("entropy_grad needs with_entropy")
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if chunk_size is None:
        chunk_size = max(CHUNK_ROWS, CHUNK_ELEMENTS // weight.shape[0])
    head = _Head(weight, bias, temperature, softcap, logit_scale, chunk_size)
    with torch.autocast(device, enabled=False):
        if hidden.requires_grad and torch.is_grad_enabled():
            return _TokenLogprobs.apply(hidden, targets, head, with_entropy, entropy_grad)
        with torch.no_grad():
            chunks = _forward(hidden, targets, head, with_entropy, logp_rows=False, entropy_rows=False)
        return chunks.logps, chunks.entropy


class _Head(NamedTuple):
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    temperature: float
    softcap: float | None
    logit_scale: float
    chunk_size: int


class _Outputs(NamedTuple):
    logps: Tensor  # (N,)
    entropy: Tensor | None  # (N,)
    logp_rows: Tensor | None  # (N, H), d logps / d hidden
    entropy_rows: Tensor | None  # (N, H), d entropy / d hidden

    def part(self, part: slice) -> "_Outputs":
        return _Outputs(
            self.logps[part],
            None if self.entropy is None else self.entropy[part],
            None if self.logp_rows is None else self.logp_rows[part],
            None if self.entropy_rows is None else self.entropy_rows[part],
        )


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, head: _Head, with_entropy: bool, entropy_grad: bool
    ) -> tuple[Tensor, Tensor | None]:
        outputs = _forward(hidden, targets, head, with_entropy, logp_rows=True, entropy_rows=entropy_grad)
        ctx.save_for_backward(outputs.logp_rows, outputs.entropy_rows)
        if outputs.entropy is not None and not entropy_grad:
            ctx.mark_non_differentiable(outputs.entropy)
        return outputs.logps, outputs.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        logp_rows, entropy_rows = ctx.saved_tensors
        grad = grad_logps.unsqueeze(1) * logp_rows
        if entropy_rows is not None and grad_entropy is not None:
            grad = grad + grad_entropy.unsqueeze(1) * entropy_rows
        return grad.to(logp_rows.dtype), None, None, None, None


def _forward(
    hidden: Tensor, targets: Tensor, head: _Head, with_entropy: bool, logp_rows: bool, entropy_rows: bool
) -> _Outputs:
    """All chunks, each written into its slice of the outputs."""
    statistics_dtype = torch.promote_types(hidden.dtype, torch.float32)
    outputs = _Outputs(
        logps=hidden.new_empty(len(hidden), dtype=statistics_dtype),
        entropy=hidden.new_empty(len(hidden), dtype=statistics_dtype) if with_entropy else None,
        logp_rows=torch.empty_like(hidden) if logp_rows else None,
        entropy_rows=torch.empty_like(hidden) if entropy_rows else None,
    )
    for start in range(0, len(hidden), head.chunk_size):
        part = slice(start, start + head.chunk_size)
        _forward_chunk(hidden[part], targets[part], head, outputs.part(part))
    return outputs


def _forward_chunk(hidden: Tensor, targets: Tensor, head: _Head, out: _Outputs) -> None:
    """One chunk into `out`, in place on two (n, V) buffers, `z` and `p`, and with a softcap on a third, `slope`."""
    targets = targets.unsqueeze(1)
    z = F.linear(hidden, head.weight, head.bias).to(out.logps.dtype)
    if head.logit_scale != 1:
        z.mul_(head.logit_scale)
    slope = None
    if head.softcap is not None:
        z.div_(head.softcap).tanh_()
        slope = z.square().neg_().add_(1) if out.logp_rows is not None else None
        z.mul_(head.softcap)
    if head.temperature != 1:
        z.div_(head.temperature)

    z.sub_(z.amax(dim=1, keepdim=True))
    target_z = z.gather(1, targets)
    p = z.exp() if out.entropy is not None else z.exp_()
    total = p.sum(dim=1, keepdim=True)
    log_total = total.log()
    out.logps.copy_((target_z - log_total).squeeze(1))
    if out.entropy is not None:  # -sum p log p, where p is still to be divided by `total`
        out.entropy.copy_(log_total.squeeze(1) - torch.linalg.vecdot(p, z) / total.squeeze(1))
    if out.logp_rows is None:
        return

    p.div_(total)
    scale = head.logit_scale / head.temperature
    if out.entropy is not None and out.entropy_rows is not None:
        z.add_(out.entropy.unsqueeze(1) - log_total).mul_(p)  # p (log p + entropy)
        _rows(z, slope, head.weight, -scale, out.entropy_rows)
    # The target's 1 - p is formed here, in float32: W_y - p W in the dtype of W would cancel where p_y is near 1.
    p.neg_().scatter_add_(1, targets, torch.ones_like(target_z))
    _rows(p, slope, head.weight, scale, out.logp_rows)


def _rows(grad_z: Tensor, slope: Tensor | None, weight: Tensor, scale: float, out: Tensor) -> None:
    """Takes the gradient with respect to `z`, which it overwrites, to the one with respect to the hidden states."""
    if slope is not None:
        grad_z.mul_(slope)
    torch.mm(grad_z.to(weight.dtype), weight, out=out)
    if scale != 1:
        out.mul_(scale)


def _check_inputs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    chunk_size: int | None,
) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        shapes = f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}"
        raise ValueError(f"hidden must be (N, H) and weight (V, H), got {shapes}")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        wanted = f"int64 of shape {tuple(hidden.shape[:1])}"
        raise ValueError(f"targets must be {wanted}, got {targets.dtype} of shape {tuple(targets.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be {tuple(weight.shape[:1])}, got {tuple(bias.shape)}")
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError("token_logprobs gives the head no gradient: it is for a frozen head (requires_grad=False)")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, or None for no cap, got {softcap}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
