"""Generation by whatever role is active: in batches that fit, or by transformers' continuous batching, checked.

When transformers' engine fails it logs the error and hands back what there is: completions that are cut or empty. TRL
takes them for the policy's. Here they are an error.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import ceil
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

CPU_BATCH_TOKENS = 512


class RoleGeneration:
    """`generate` and `generate_batch` as TRL calls them. Mixed into `SharedBaseModel`."""

    if TYPE_CHECKING:

        def get_base_model(self) -> Any: ...

    _rows_at_a_time: int | None = None

    @contextmanager
    def generating(self, rows_at_a_time: int | None = None) -> Iterator[None]:
        """Inside the block `generate` takes so many sequences at a time; None: all at once."""
        before, self._rows_at_a_time = self._rows_at_a_time, rows_at_a_time
        try:
            yield
        finally:
            self._rows_at_a_time = before

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As a plain `PeftModel`, but inside `generating` so many rows at a time, without their common padding.

        There it takes `input_ids` (B, P), padded left, `attention_mask` (B, P) and `generation_config`, and returns
        (B, P + T): T is the longest completion, shorter ones are padded right.
        """
        size = self._rows_at_a_time
        if size is None:
            return super().generate(*args, **kwargs)  # type: ignore[misc]
        ids, mask = kwargs.pop("input_ids"), kwargs.pop("attention_mask")
        pad, outputs = kwargs["generation_config"].pad_token_id, []
        for part_ids, part_mask in zip(ids.split(size), mask.split(size), strict=True):
            unused = int(part_mask.argmax(1).min())
            inputs = {"input_ids": part_ids[:, unused:], "attention_mask": part_mask[:, unused:]}
            output = super().generate(*args, **inputs, **kwargs)  # type: ignore[misc]
            outputs.append(F.pad(output, (unused, 0), value=pad))
        width = max(output.shape[1] for output in outputs)
        return torch.cat([F.pad(output, (0, width - output.shape[1]), value=pad) for output in outputs])

    def generate_batch(
        self,
        inputs: list[list[int]],
        generation_config: Any = None,
        continuous_batching_config: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Continuous batching of the base under the active role; arguments and result are those of transformers.

        Raises:
            ValueError: The base cannot do it.
            RuntimeError: The engine failed, or completions are missing.
        """
        self.check_continuous_batching()
        base = self.get_base_model()
        config = generation_config or base.generation_config
        if continuous_batching_config is not None:
            longest = max(map(len, inputs)) + (config.max_new_tokens or 0)
            continuous_batching_config = fitted(continuous_batching_config, base, len(inputs), longest)
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

    def check_continuous_batching(self) -> None:
        """Whether the base's attention goes through transformers' interface, where the paged cache is.

        Elsewhere (GPT-Neo, GPT-J, Bloom, Falcon) the engine runs without an error and samples from another
        distribution.

        Raises:
            ValueError: It does not.
        """
        base = self.get_base_model()
        if not base.is_backend_compatible():
            raise ValueError(
                f"use_transformers_continuous_batching=True: {type(base).__name__} has an attention of its own, which "
                "knows no paged cache, and would sample from another distribution. Set it to False."
            )


def fitted(config: Any, base: Any, requests: int, length: int) -> Any:
    """The engine's options with those that were left open and that its own choice is wrong for.

    On a CPU it takes half of the memory for its cache, and builds a mask over all of it: seconds a call, however small
    the model. The cache is made as large as the requests can fill instead. Flash attention, to which it would switch,
    computes in 16 bits only.
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
