"""Completions by TRL's generation, which leaves the model as it was."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl_ext.ppo.trainer import PPOMaxTrainer


def complete(trainer: "PPOMaxTrainer", prompts: list[Any]) -> tuple[list[list[int]], list[list[int]], list[Any]]:
    """A completion of each prompt by the role that is active, the policy unless switched.

    For continuous batching TRL casts the whole model to `bf16` or `fp16`, the trained adapters and the frequencies of
    the rotary embedding too, and leaves it so; and it leaves a model in training mode that was in evaluation. Neither
    happens here: the base computes in the dtype that it has, as it does for `generate`.

    Args:
        trainer: Whose model, tokenizer and settings.
        prompts: As in the dataset's column `prompt`.

    Returns:
        Prompts and completions in token ids, unpadded, and completions as text or messages.
    """
    args, model, training = trainer.args, trainer.model, trainer.model.training
    precision = args.bf16, args.fp16
    try:
        if trainer.use_transformers_continuous_batching:
            args.bf16 = args.fp16 = False  # on which the cast depends, and nothing else in `_generate`
        with model.generating(args.per_device_generate_batch_size):
            return trainer._generate(prompts)
    finally:
        args.bf16, args.fp16 = precision
        model.train(training)
