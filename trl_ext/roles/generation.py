"""Generation in batches that fit, or by transformers' continuous batching, checked.

When transformers' engine fails it logs the error and hands back what there is: completions that are cut or empty. TRL
takes them for the policy's. Here they are an error.
"""

from collections.abc import Callable
from dataclasses import replace
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

CPU_BATCH_TOKENS = 512


def generate_by_rows(
    generate: Callable[..., Tensor], rows: int, *args: Any, input_ids: Tensor, attention_mask: Tensor, **kwargs: Any
) -> Tensor:
    """Completions of some prompts at a time, without the padding that only the others need.

    Args:
        generate: `generate` of a model.
        rows: Prompts at a time.
        input_ids, attention_mask: (B, P), padded left.
        args, kwargs: Passed on; `generation_config` is needed.

    Returns:
        (B, P + T): T is the longest completion, shorter ones are padded right.
    """
    pad, outputs = kwargs["generation_config"].pad_token_id, []
    for ids, mask in zip(input_ids.split(rows), attention_mask.split(rows), strict=True):
        unused = int(mask.argmax(1).min())
        output = generate(*args, input_ids=ids[:, unused:], attention_mask=mask[:, unused:], **kwargs)
        outputs.append(F.pad(output, (unused, 0), value=pad))
    width = max(output.shape[1] for output in outputs)
    return torch.cat([F.pad(output, (0, width - output.shape[1]), value=pad) for output in outputs])


def continuous_batching(
    base: Any, inputs: list[list[int]], generation_config: Any, continuous_batching_config: Any, **kwargs: Any
) -> Any:
    """Transformers' continuous batching of a model; arguments and result are those of its `generate_batch`.

    Raises:
        ValueError: The model cannot do it.
        RuntimeError: The engine failed, or completions are missing.
    """
    check_continuous_batching(base)
    config = generation_config or base.generation_config
    if continuous_batching_config is not None:
        longest = max(map(len, inputs)) + (config.max_new_tokens or 0)
        continuous_batching_config = engine_config(continuous_batching_config, base, len(inputs), longest)
    options = {"generation_config": config, "continuous_batching_config": continuous_batching_config, **kwargs}
    results = base.generate_batch(inputs, **options)
    failed = [output.error for output in results.values() if output.error is not None]
    missing = len(inputs) * (config.num_return_sequences or 1) - len(results)
    if failed or missing:
        raise RuntimeError(
            f"continuous batching lost {len(failed) + missing} of {len(results) + missing} completions: "
            f"{failed[0] if failed else 'its log says why'}. If memory is short, lower max_batch_tokens or "
            "max_memory_percent in transformers_continuous_batching_config; if its cache is, raise num_blocks or "
            "max_memory_percent. Or set use_transformers_continuous_batching=False."
        )
    return results


def check_continuous_batching(base: Any) -> None:
    """Check that a model's attention goes through transformers' interface, where the paged cache is.

    Elsewhere (GPT-Neo, GPT-J, Bloom, Falcon) the engine runs without an error and samples from another distribution.

    Raises:
        ValueError: It does not, or this version of transformers cannot.
    """
    if not base.is_backend_compatible():
        raise ValueError(
            f"use_transformers_continuous_batching=True: {type(base).__name__} has an attention of its own, which "
            "knows no paged cache, and would sample from another distribution. Set it to False."
        )
    if base.config.model_type == "gpt_neox" and transformers.__version__.startswith("5.24."):
        raise ValueError(
            f"use_transformers_continuous_batching=True: GPT-NeoX of transformers {transformers.__version__} takes the "
            "engine's cache for another and fails. Set it to False, or use transformers 5.23."
        )


def engine_config(config: Any, base: Any, requests: int, length: int) -> Any:
    """The engine's options, with those filled in that were left open and that its own choice is wrong for.

    On a CPU it takes half of the memory for its cache, and builds a mask over all of it: seconds a call, however small
    the model. The cache is made as large as the requests can fill instead. Flash attention, to which it would switch,
    computes in 16 bits only.

    Args:
        config: `ContinuousBatchingConfig`.
        base: The model.
        requests: How many prompts there are.
        length: Tokens of the longest prompt and its completion.
    """
    changes: dict[str, Any] = {}
    if base.device.type == "cpu":
        if config.num_blocks is None:
            changes["num_blocks"] = requests * ceil(length / config.page_size)
        if config.max_batch_tokens is None:
            changes["max_batch_tokens"] = max(CPU_BATCH_TOKENS, requests)
    if base.dtype == torch.float32:
        changes["auto_switch_to_flash"] = False
    return replace(config, **changes)
