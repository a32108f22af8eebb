"""Whether an adapter belongs to a base: the sizes of the layers that it is put on, and a few of the base's own numbers.

Names say little. A local snapshot of the right base has another name, and two fine-tunes of one base may share theirs;
on other weights an adapter computes nonsense without an error. So the adapters written here carry the model type and
some numbers of the base they were trained on, in the metadata of their weights, which plain PEFT does not read. Numbers
are compared as rounded to the coarser of the types that the base was loaded in then and now; quantised weights have
none.
"""

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from trl_ext.roles.adapters import AdapterWeights, BaseRecord
from trl_ext.roles.role import Role

TENSORS, VALUES = 12, 4  # of vectors, and of matrices; numbers of each
WINDOW = 2**18  # the elements from which these are taken: the first ones, which a resized embedding keeps
HALVES = {"bfloat16", "float16"}
LORA_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


@dataclass(frozen=True)
class Base:
    """What a base is, as far as adapters are concerned.

    Attributes:
        name: Hub id or folder.
        hidden_size: H.
        layers: (inputs, outputs) of every linear layer, by name.
        record: Model type, and numbers where the weights are there.
    """

    name: str
    hidden_size: int
    layers: dict[str, tuple[int, int]]
    record: BaseRecord


def describe_base(model: Any, name: str | None = None) -> Base:
    """What a causal language model is, before any adapter is put on it."""
    config = model.config.get_text_config()
    layers = {key: size for key, module in model.named_modules() if (size := _linear_size(module)) is not None}
    return Base(str(name or model.name_or_path or ""), config.hidden_size, layers, record_of(model))


def describe_config(config: Any, name: str, trust_remote_code: bool = False) -> Base:
    """What the base of this configuration is, made without memory for its weights."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return describe_base(model, name)


def _linear_size(module: nn.Module) -> tuple[int, int] | None:
    if isinstance(module, Conv1D):
        return int(module.nx), int(module.nf)
    inputs, outputs = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return (inputs, outputs) if isinstance(inputs, int) and isinstance(outputs, int) else None


def record_of(model: Any) -> BaseRecord:
    """Model type and numbers of a base without adapters."""
    parameters = sorted(model.named_parameters())
    vectors, matrices = ([(n, p) for n, p in parameters if (p.ndim == 1) is flat] for flat in (True, False))
    chosen = [found[i * len(found) // TENSORS] for found in (vectors, matrices) if found for i in range(TENSORS)]
    values, dtypes = {}, {}
    for name, parameter in dict(chosen).items():
        dtype = str(parameter.dtype).removeprefix("torch.")
        if parameter.is_meta or dtype not in HALVES | {"float32"} or not parameter.numel():
            continue
        window = min(parameter.numel(), WINDOW)
        places = torch.tensor([i * window // VALUES + window // (2 * VALUES) for i in range(VALUES)])
        picked = parameter.detach().reshape(-1)[places.to(parameter.device)]
        values[name], dtypes[name] = picked.float().tolist(), dtype
    return BaseRecord(model.config.get_text_config().model_type, values, dtypes)


def check_adapter_fits(adapter: AdapterWeights, base: Base, role: Role, name: str) -> None:
    """Check that an adapter belongs to the base it is to be put on, and to the role.

    Warns where nothing but names tells whether the base is the one that it was trained on, and they differ.

    Raises:
        ValueError: A policy with a head or a reward model without one; a head or a layer of another size, or a layer
            that the base lacks; another model type, or other weights.
    """
    if role is Role.POLICY and adapter.head is not None:
        raise ValueError(
            f"{name}: it has a scalar head, it is the adapter of a reward model (task_type='SEQ_CLS'). Give it as "
            "reward_adapter, and as policy an adapter of a causal language model."
        )
    if role is Role.REWARD and adapter.head is None:
        raise ValueError(f"{name}: it has no scalar head. Train it with task_type='SEQ_CLS' and num_labels=1.")
    other = "It was trained on another base: give an adapter of this one."
    if adapter.head is not None and adapter.head.shape[1] != base.hidden_size:
        raise ValueError(
            f"{name}: its head has hidden size {adapter.head.shape[1]}, the base {base.name} has {base.hidden_size}. "
            + other
        )
    for key, value in (adapter.weights or {}).items():
        match = LORA_KEY.fullmatch(key)
        if match is None or value.ndim != 2:
            continue
        layer, side = match[1], "AB".index(match[2])
        size, own = value.shape[1 - side], base.layers.get(layer)
        if own is None:
            raise ValueError(f"{name}: it does not fit, the base {base.name} has no linear layer {layer!r}. {other}")
        if size != own[side]:
            kind = ("inputs", "outputs")[side]
            raise ValueError(
                f"{name}: it does not fit, {key} has {size} {kind}, {layer!r} of the base {base.name} has {own[side]}. "
                + other
            )
    unknown = not check_same_base(adapter, base.record, name) and bool(base.record.values and adapter.weights)
    trained_on = adapter.config.base_model_name_or_path
    if unknown and trained_on and base.name and short_name(trained_on) != short_name(base.name):
        warnings.warn(
            f"{name}: it was trained on {trained_on!r}, the base is {base.name!r}. Sizes agree; whether the weights do "
            "is not known. On other weights an adapter computes nonsense without an error.",
            stacklevel=3,
        )


def check_same_base(adapter: AdapterWeights, record: BaseRecord, name: str) -> bool:
    """Check an adapter's record of its base against another; whether there were numbers to compare.

    Raises:
        ValueError: Another model type, or other numbers.
    """
    theirs = adapter.trained_on
    if theirs is None:
        return False
    if theirs.model_type != record.model_type:
        raise ValueError(
            f"{name}: it was trained on a base of model type {theirs.model_type!r}, this one is {record.model_type!r}. "
            "Give an adapter of this base."
        )
    common = [key for key in theirs.values if key in record.values]
    differ = [key for key in common if not _same(theirs, record, key)]
    if differ:
        raise ValueError(
            f"{name}: it was trained on other weights: {len(differ)} of {len(common)} tensors of the base are not "
            f"those that it was trained on, first {differ[0]!r}. Give the base that it was trained on, or an adapter "
            "of this one. If it is meant for these weights, load and save it with PEFT, which drops the record."
        )
    return bool(common)


def _same(theirs: BaseRecord, own: BaseRecord, key: str) -> bool:
    dtypes = {theirs.dtypes[key], own.dtypes[key]}
    coarser = next(dtype for dtype in ("bfloat16", "float16", "float32") if dtype in dtypes)
    a, b = (_rounded(record.values[key], coarser) for record in (theirs, own))
    if a.shape != b.shape:
        return False
    return torch.allclose(a, b, rtol=2**-7, atol=1e-6) if dtypes == HALVES else torch.equal(a, b)


def _rounded(values: list[float], dtype: str) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).to(getattr(torch, dtype)).float()


def short_name(name: str) -> str:
    """Last part of a Hub id or folder, in lower case; of a folder of the Hub's cache, that of its id."""
    parts = Path(name).parts
    cached = [part for part in parts if part.startswith("models--")]
    return (cached[-1].split("--")[-1] if cached else parts[-1] if parts else "").lower()
