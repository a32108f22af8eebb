"""Load the base model once, frozen, in 4 bits if asked."""

import importlib.util
from collections.abc import Iterable
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from trl_ext.ops.precision import best_dtype
from trl_ext.roles.held import HeldWeights, base_on, check_held


def load_base(
    model_name_or_path: str,
    *,
    quantization_config: BitsAndBytesConfig | None = None,
    dtype: str | torch.dtype = "auto",
    held: HeldWeights | None = None,
    **model_init_kwargs: Any,
) -> PreTrainedModel:
    """Load a causal language model with every parameter frozen.

    Args:
        model_name_or_path (`str`): Hub id or folder.
        quantization_config (`BitsAndBytesConfig`, *optional*): For a 4-bit or 8-bit base.
        dtype (`str` or `torch.dtype`): Of the weights; "auto" is what the checkpoint holds, float16 for bfloat16 on a
            card that has none, and float32 on a CPU, which computes with 16 bits slowly. A frozen base needs no float32
            master copy.
        held: Weights that an engine has loaded already, which are taken in place of the checkpoint's.
        model_init_kwargs: Passed on to `AutoModelForCausalLM.from_pretrained` (`revision`, `attn_implementation`,
            `device_map`, `trust_remote_code`, ...).

    Returns:
        `PreTrainedModel`, no parameter of which requires a gradient.

    Raises:
        ImportError: `quantization_config` is given and bitsandbytes is missing.
        ValueError: The base is quantised already, by a method that cannot train adapters, or 4 bits were asked for too;
            or its checkpoint lacks weights.
    """
    config = load_base_config(model_name_or_path, **model_init_kwargs)
    method = quantization_method(config)
    if quantization_config is not None and method not in (None, "bitsandbytes"):
        raise ValueError(
            f"{model_name_or_path} is quantised by {method} already, quantization_config (load_in_4bit) would do it "
            "again. Drop it, or give the model that is not quantised."
        )
    dtype = dtype_of_base(config, dtype, quantised=quantization_config is not None or method is not None)
    if quantization_config is not None or method == "bitsandbytes":
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ImportError("a quantised base needs bitsandbytes: pip install bitsandbytes")
        state = PartialState()
        device = "cpu" if state.device.type == "cpu" else state.local_process_index
        model_init_kwargs.setdefault("device_map", {"": device})
    model_init_kwargs.setdefault("trust_remote_code", False)
    if quantization_config is not None:  # None would take the place of the checkpoint's own
        model_init_kwargs["quantization_config"] = quantization_config
    base: Any
    if held is not None:
        base, loaded = base_on(held, config, quantization_config, model_init_kwargs)
    else:
        made: Any = AutoModelForCausalLM.from_pretrained(
            model_name_or_path, dtype=dtype, output_loading_info=True, **model_init_kwargs
        )
        base, loaded = made
    _check_complete(base, model_name_or_path, loaded["missing_keys"])
    quantizer = getattr(base, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_trainable:
        raise ValueError(
            f"{model_name_or_path} is quantised by {method}, which computes no gradients: no adapter can be trained on "
            "it. Give the model that is not quantised, with quantization_config (load_in_4bit)."
        )
    keep_trainable(base)
    base.requires_grad_(False)
    if held is not None:
        check_held(base.named_parameters(), held)
    return base


def dtype_of_base(config: Any, dtype: str | torch.dtype = "auto", quantised: bool = False) -> str | torch.dtype:
    """The type that `load_base` loads weights in; "auto" where that is the checkpoint's."""
    if isinstance(dtype, str) and dtype != "auto":
        return getattr(torch, dtype)
    if dtype == "auto" and not quantised and PartialState().device.type == "cpu":
        return torch.float32
    if dtype == "auto" and best_dtype() == torch.float16 and config.dtype == torch.bfloat16:
        return torch.float16
    return dtype


def _check_complete(base: Any, name: str, missing: Iterable[str]) -> None:
    """Refuse a model some weights of which transformers has made up, because the checkpoint has none for them."""
    parameters = dict(base.named_parameters())
    random = sorted(key for key in missing if key in parameters)
    if random:
        raise ValueError(
            f"{name}: the checkpoint has no weights for {len(random)} parameters of {type(base).__name__}, first "
            f"{random[0]!r}: they would be random. Give the checkpoint of a causal language model, with its LM head."
        )


def check_vocabulary(config: Any, tokenizer: Any) -> None:
    """Check that the model has an embedding for every token.

    Tokens that stand for an image, a sound or a video are left out: text-only models have tokenizers with them.

    Args:
        config: The model's configuration.
        tokenizer: Of transformers.

    Raises:
        ValueError: A token without an embedding.
    """
    rows, tokens = config.get_text_config().vocab_size, tokenizer.get_vocab()
    media = {getattr(tokenizer, f"{kind}_token", None) for kind in ("image", "audio", "video")}
    beyond = sorted((number, token) for token, number in tokens.items() if number >= rows and token not in media)
    if beyond:
        raise ValueError(
            f"the tokenizer has {len(beyond)} tokens beyond the model's {rows} embeddings, first {beyond[0][1]!r} with "
            f"id {beyond[0][0]}. Give the tokenizer that the model was trained with, or resize the model's embeddings, "
            "train them and save it."
        )


def quantization_method(config: Any) -> str | None:
    """How a checkpoint is quantised, by its configuration: "bitsandbytes", "gptq", "awq", ...; None: it is not."""
    held = getattr(config, "quantization_config", None)
    method = held.get("quant_method") if isinstance(held, dict) else getattr(held, "quant_method", None)
    return None if held is None else str(getattr(method, "value", method) or "bitsandbytes")


def keep_trainable(base: Any) -> None:
    """Stop bitsandbytes from packing 4-bit weights for inference, which it does in a CPU's first pass in eval mode.

    The kernel for packed weights has no backward: every later training step would, with no more than a warning, leave
    out the gradient through the base. Only CPUs with AVX512-BF16 are concerned.
    """
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def load_base_config(model_name_or_path: str, **model_init_kwargs: Any) -> Any:
    """The base's configuration alone, for checks that must come before the weights are loaded."""
    kept = {k: model_init_kwargs[k] for k in ("revision", "trust_remote_code", "token") if k in model_init_kwargs}
    return AutoConfig.from_pretrained(model_name_or_path, **kept)


def max_positions(config: Any) -> int | None:
    """The longest sequence the base has positions for; None where its configuration names no limit."""
    text_config = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        if isinstance(getattr(text_config, name, None), int):
            return getattr(text_config, name)
    return None
