"""Working memory of a pass: the real code, run on tensors that have shapes and no storage.

A model of the same width and few layers is built on the meta device, its tensors are turned into PyTorch's fake
tensors, and the passes of `SharedBaseModel` run on them while every allocation is counted. Two depths give the share
of a layer, from 2 on, because the first layer alone reads the embeddings. So there is no formula for each
architecture, and what the passes do is what is planned.

What a CPU trace cannot see is added by hand: bitsandbytes' dequantised weights, by a stand-in that copies the weight.
"""

import copy
import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers.pytorch_utils import Conv1D

from trl_ext.memory.weights import Setup, meta_model, quantised_linears, with_roles
from trl_ext.ops.packing import PackedBatch
from trl_ext.roles import Role, SharedBaseModel, disable_dropout

# Batches that are traced; bytes of others lie on the line through these, because tensors are linear in the batch.
TRACED_BATCHES = (1, 8)
PER_LAYER_LISTS = ("layer_types", "attention_layers", "mlp_layer_types")


@dataclass(frozen=True)
class Traced:
    """Bytes beyond the weights. `kept` is what forward leaves for backward, or the KV cache; `peak` includes it."""

    kept: float
    peak: float

    def towards(self, other: "Traced", steps: float) -> "Traced":
        """On the line from this to the other, which is one step away."""
        return Traced(self.kept + steps * (other.kept - self.kept), self.peak + steps * (other.peak - self.peak))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors allocated inside it, now and at most, from when they are made until freed.

    Works on real and on fake tensors.
    """

    def __init__(self, known: Any = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, int] = {t.untyped_storage()._cdata: 0 for t in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._watch, out)
        return out

    def reset_peak(self) -> None:
        self.peak = self.now

    def _watch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            self._known[key] = storage.nbytes()
            self.now += self._known[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self._known.pop(key)


class _Dequantised(torch.autograd.Function):
    """A 4-bit product as bitsandbytes computes it: the weight is dequantised in forward, and again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight.clone().to(x.dtype), bias).clone()  # PEFT clones the output of a 4-bit layer

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return grad @ weight.clone().to(grad.dtype), None, None


def _quantised_forward(layer: Any, x: Tensor) -> Tensor:
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else layer.weight.dtype
    weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
    with torch.autocast(device, enabled=False):
        return _Dequantised.apply(x.to(dtype), weight, None if layer.bias is None else layer.bias.to(dtype)).to(x.dtype)


def shallow_config(config: Any, layers: int) -> Any:
    """The same configuration with fewer layers.

    Raises:
        ValueError: It names no number of layers.
    """
    config = copy.deepcopy(config)
    text = config.get_text_config()
    if not isinstance(getattr(text, "num_hidden_layers", None), int):
        raise ValueError(f"{type(config).__name__} names no num_hidden_layers: this model cannot be planned.")
    for name in PER_LAYER_LISTS:
        values = getattr(text, name, None)
        if isinstance(values, list | tuple):
            setattr(text, name, values[:layers])
    text.num_hidden_layers = layers
    return config


