"""Completions by the generation of TRL's trainers, which leaves the model as it was."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

from trl_ext.generation.vllm import VLLMGeneration
from trl_ext.roles import SharedBaseModel
from trl_ext.text import Prompt

# Prompts and completions in token ids, unpadded, and completions as texts or messages
Completions: TypeAlias = tuple[list[list[int]], list[list[int]], list[Any]]


def complete(
    generate: Callable[[list[Prompt]], Completions],
    model: SharedBaseModel,
    args: Any,
    prompts: list[Prompt],
    engine: VLLMGeneration | None = None,
) -> Completions:
    """Complete each prompt by the role that is active, the policy unless switched.

    For continuous batching TRL casts the whole model to `bf16` or `fp16`, the trained adapters and the frequencies of
    the rotary embedding too, and leaves it so; and it leaves a model in training mode that was in evaluation. Neither
    happens here: the base computes in the dtype that it has, as it does for `generate`. And an empty completion, at
    which TRL raises an IndexError, comes back as it is.

    Args:
        generate: TRL's, `trainer._generate`, which calls `model`.
        model: In the mode that TRL's logs go by, training or evaluation.
        args: The trainer's `RLOOConfig`, with `per_device_generate_batch_size`.
        prompts: As in the dataset's column `prompt`.
        engine: What `generate` samples through, where that is not the model.
    """
    training, precision = model.training, (args.bf16, args.fp16)
    try:
        if args.use_transformers_continuous_batching:
            args.bf16 = args.fp16 = False  # on which the cast depends, and nothing else in `_generate`
        with model.generating(args.per_device_generate_batch_size), _empty_ones_hidden(model) as empty:
            prompt_ids, completion_ids, completions = generate(prompts)
    finally:
        args.bf16, args.fp16 = precision
        model.train(training)
    if engine is not None:
        empty = engine.empty
    return prompt_ids, [[] if i in empty else ids for i, ids in enumerate(completion_ids)], completions


@contextmanager
def _empty_ones_hidden(model: SharedBaseModel) -> Iterator[set[int]]:
    """Give TRL a pad token, which it takes for an end, in place of nothing; the numbers of such completions are kept.

    Only an engine can return nothing: `generate` samples a token at least.
    """
    empty: set[int] = set()
    generate_batch = model.generate_batch

    def generate_some(inputs: Any, generation_config: Any = None, **options: Any) -> Any:
        results = generate_batch(inputs, generation_config=generation_config, **options)
        for i, output in enumerate(results.values()):
            if not output.generated_tokens:
                empty.add(i)
                output.generated_tokens = [generation_config.pad_token_id]
        return results

    model.generate_batch = generate_some  # type: ignore
    try:
        yield empty
    finally:
        del model.generate_batch
