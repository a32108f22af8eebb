"""A `SharedBaseModel` from whatever a trainer was given as its model."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from transformers import BitsAndBytesConfig, PreTrainedModel

from trl_ext.roles.adapters import SCALING_FIELDS, check_same_scaling, read_adapter
from trl_ext.roles.base import load_base, load_base_config
from trl_ext.roles.identity import check_adapter_fits, check_same_base, describe_base, describe_config
from trl_ext.roles.role import Role
from trl_ext.roles.shared_model import SharedBaseModel


def shared_base_model(
    model: Any,
    peft_config: LoraConfig | None = None,
    quantization_config: BitsAndBytesConfig | None = None,
    with_critic: bool = True,
    **model_init_kwargs: Any,
) -> SharedBaseModel:
    """Whatever a TRL trainer takes as its model, as a `SharedBaseModel`.

    Args:
        model: A Hub id or folder, a `PreTrainedModel`, a `PeftModel`, or a `SharedBaseModel`, which is returned as is.
        peft_config: Of the fresh policy adapter, for an id or a `PreTrainedModel`.
        quantization_config, model_init_kwargs: For an id.
        with_critic: False leaves the critic out of a model that is made here.

    Raises:
        ValueError: Options that this kind of model cannot take.
        TypeError: Something that is no causal language model.
    """
    if isinstance(model, str):
        return SharedBaseModel.from_pretrained(
            model,
            peft_config=peft_config,
            quantization_config=quantization_config,
            with_critic=with_critic,
            **model_init_kwargs,
        )
    if quantization_config is not None:
        raise ValueError("quantization_config is for a model given by id; this one is loaded already: drop it.")
    if isinstance(model, PeftModel):
        if peft_config is not None:
            raise ValueError("the model has an adapter already: drop peft_config, or give the bare base.")
        return model if isinstance(model, SharedBaseModel) else SharedBaseModel.from_peft(model, with_critic)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be an id, a PreTrainedModel or a PeftModel, got {type(model).__name__}.")
    return SharedBaseModel(model, peft_config, with_critic=with_critic)


def tuned_policy(
    model_name_or_path: str,
    policy_adapter: str | Path,
    reference_adapter: str | Path | None = None,
    reward_adapter: str | Path | Sequence[str | Path] | None = None,
    quantization_config: BitsAndBytesConfig | None = None,
    **model_init_kwargs: Any,
) -> SharedBaseModel:
    """A policy after its training, beside the reference that it was trained from: to compare the two.

    `SharedBaseModel.from_pretrained` starts both at the same weights.

    Args:
        model_name_or_path: The base.
        policy_adapter: The tuned adapter; folder or Hub id, as the next two.
        reference_adapter: Where it started (an SFT adapter). None: at the bare base.
        reward_adapter: One or several, for a reward role.
        quantization_config, model_init_kwargs: See `load_base`.

    Raises:
        ValueError: An adapter that does not fit the base, or two of other rank or scaling.
    """
    tuned = read_adapter(policy_adapter, "policy_adapter")
    config = load_base_config(model_name_or_path, **model_init_kwargs)
    named = f"policy_adapter ({policy_adapter})"
    without_weights = describe_config(config, model_name_or_path, model_init_kwargs.get("trust_remote_code", False))
    check_adapter_fits(tuned, without_weights, Role.POLICY, named)
    start: Any = copy.deepcopy(tuned.config)
    start.init_lora_weights = True
    if reference_adapter is not None:
        start = read_adapter(reference_adapter, "reference_adapter")
        check_same_scaling(tuned.config, start.config, named, "Give the adapter that its training started from.")
    paths = [reward_adapter] if isinstance(reward_adapter, str | Path) else list(reward_adapter or [])
    rewards = [read_adapter(path, "reward_adapter") for path in paths]
    base = load_base(model_name_or_path, quantization_config=quantization_config, **model_init_kwargs)
    check_adapter_fits(tuned, describe_base(base), Role.POLICY, named)
    model = SharedBaseModel(base, start, rewards, with_critic=False)
    model.set_weights(Role.POLICY.adapter_name, tuned.weights or {})
    return model


def swap_policy(model: SharedBaseModel, policy_adapter: str | Path) -> bool:
    """Give a `tuned_policy` the weights of another tuned adapter, if that has the same layers, rank and scaling.

    Args:
        model: Whose policy is replaced.
        policy_adapter: Folder or Hub id.

    Returns:
        Whether it was replaced: an adapter of another form needs a model of its own.

    Raises:
        ValueError: The adapter was trained on another base.
    """
    named = f"policy_adapter ({policy_adapter})"
    tuned = read_adapter(policy_adapter, "policy_adapter")
    own: Any = model.peft_config[Role.POLICY.adapter_name]
    check_same_base(tuned, model.base_record, named)
    if set(own.target_modules) != set(tuned.config.target_modules or ()) or any(
        getattr(own, field) != getattr(tuned.config, field) for field in SCALING_FIELDS
    ):
        return False
    model.set_weights(Role.POLICY.adapter_name, tuned.weights or {})
    return True