class Tracer:
    """Peaks of the phases of PPO for one model and setup; each trace is made once.

    Args:
        config: Of the model.
        setup: Everything but batch sizes.
    """

    def __init__(self, config: Any, setup: Setup):
        self.config, self.setup = config, setup
        shallow_config(config, 1)  # raises where there are no layers to cut
        self.layers: int = config.get_text_config().num_hidden_layers
        self._models: dict[int, tuple[SharedBaseModel, FakeTensorMode]] = {}
        alternates = len({str(kind) for kind in getattr(config.get_text_config(), "layer_types", None) or []}) > 1
        self.depths = (2, 4) if alternates or hasattr(config, "attention_layers") else (2, 3)
        self._trace_of = cache(self._traced)

    def update(self, batch: int) -> Traced:
        """Policy and critic forward, then backward, of one micro-batch; gradients are not counted."""
        return self._at("update", batch)

    def score(self, batch: int) -> Traced:
        """Policy, reference, critic and reward without gradients."""
        return self._at("score", batch)

    def prefill(self, batch: int) -> Traced:
        """The prompts into the KV cache; `kept` is the cache."""
        return self._at("prefill", batch)

    def decode(self, batch: int) -> Traced:
        """The last token of the completions; `kept` is the full cache."""
        return self._at("decode", batch)

    def _at(self, phase: str, batch: int) -> Traced:
        low, high = TRACED_BATCHES
        if batch in TRACED_BATCHES:
            return self._trace_of(phase, batch)
        first, second = self._trace_of(phase, low), self._trace_of(phase, high)
        return first.towards(second, (batch - low) / (high - low))

    def _traced(self, phase: str, batch: int) -> Traced:
        run = {"update": self._update, "score": self._score, "prefill": self._prefill, "decode": self._decode}[phase]
        depths: tuple[int, ...] = self.depths if self.layers > self.depths[-1] else (self.layers,)
        found = [self._trace(run, batch, depth) for depth in depths]
        if len(found) == 1:
            return found[0]
        return found[0].towards(found[1], (self.layers - depths[0]) / (depths[1] - depths[0]))

    # ------------------------------------------------------------------ phases

    # Each runs a phase and returns the bytes that it keeps.

    def _update(self, model: SharedBaseModel, live: LiveBytes, batch: int) -> int:
        model.train()
        parts, shape = self._parts(batch)
        with self._autocast():
            out = model(parts=parts, roles=(Role.POLICY, Role.CRITIC), shape=shape)
        kept = live.now
        trained = [p for p in model.parameters() if p.requires_grad]
        hooks = [p.register_post_accumulate_grad_hook(_drop_grad) for p in trained]
        try:
            (out["logps"].sum() + out["values"].sum()).backward()
        finally:
            for hook in hooks:
                hook.remove()
        return kept

    @torch.no_grad()
    def _score(self, model: SharedBaseModel, live: LiveBytes, batch: int) -> int:
        model.eval()
        parts, shape = self._parts(batch)
        with self._autocast():
            model(parts=parts, roles=(Role.POLICY, Role.REFERENCE, Role.CRITIC), entropy="values", shape=shape)
        if model.has_role(Role.REWARD):  # past the autocast of the wrapped forward, as the trainer does
            model.score_parts(parts)
        return 0

    def _prefill(self, model: SharedBaseModel, live: LiveBytes, batch: int) -> int:
        return _fill(model, live, batch, self.setup.prompt_length)[0]

    @torch.no_grad()
    def _decode(self, model: SharedBaseModel, live: LiveBytes, batch: int) -> int:
        length = self.setup.prompt_length + self.setup.completion_length
        _, filled = _fill(model, live, batch, length - 1)
        before = live.now
        live.reset_peak()
        ids, mask = _batch(batch, 1)[0], _batch(batch, length)[1]
        with model.role(Role.POLICY):
            base = model.get_base_model()
            out = base(ids, attention_mask=mask, use_cache=True, **{_cache_name(base): filled})
        del out
        return before

    # ------------------------------------------------------------------ machinery

    def _parts(self, batch: int) -> tuple[list[PackedBatch], tuple[int, int]]:
        """A part as `ops.packing.pack` makes it, of sequences that are all as long as they may be; and its shape."""
        completion = self.setup.completion_length
        ids, mask = _batch(batch, self.setup.prompt_length + completion)
        sequence, token = torch.zeros(batch, dtype=torch.long), torch.zeros(batch * completion, dtype=torch.long)
        part = PackedBatch(
            input_ids=ids,
            position_ids=ids,
            attention_mask=mask,
            sequences=sequence,
            ends=sequence,
            **dict.fromkeys(("targets", "sources", "owners", "columns"), token),
        )
        return [part], (batch, completion)

    def _trace(self, run: Callable[[SharedBaseModel, LiveBytes, int], int], batch: int, depth: int) -> Traced:
        model, mode = self._model(depth)
        with _random_state_kept(), mode, LiveBytes([*model.parameters(), *model.buffers()]) as live:
            kept = run(model, live, batch)
        return Traced(kept, live.peak)

    def _model(self, depth: int) -> tuple[SharedBaseModel, FakeTensorMode]:
        if depth not in self._models:
            base = meta_model(shallow_config(self.config, depth), self.setup)
            quantised = list(quantised_linears(base).values()) if self.setup.load_in_4bit else []
            model, mode = with_roles(base, self.setup), FakeTensorMode(allow_non_fake_inputs=True)
            for layer in quantised:
                layer.forward = MethodType(_quantised_forward, layer)
            disable_dropout(model)
            if self.setup.checkpointing:
                model.activation_checkpointing_enable()
            _to_fake(model, mode, self.setup.trained_dtype)
            self._models[depth] = model, mode
        return self._models[depth]

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = self.setup.dtype if self.setup.dtype != torch.float32 else torch.bfloat16
        return torch.autocast("cpu", dtype) if self.setup.autocast else nullcontext()


def _batch(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(rows, columns, dtype=torch.long), torch.ones(rows, columns, dtype=torch.long)


@torch.no_grad()
def _fill(model: SharedBaseModel, live: LiveBytes, batch: int, length: int) -> tuple[int, Any]:
    """A forward pass that fills a KV cache, as `generate` does: (bytes of the cache, the cache)."""
    model.eval()
    ids, mask = _batch(batch, length)
    before = live.now
    with model.role(Role.POLICY):
        base = model.get_base_model()
        cache = getattr(base(ids, attention_mask=mask, use_cache=True, logits_to_keep=1), _cache_name(base))
    return live.now - before, cache


def _cache_name(base: Any) -> str:
    """What a model calls its KV cache, as argument and as output: transformers 5.24 has begun to rename it."""
    return "cache" if "cache" in inspect.signature(base.forward).parameters else "past_key_values"


def _drop_grad(parameter: Tensor) -> None:
    parameter.grad = None


def _to_fake(model: nn.Module, mode: FakeTensorMode, trained_dtype: torch.dtype) -> None:
    """Turn meta tensors into fake CPU tensors, so that passes take the paths of a real device."""
    made: dict[int, Any] = {}

    def fake(tensor: Tensor) -> Any:
        dtype = trained_dtype if tensor.requires_grad else tensor.dtype
        if id(tensor) not in made:
            meta = tensor.detach().to(device="meta", dtype=dtype)
            made[id(tensor)] = FakeTensor(mode, meta, torch.device("cpu"))
        return made[id(tensor)]

    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = nn.Parameter(fake(parameter), requires_grad=parameter.requires_grad)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = fake(buffer)


@contextmanager
def _random_state_kept() -> Iterator[None]:
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)
