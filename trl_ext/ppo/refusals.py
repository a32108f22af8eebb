"""What PPO-Max cannot honour of the options that it inherits from TRL and transformers: refused by name."""

from dataclasses import fields
from typing import Any

from transformers import GenerationConfig

from trl_ext.generation.vllm_options import CORRECTION, check_vllm_options, uses_vllm

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
# Of `generation_kwargs`: what leaves the distribution of the completions as it is
HARMLESS = {"use_cache", "cache_config", "prompt_lookup_num_tokens", "max_matching_ngram_size", "renormalize_logits"}
# Options of TRL that only `use_vllm` reads
VLLM_OF_TRL = (
    "vllm_mode",
    "vllm_model_impl",
    "vllm_enable_sleep_mode",
    "vllm_structured_outputs_regex",
    "vllm_server_base_url",
    "vllm_server_host",
    "vllm_server_port",
    "vllm_server_timeout",
    "vllm_group_port",
    "vllm_gpu_memory_utilization",
    "vllm_max_model_length",
    "vllm_tensor_parallel_size",
)
# What transformers' continuous batching applies
CONTINUOUS_BATCHING_KWARGS = {"do_sample"}


def check_options(args: Any) -> None:
    """Check everything that is refused here.

    Raises:
        ValueError: The first of it, by name and value, and what to do.
    """
    check_inherited_options(args)
    check_generation_kwargs(args)
    check_continuous_batching(args)
    check_vllm_server(args)


def check_inherited_options(args: Any) -> None:
    """Options of TRL and transformers that PPO-Max cannot honour."""
    refused: dict[str, str] = {
        "reward_clip_range": "use reward_clip, which clips after normalisation",
        "mask_truncated_completions": "use missing_eos_penalty; a masked completion would leave its critic untrained",
        "sync_ref_model": "the reference is the frozen starting policy; set it to False",
        "use_vllm": "TRL gives vLLM the policy by merging its adapter into the base that all roles share, and "
        "unmerging rounds, or quantises a 4-bit base anew: the reference would move at each sync. It would also "
        "send the critic's head, and 4-bit weights as they are packed, which no vLLM model has. Start a server "
        "with `trl-ext vllm-serve` and set vllm_server_url, which sends it the adapter alone; or use transformers' "
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


def check_vllm_server(args: Any) -> None:
    """What a vLLM server would be sent by nobody; and options of TRL's own way to vLLM, which is refused."""
    check_vllm_options(args, CORRECTION)
    defaults = {f.name: f.default for f in fields(args)}
    for name in VLLM_OF_TRL:
        if getattr(args, name, defaults.get(name)) != defaults.get(name):
            raise ValueError(
                f"{name}={getattr(args, name)!r} is one of use_vllm, which has no place in PPO-Max: leave it out, and "
                "see vllm_server_url and `trl-ext vllm-serve`."
            )
    if not uses_vllm(args):
        return
    if args.rollout_lag and not args.vllm_importance_sampling_correction:
        raise ValueError(
            f"rollout_lag={args.rollout_lag} samples from a policy that is one update old, and "
            "vllm_importance_sampling_correction=False would train on that as if it were not: set it to True, or "
            "rollout_lag to 0."
        )
    left_out: dict[str, tuple[Any, str]] = {
        "use_transformers_continuous_batching": (args.use_transformers_continuous_batching or None, "set it to False"),
        "per_device_generate_batch_size": (
            args.per_device_generate_batch_size,
            "the server batches by itself (--max-num-seqs)",
        ),
        "cache_implementation": (args.cache_implementation, "leave it out; the server has a cache of its own"),
        "generation_kwargs": (args.generation_kwargs or None, "leave it out; what has a field is sent"),
    }
    for name, (value, remedy) in left_out.items():
        if value is not None:
            given = "vllm_one_copy" if args.vllm_server_url is None else "vllm_server_url"
            raise ValueError(f"{name}={value!r} does not go with {given}: {remedy}.")


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
