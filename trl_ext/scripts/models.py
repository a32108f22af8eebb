"""Bases, adapters and tokenizers by the flags of TRL's `ModelConfig`."""

import copy
import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from trl import get_peft_config, get_quantization_config

from trl_ext.ops.precision import best_dtype
from trl_ext.roles import RewardModel, SharedBaseModel, load_base, read_adapter
from trl_ext.roles.identity import record_of
from trl_ext.scripts.arguments import LORA
from trl_ext.scripts.parsing import Given
from trl_ext.text import TextEncoder, end_token_ids, load_generation_config, load_tokenizer


def quantization_of(model_args: Any, training: Any = None) -> Any:
    """`BitsAndBytesConfig` of the flags `--load_in_4bit`, `--use_bnb_nested_quant`, ...; None without them.

    A 4-bit base computes in `--dtype`; without one, or with "auto", in what the run does (`bf16`, `fp16` or float32),
    or, where no `training` is given, in what the card does best.
    """
    if model_args.dtype in (None, "auto"):
        dtype = best_dtype()
        if training is not None:
            dtype = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32
        model_args = copy.copy(model_args)
        model_args.dtype = dtype
    return get_quantization_config(model_args)


def base_options(model_args: Any, training: Any = None) -> dict[str, Any]:
    """How a base is loaded, without its quantisation: dtype, revision, attention, and `model_init_kwargs` over them."""
    options = {
        "dtype": model_args.dtype or "auto",
        "revision": model_args.model_revision,
        "trust_remote_code": getattr(training, "trust_remote_code", False),
    }
    if model_args.attn_implementation:
        options["attn_implementation"] = model_args.attn_implementation
    return options | (getattr(training, "model_init_kwargs", None) or {})


def config_options(model_args: Any, training: Any = None) -> dict[str, Any]:
    """The part of `base_options` that configurations and tokenizers take."""
    options = base_options(model_args, training)
    return {name: options[name] for name in ("revision", "trust_remote_code")}


def tokenizer_of(model_args: Any, training: Any = None, **options: Any) -> Any:
    """The tokenizer of the model that the flags name."""
    return load_tokenizer(model_args.model_name_or_path, **config_options(model_args, training), **options)


def encoder_by_name(tokenizer: Any, model_args: Any, training: Any = None, template: Any = None) -> TextEncoder:
    """Text to ids for the model that the flags name, which need not be loaded, nor trained: at its revision.

    Args:
        tokenizer: Of the model.
        model_args: `ModelConfig`.
        training: Of the run or command, for `trust_remote_code`.
        template: `chat_template_kwargs`.
    """
    config = load_generation_config(str(model_args.model_name_or_path), **config_options(model_args, training))
    return TextEncoder(tokenizer, end_token_ids(tokenizer, config), template)


def fresh_adapter(given: Given, model_args: Any, task: str = "CAUSAL_LM") -> Any:
    """LoRA configuration of the flags; None where there are none, for the project's own.

    Any flag of LoRA counts as `--use_peft`: the policy is an adapter in every case.
    """
    if not model_args.use_peft and not any(name in given for name in LORA):
        return None
    model_args = copy.copy(model_args)
    model_args.use_peft, model_args.lora_task_type = True, task
    model_args.lora_target_modules = model_args.lora_target_modules or "all-linear"
    return get_peft_config(model_args)


def load_policy(
    given: Given,
    recipe: Any,
    model_args: Any,
    training: Any = None,
    longest: int | None = None,
    **more: Any,
) -> SharedBaseModel:
    """The base that the flags name, in 4 bits if they say so, with policy and reward adapters.

    Args:
        given: What was set.
        recipe: With `policy_adapter` and `reward_adapter`.
        model_args: `ModelConfig`.
        training: Of the run, if there is one: precision, `model_init_kwargs`.
        longest: Tokens of the longest prompt and its completion, for an engine in this process.
        more: Further options of `SharedBaseModel.from_pretrained`.
    """
    name, quantization = model_args.model_name_or_path, quantization_of(model_args, training)
    fresh = None if recipe.policy_adapter else fresh_adapter(given, model_args)
    options = base_options(model_args, training)
    if getattr(training, "vllm_one_copy", False):
        from trl_ext.generation.in_process import engine_first

        adapter = read_adapter(recipe.policy_adapter, "policy_adapter").config if recipe.policy_adapter else fresh
        engine = {"quantization_config": quantization, "longest": longest, **options}
        more["held"] = engine_first(name, adapter, training, **engine)
    return SharedBaseModel.from_pretrained(
        name,
        policy_adapter=recipe.policy_adapter,
        reward_adapter=recipe.reward_adapter or None,
        peft_config=fresh,
        quantization_config=quantization,
        **options,
        **more,
    )


def load_causal_base(model_args: Any, training: Any) -> Any:
    """The base that the flags name, in 4 bits if they say so, without any adapter."""
    options = base_options(model_args, training)
    return load_base(
        model_args.model_name_or_path, quantization_config=quantization_of(model_args, training), **options
    )


def placed(base: Any, device: Any = None) -> Any:
    """A base on the device that this process computes on, before anything samples or scores with it.

    A quantised one, and one that was loaded by a device map, stay where they are.

    Args:
        base: What is put on it later goes where it is; or with its roles.
        device: Default: accelerate's of this process.
    """
    inner = base.get_base_model() if isinstance(base, SharedBaseModel) else base
    if getattr(inner, "is_quantized", False) or getattr(inner, "hf_device_map", None):
        return base
    return base.to(PartialState().device if device is None else device)


def load_placed_base(model_args: Any, recipe: Any) -> Any:
    """`load_causal_base` for commands that sample or score and train nothing: on the device that computes."""
    return placed(load_causal_base(model_args, recipe))


def facts_of_base(base: Any) -> dict[str, Any]:
    """What makes a base this one: kept beside what was computed with it, which counts for no other base.

    Returns:
        `base`, name or whole path; `base_revision`, the Hub's commit, None for a folder; `base_quantization`, its
        options; `base_dtype`; `base_weights`, a digest of the model type and of some of its numbers.
    """
    name = str(base.name_or_path or "")
    held: Any = getattr(base.config, "quantization_config", None)
    quantization = held.to_dict() if hasattr(held, "to_dict") else held
    record = json.dumps(asdict(record_of(base)), sort_keys=True)
    return {
        "base": str(Path(name).resolve()) if Path(name).is_dir() else name,
        "base_revision": getattr(base.config, "_commit_hash", None),
        "base_quantization": json.loads(json.dumps(quantization, sort_keys=True, default=str)),
        "base_dtype": str(base.dtype).removeprefix("torch."),
        "base_weights": hashlib.sha256(record.encode()).hexdigest()[:16],
    }


def fresh_reward_model(base: Any, model_args: Any) -> RewardModel:
    """A `RewardModel` on a base, its adapter by the LoRA flags, whether set or TRL's defaults."""
    model_args = copy.copy(model_args)
    model_args.use_peft = True
    return RewardModel(base, fresh_adapter(Given(), model_args, task="SEQ_CLS"))
