"""Roles on disk and on the Hub: every adapter a standard PEFT folder."""

import copy
import hashlib
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import HfApi
from peft import get_peft_model_state_dict
from torch import Tensor

from trl_ext.roles.adapters import (
    CONFIG_FILE,
    HEAD_KEY,
    SCALING_FIELDS,
    AdapterWeights,
    check_equal,
    check_same_scaling,
    read_adapter,
    write_adapter,
)
from trl_ext.roles.identity import check_same_base
from trl_ext.roles.role import Role
from trl_ext.roles.sharding import is_sharded, shared_out, whole_weights
from trl_ext.roles.switch import SwitchedModel


def adapter_weights(model: SwitchedModel, name: str, state_dict: dict[str, Tensor] | None = None) -> AdapterWeights:
    """An adapter of the model as it is now, by name; of a sharded model every process must ask.

    Args:
        model: Has an adapter of this name.
        name: Of the adapter.
        state_dict: The model's, if an engine has gathered it already.
    """
    if state_dict is None and is_sharded(model):
        state_dict = whole_weights(model, lambda parameter: model.owner(parameter) is not None)
    weights = get_peft_model_state_dict(model, state_dict, adapter_name=name, save_embedding_layers=False)
    head = None
    if name in model.heads:
        key = f"heads.{name}.weight"
        head = model.heads[name].weight.detach() if state_dict is None else state_dict[key].detach()
    config: Any = model.peft_config[name]
    return AdapterWeights(config, weights, head, model.reward_scales.get(name), model.base_record)


def plain_adapter(model: SwitchedModel, name: str) -> AdapterWeights:
    """An adapter of the model as it is now, with one rank for all layers and a scaling of 1: what every reader reads.

    The scaling of each layer is multiplied into its B, and a lower rank is filled up with zeros, so `rank_pattern`,
    `alpha_pattern` and `use_rslora`, which some readers ignore without a word, have nothing left to say. The weights
    are copies on the CPU. Of a sharded model every process must ask.
    """
    adapter = adapter_weights(model, name)
    layers: Any = dict(model.named_modules())
    lora_layers: Any = model.lora_layers
    rank = max(layer.r[name] for layer in lora_layers if name in layer.r)
    config, weights = copy.deepcopy(adapter.config), {}
    config.r = config.lora_alpha = rank
    config.rank_pattern, config.alpha_pattern, config.use_rslora, config.lora_dropout = {}, {}, False, 0.0
    config.init_lora_weights = True  # some others are refused by name, whatever weights there are
    for key, tensor in (adapter.weights or {}).items():
        module, _, part = key.rpartition(".lora_")
        tensor = tensor.detach().cpu()
        if part.startswith("A"):
            missing = rank - tensor.shape[0]
            weights[key] = F.pad(tensor, (0, 0, 0, missing)) if missing else tensor.clone()
        else:
            weights[key] = F.pad(tensor * layers[module].scaling[name], (0, rank - tensor.shape[1]))
    return AdapterWeights(config, weights)


def save_roles(
    model: SwitchedModel,
    folder: str | Path,
    state_dict: dict[str, Tensor] | None = None,
    is_main_process: bool = True,
) -> None:
    """Write the policy into the folder itself, so that plain PEFT loads it; every other adapter into one of its name.

    Every process takes part, the main one writes.
    """
    weights = {name: adapter_weights(model, name, state_dict) for name in model.adapters}
    if is_main_process:
        for name, adapter in weights.items():
            write_adapter(Path(folder) / ("" if model.adapters[name] is Role.POLICY else name), adapter)


