"""What PPO-Max cannot honour of the options that it inherits from TRL and transformers: refused by name."""

from typing import Any

from transformers import GenerationConfig

# Of `generation_kwargs`: what has a field of its own, or comes from elsewhere
HAVE_THEIR_PLACE = {
    "temperature": "the field temperature",
    "top_p": "the field top_p",
    "top_k": "the field top_k",
    "min_p": "the field min_p",
    "repetition_penalty": "the field repetition_penalty",
    "cache_implementation": "the field cache_implementation",
    "max_new_tokens": "the field max_completion_length",
    "max_length": "the field max_completion_length",
    "num_return_sequences": "the field num_generations",
    "eos_token_id": "the tokenizer's eos_token and the base's generation_config",
    "pad_token_id": "the tokenizer's pad_token",
    "bos_token_id": "the tokenizer's bos_token",
    "disable_compile": "nothing: TRL sets it",
    "return_dict_in_generate": "nothing: token ids are all that is read",
}
# What transformers' continuous batching applies
CONTINUOUS_BATCHING_KWARGS = {"do_sample"}


def check_inherited_options(args: Any) -> None:
    """Options of TRL and transformers that PPO-Max cannot honour."""
    refused: dict[str, str] = {
        "reward_clip_range": "use reward_clip, which clips after normalisation",
        "mask_truncated_completions": "use missing_eos_penalty; a masked completion would leave its critic untrained",
        "sync_ref_model": "the reference is the frozen starting policy; set it to False",
        "use_vllm": "TRL gives vLLM the policy by merging its adapter into the base that all roles share, and "
        "unmerging rounds, or quantises a 4-bit base anew: the reference would move at each sync. It would also "
        "send the critic's head, and 4-bit weights as they are packed, which no vLLM model has. Use transformers' "
        "generate (the default) or use_transformers_continuous_batching=True",
        "router_aux_loss_coef": "the auxiliary loss of experts is not supported; set it to 0",
        "use_liger_kernel": "it replaces the forward passes of the roles; set it to False",
        "restore_callback_states_from_checkpoint": "the state of PPO-Max is restored without it; set it to False",
    }
    for name, remedy in refused.items():
        if getattr(args, name):
            raise ValueError(f"{name}={getattr(args, name)!r} has no place in PPO-Max: {remedy}.")
    checkpointing: Any = getattr(args, "activation_checkpointing_kwargs", None) or args.gradient_checkpointing_kwargs
    if (checkpointing or {}).get("use_reentrant"):
        raise ValueError(
            "gradient_checkpointing_kwargs={'use_reentrant': True} would recompute under the wrong role: set it "
            "to False or leave it out."
        )


def check_generation_kwargs(args: Any) -> None:
    """What has a field of its own bypasses it here: log-probabilities and warnings follow the field."""
    given: Any = args.generation_kwargs or {}
    known = vars(GenerationConfig()).keys()
    for name, value in given.items():
        if name in HAVE_THEIR_PLACE:
            raise ValueError(
                f"generation_kwargs={{{name!r}: {value!r}}} would bypass what governs it: use {HAVE_THEIR_PLACE[name]}."
            )
        if name.startswith("_") or name not in known:
            raise ValueError(
                f"generation_kwargs={{{name!r}: {value!r}}}: GenerationConfig of transformers has no such option. "
                "Correct its name, or drop it."
            )


def check_continuous_batching(args: Any) -> None:
    """What continuous batching would leave out, with no more than a line in its log."""
    if not args.use_transformers_continuous_batching:
        return
    kwargs: Any = args.generation_kwargs or {}
    options: Any = args.transformers_continuous_batching_config or {}
    left_out: dict[str, tuple[Any, str]] = {
        "repetition_penalty": (None if args.repetition_penalty == 1 else args.repetition_penalty, "set it to 1"),
        "cache_implementation": (args.cache_implementation, "leave it out; the engine has a cache of its own"),
        "generation_kwargs": (
            sorted(set(kwargs) - CONTINUOUS_BATCHING_KWARGS),
            f"give no others than {', '.join(sorted(CONTINUOUS_BATCHING_KWARGS))}",
        ),
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
