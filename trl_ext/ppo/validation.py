"""What `PPOMaxConfig` refuses, and what to write instead."""

import math
from typing import Any

from trl_ext.ops.ensemble import ENSEMBLE_MODES
from trl_ext.ops.kl import KL_ESTIMATORS

REWARD_NORMALIZATIONS = ("norm", "scale", "none")
KL_CONTROLS = ("fixed", "adaptive", "penalty")
# Of `generation_kwargs`, what transformers' continuous batching applies
CONTINUOUS_BATCHING_KWARGS = {"do_sample", "max_new_tokens", "min_p", "temperature", "top_k", "top_p"}


def check_config(args: Any) -> None:
    """Check the fields of a `PPOMaxConfig` that its parents do not.

    Raises:
        ValueError: A field that is out of range, unknown or without a place in PPO-Max: its name, value and remedy.
    """
    _numbers(args)
    _choices(args)
    _generation(args)


def _numbers(args: Any) -> None:
    """Every number in its range."""
    positive = (
        "kl_target",
        "gradient_accumulation_steps",
        "temperature",
        "ptx_max_length",
        "max_completion_length",
    )
    positive_or_none = ("reward_clip", "advantage_clip", "value_clip", "kl_horizon")
    not_negative = (
        "beta",
        "vf_coef",
        "entropy_coef",
        "ptx_coef",
        "critic_warmup_steps",
        "epsilon",
        "reward_ensemble_coef",
    )
    not_negative_or_none = ("missing_eos_penalty", "critic_learning_rate", "epsilon_high")
    remedy = {"reward_clip": "null (None) switches it off", "value_clip": "null (None) switches it off"}
    for name in (*positive, *positive_or_none):
        value = getattr(args, name)
        if value is None and name in positive_or_none:
            continue
        if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise ValueError(f"{name}={value!r} must be a number above 0; {remedy.get(name, 'give one')}.")
    for name in (*not_negative, *not_negative_or_none):
        value = getattr(args, name)
        if value is None and name in not_negative_or_none:
            continue
        if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise ValueError(f"{name}={value!r} must be a number of at least 0.")
    for name in ("per_device_generate_batch_size", "per_device_score_batch_size"):
        rows = getattr(args, name)
        if rows is not None and (not isinstance(rows, int) or rows < 1):
            raise ValueError(f"{name}={rows!r} must be a whole number of at least 1, or null.")
    for name in ("gamma", "gae_lambda", "value_lambda"):
        value = getattr(args, name)
        if not (value is None and name == "value_lambda") and not 0 <= value <= 1:
            raise ValueError(f"{name}={getattr(args, name)!r} must lie between 0 and 1.")
    threshold = args.critic_warmup_explained_variance
    if threshold is not None and not threshold <= 1:
        raise ValueError(f"critic_warmup_explained_variance={threshold!r} can be at most 1.")
    if threshold is not None and args.critic_warmup_steps == 0:
        raise ValueError(
            "critic_warmup_explained_variance is set and critic_warmup_steps is 0: set the steps to the longest "
            "that the warm-up may take."
        )


def _choices(args: Any) -> None:
    """Options of which one is to be chosen, and those of TRL and transformers that PPO-Max cannot honour."""
    for name, choices in (
        ("reward_ensemble", ENSEMBLE_MODES),
        ("reward_normalization", REWARD_NORMALIZATIONS),
        ("kl_control", KL_CONTROLS),
        ("kl_estimator", KL_ESTIMATORS),
    ):
        if getattr(args, name) not in choices:
            raise ValueError(f"{name}={getattr(args, name)!r} is unknown: use one of {', '.join(choices)}.")
    refused: dict[str, tuple[Any, str]] = {
        "reward_clip_range": (args.reward_clip_range, "use reward_clip, which clips after normalisation"),
        "mask_truncated_completions": (
            args.mask_truncated_completions,
            "use missing_eos_penalty; a masked completion would leave its critic untrained",
        ),
        "sync_ref_model": (args.sync_ref_model, "the reference is the frozen starting policy"),
        "use_vllm": (
            args.use_vllm,
            "TRL gives vLLM the policy by merging its adapter into the base that all roles share, and unmerging "
            "rounds, or quantises a 4-bit base anew: the reference would move at each sync. It would also send "
            "the critic's head, and 4-bit weights as they are packed, which no vLLM model has. Use transformers' "
            "generate (the default) or use_transformers_continuous_batching=True",
        ),
        "router_aux_loss_coef": (args.router_aux_loss_coef, "the auxiliary loss of experts is not supported"),
        "use_liger_kernel": (args.use_liger_kernel, "it replaces the forward passes of the roles"),
        "restore_callback_states_from_checkpoint": (
            args.restore_callback_states_from_checkpoint,
            "the state of PPO-Max is restored without it",
        ),
    }
    for name, (value, remedy) in refused.items():
        if value:
            raise ValueError(f"{name}={value!r} has no place in PPO-Max: {remedy}.")
    checkpointing: Any = getattr(args, "activation_checkpointing_kwargs", None) or args.gradient_checkpointing_kwargs
    if (checkpointing or {}).get("use_reentrant"):
        raise ValueError(
            "gradient_checkpointing_kwargs={'use_reentrant': True} would recompute under the wrong role: set it "
            "to False or leave it out."
        )
    assert args.steps_per_generation is not None  # RLOOConfig has set it
    if args.steps_per_generation % args.gradient_accumulation_steps:
        raise ValueError(
            f"steps_per_generation={args.steps_per_generation} must be a multiple of "
            f"gradient_accumulation_steps={args.gradient_accumulation_steps}, so that a pass over the rollout "
            "batch is a whole number of optimizer steps."
        )


def _generation(args: Any) -> None:
    """What continuous batching would leave out, with no more than a line in its log."""
    if not args.use_transformers_continuous_batching:
        return
    other = sorted(set(args.generation_kwargs or {}) - CONTINUOUS_BATCHING_KWARGS)
    options: Any = args.transformers_continuous_batching_config or {}
    left_out: dict[str, tuple[Any, str]] = {
        "repetition_penalty": (None if args.repetition_penalty == 1 else args.repetition_penalty, "set it to 1"),
        "cache_implementation": (args.cache_implementation, "leave it out; the engine has a cache of its own"),
        "generation_kwargs": (other, f"give no others than {', '.join(sorted(CONTINUOUS_BATCHING_KWARGS))}"),
        "per_device_generate_batch_size": (
            args.per_device_generate_batch_size,
            "use transformers_continuous_batching_config={'max_requests_per_batch': ...}",
        ),
        "transformers_continuous_batching_config['seed']": (
            options.get("seed"),
            "leave it out: every rollout batch would be sampled with the same random numbers. `seed` governs them",
        ),
    }
    for name, (value, remedy) in left_out.items():
        if value not in (None, []):
            raise ValueError(f"{name}={value!r} does not go with use_transformers_continuous_batching: {remedy}.")
