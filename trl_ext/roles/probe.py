"""Try a model on a few tokens, instead of keeping lists of what each architecture can do.

A trial leaves modes, gradients and the random state as they were. A model without numbers in it (on the meta device, or
of fake tensors, as the memory plan makes it) is not tried.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from trl_ext.ops.packing import PackedBatch, in_order, pack
from trl_ext.roles.backbone import hidden_states, packed_hidden_states, takes_positions
from trl_ext.roles.heads import LMHead, possible_heads

# Largest relative difference of hidden states, packed and alone, that is rounding.
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}
# Largest difference of log-probabilities that is rounding, for each unit of 1 + the largest logit.
HEAD_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
# Largest relative difference of hidden states between two equal passes that is the order of sums.
NOISE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
RANDOM_FIELDS = ("drop", "jitter")  # in names of rates of dropout, layer drop and router noise


# ---------------------------------------------------------------------- packing


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


def can_share_prompts(backbone: Any) -> bool:
    """Whether two responses packed after one prompt are computed as if alone; tried out on a few tokens.

    Warns, with the reason, where they are not: the sequences have to be run one by one then.
    """
    reason = _why_not_shared(backbone)
    if reason:
        warnings.warn(
            f"{type(backbone).__name__} cannot compute the responses to a prompt in one sequence: {reason}. Each is "
            "run with its own copy of the prompt, which is slower.",
            stacklevel=2,
        )
    return not reason


def _why_not_shared(backbone: Any) -> str:
    if column_limit(backbone) == 0:
        return "it takes no position ids, or its attention takes no mask (use attn_implementation='sdpa')"
    ids = _trial_ids(backbone)[0].tolist()
    groups = [[[*ids[:4], *ids[4:6]], [*ids[:4], *ids[6:]]]]
    with _trial(backbone, training=False):
        alone = _last_states(backbone, pack(groups, [[4, 4]], 0, share=False))
        try:
            together = _last_states(backbone, pack(groups, [[4, 4]], 0))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model raises for a mask or for positions that it cannot use
            return f"{type(error).__name__}: {_first_line(error)}"
    difference = _relative(together, alone)
    if not difference <= TOLERANCE.get(backbone.dtype, 1e-1):
        return f"packed hidden states differ from separate ones by {difference:.1e}"
    return ""


def _last_states(backbone: Any, parts: list[PackedBatch]) -> Tensor:
    device = backbone.get_input_embeddings().weight.device
    parts = [part.to(device) for part in parts]
    return in_order(parts, [packed_hidden_states(backbone, part)[part.ends] for part in parts]).float()


# ---------------------------------------------------------------------- the LM head


def language_head(base: Any) -> LMHead:
    """The LM head that gives the model's own log-probabilities: found by trying what the configuration may mean.

    Raises:
        TypeError: The base has no LM head.
        ValueError: Tokens see later ones (an encoder), outputs or embeddings are not finite, or no factor and cap give
            the model's log-probabilities: its head does more to a hidden state.
    """
    heads = possible_heads(base)
    if _has_no_numbers(base):
        return heads[0]
    name, ids = base.config.model_type, _trial_ids(base)
    with _trial(base, training=False):
        try:
            expected = base(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0].float()
            hidden, start = (hidden_states(base.base_model, part, torch.ones_like(part)) for part in (ids, ids[:, :4]))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model raises for arguments that it does not know
            raise ValueError(
                f"model type {name!r}: a few tokens, with and without its LM head, end in {type(error).__name__}: "
                f"{_first_line(error)} Use another base."
            ) from error
        _check_finite(base, hidden, expected)
        _check_causal(name, hidden, start)
        layer = heads[0].layer
        raw = F.linear(hidden[0].to(layer.weight.device, layer.weight.dtype), layer.weight, heads[0].bias)
    if raw.shape != expected.shape:
        raise ValueError(f"model type {name!r}: {tuple(expected.shape)} logits, but an LM head of {tuple(raw.shape)}.")
    return _best(name, heads, raw.float(), expected.to(raw.device), base.dtype)


def _best(name: str, heads: list[LMHead], raw: Tensor, expected: Tensor, dtype: torch.dtype) -> LMHead:
    """The first of the heads that is as close as any, up to rounding."""
    size = 1 + float(expected.abs().max())
    expected = expected.log_softmax(-1)
    errors = [float((head.logits(raw).log_softmax(-1) - expected).abs().max()) for head in heads]
    closest, rounding = min(errors), 4 * torch.finfo(dtype).eps * size
    if not closest <= HEAD_TOLERANCE.get(dtype, 2e-2) * size:
        raise ValueError(
            f"model type {name!r}: its log-probabilities are {closest:.2g} nats from those of its last hidden states "
            "and LM head. Its head does more than a matrix product with a bias, a factor and a cap, which is all that "
            "is trained through here. Use another base."
        )
    return next(head for head, error in zip(heads, errors, strict=True) if error <= closest + rounding)


def _check_finite(base: Any, hidden: Tensor, logits: Tensor) -> None:
    rows = base.get_input_embeddings().weight
    finite = bool(hidden.isfinite().all()) and not bool(logits.isnan().any())
    if finite and (not rows.is_floating_point() or bool(rows.sum(-1, dtype=torch.float32).isfinite().all())):
        return
    bad = [name for name, p in base.named_parameters() if p.is_floating_point() and not bool(p.isfinite().all())]
    where = f"{len(bad)} of its weights are NaN or infinite, first {bad[0]!r}" if bad else "none of its weights is"
    raise ValueError(
        f"{base.name_or_path or base.config.model_type}: the base computes NaN or infinity on a few tokens; {where}. "
        "Load sound weights, or another dtype if none is at fault."
    )


def _check_causal(name: str, hidden: Tensor, start: Tensor) -> None:
    difference = _relative(hidden[:, : start.shape[1]].float(), start.float())
    if not difference <= TOLERANCE.get(hidden.dtype, 1e-1):
        raise ValueError(
            f"model type {name!r}: its tokens see later ones (hidden states differ by {difference:.1e} without them). "
            "It is an encoder, or a decoder whose configuration lacks is_decoder=True. Use a causal language model."
        )


# ---------------------------------------------------------------------- dropout


def disable_dropout(model: nn.Module) -> None:
    """Switch off everything random in training: dropout modules, and rates that are attributes of other modules.

    OPT, BioGPT and XGLM keep rates as plain numbers, as do the attentions of Llama and its kin (`attention_dropout`);
    some read them from the configuration. Two passes in train mode must agree afterwards.

    Args:
        model: A `SharedBaseModel`, a `RewardModel` or a model of transformers. Changed in place.

    Raises:
        ValueError: They do not agree.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        _zero_rates(module)
        config = vars(module).get("config")
        if config is not None:
            _zero_rates(config)
    backbone: Any = model.backbone if hasattr(model, "backbone") else getattr(model, "base_model", model)
    if _has_no_numbers(model):
        return
    ids = _trial_ids(backbone)
    with _trial(backbone, training=True):
        first, second = (hidden_states(backbone, ids, torch.ones_like(ids)).float() for _ in range(2))
    difference = _relative(first, second)
    if not difference <= NOISE.get(backbone.dtype, 3e-2):
        config = backbone.config.get_text_config()
        rates = [n for n, v in vars(config).items() if any(word in n for word in RANDOM_FIELDS)]
        raise ValueError(
            f"model type {config.model_type!r}: two passes in train mode differ by {difference:.1e}, because dropout "
            "or other noise is on that disable_dropout does not reach. Set its rates to 0 when the base is loaded, "
            f"as model_init_kwargs={dict.fromkeys(rates, 0.0)!r}, or set disable_dropout=False."
        )


def _zero_rates(holder: Any) -> None:
    for name, value in list(vars(holder).items()):
        if isinstance(value, float) and value > 0 and any(word in name for word in RANDOM_FIELDS):
            setattr(holder, name, 0.0)


# ---------------------------------------------------------------------- trials


@contextmanager
def _trial(model: nn.Module, training: bool) -> Iterator[None]:
    """Inside: no gradients, one mode, random numbers that nobody misses."""
    modes = [(module, module.training) for module in model.modules()]
    weights = [(p, p.data) for p in model.parameters()]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    model.train(training)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, data in weights:
            if parameter.dtype != data.dtype:  # bitsandbytes casts biases in its first pass
                parameter.data = data


def _trial_ids(model: Any) -> Tensor:
    """(1, 8) token ids."""
    ids = [i % model.config.get_text_config().vocab_size for i in range(3, 11)]
    return torch.tensor([ids], device=model.get_input_embeddings().weight.device)


def _has_no_numbers(model: nn.Module) -> bool:
    return any(p.is_meta or isinstance(p.data, FakeTensor) for p in model.parameters())


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