def push_folder(adapter: AdapterWeights, repo_id: str, private: bool | None, token: str | None, **upload: Any) -> str:
    """Upload an adapter as a PEFT folder and return the commit's address; `upload` goes to `HfApi.upload_folder`."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id  # with the owner, if none was given
    with tempfile.TemporaryDirectory() as folder:
        write_adapter(folder, adapter)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **upload))


def load_roles(model: SwitchedModel, folder: str | Path) -> None:
    """Read every role back from a folder that `save_roles` wrote, and check afterwards that each equals its file.

    Raises:
        ValueError: See `load_role`.
        RuntimeError: A role has other numbers than its file; names both.
    """
    paths = {name: Path(folder) / ("" if role is Role.POLICY else name) for name, role in model.adapters.items()}
    for name, path in paths.items():
        load_role(model, path, name)
    state_dict = whole_weights(model, lambda key: model.owner(key) is not None) if is_sharded(model) else None
    for name, path in paths.items():
        called = f"{path}: the {model.adapters[name].value} adapter"
        saved, own = (_tensors(a) for a in (read_adapter(path, called), adapter_weights(model, name, state_dict)))
        check_equal(own, saved, called)


def frozen_digests(model: Any) -> dict[str, str]:
    """A digest of each adapter that is not trained, with its head, scale and scaling, by its name.

    Args:
        model: One without roles has none.
    """
    frozen = [n for n, role in getattr(model, "adapters", {}).items() if role in (Role.REFERENCE, Role.REWARD)]
    state_dict = whole_weights(model, lambda key: model.owner(key) is not None) if is_sharded(model) else None
    return {name: adapter_digest(adapter_weights(model, name, state_dict)) for name in frozen}


def adapter_digest(adapter: AdapterWeights) -> str:
    """A digest of weights, head, scale and scaling."""
    scale = None if adapter.scale is None else asdict(adapter.scale)
    scaling = {field: getattr(adapter.config, field) for field in SCALING_FIELDS}
    digest = hashlib.sha256(json.dumps([scale, scaling], sort_keys=True).encode())
    for key, tensor in sorted(_tensors(adapter).items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _tensors(adapter: AdapterWeights) -> dict[str, Tensor]:
    """Weights and head."""
    return {**(adapter.weights or {}), **({} if adapter.head is None else {HEAD_KEY: adapter.head})}


def load_role(model: SwitchedModel, folder: str | Path, name: str) -> None:
    """Read an adapter's weights, head and scale back from a folder that `save_roles` wrote.

    Args:
        model: Has an adapter of this name.
        folder: Of the adapter. That of the policy has the others in it, which must be the model's.
        name: Of the adapter.

    Raises:
        ValueError: The folder has other roles, shapes or scaling than this model, or adapters of another base.
    """
    role = model.adapters.get(name)
    if role is None:
        raise ValueError(f"{folder}: this model has no role for an adapter named {name!r}.")
    if role is Role.POLICY:
        _check_roles(model, folder)
    adapter = read_adapter(folder, f"{role.value} adapter")
    own: Any = model.peft_config[name]
    remedy = "Resume with the configuration that the run was started with."
    check_same_scaling(adapter.config, own, f"{folder}: the {role.value} adapter", remedy)
    check_same_base(adapter, model.base_record, f"{folder}: the {role.value} adapter")
    model.set_weights(name, adapter.weights or {})
    if name in model.heads:
        if adapter.head is None:
            raise ValueError(f"{folder}: the {role.value} adapter has no head. The checkpoint is not complete.")
        head = model.heads[name].weight.data
        head.copy_(shared_out(adapter.head, head))
    if role is Role.REWARD:
        model.reward_scales.pop(name, None)
        if adapter.scale is not None:
            model.reward_scales[name] = adapter.scale


def _check_roles(model: SwitchedModel, folder: str | Path) -> None:
    """Check that the folders beside the policy's files are those of the model's other adapters."""
    others = {name for name, role in model.adapters.items() if role is not Role.POLICY}
    folders = {path.parent.name for path in Path(folder).glob(f"*/{CONFIG_FILE}")}
    found = {name for name in folders if name in set(Role) or name.startswith(f"{Role.REWARD}_")}
    if found != others:
        raise ValueError(
            f"{folder} holds the roles {sorted(found)} beside the policy, this model has {sorted(others)}. "
            "Resume with the adapters that the run was started with."
        )
