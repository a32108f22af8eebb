"""Fields of the three configurations: what is no value for one is refused by its name, whatever it is."""

import json
import math
import warnings
from dataclasses import fields

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.attack.clear import problem_of, refused
from trl_ext import PPOMaxConfig, RewardModelConfig, RRHFConfig
from trl_ext.fields import rules_of

pytestmark = pytest.mark.slow

CONFIGS = [PPOMaxConfig, RRHFConfig, RewardModelConfig]
NAN, INF = math.nan, math.inf
ODD = st.one_of(
    st.sampled_from([NAN, INF, -INF, -1, 0, 1.5, -0.5, 10**30, True, False, None, "", "x", "false", "1", b"x"]),
    st.sampled_from([(), [], {}, [1], ["x"], {"a": 1}, {1, 2}, object(), len, 2**64, -(2**63), 1e-320, 1j]),
    st.floats(),
    st.integers(),
    st.text(max_size=8),
)
OTHERS = {"accelerator_config", "deepspeed", "fsdp_config", "reward_weights"}  # mappings, files, and a list
NUMBERS = [(config, name) for config in CONFIGS for name in rules_of(config) if name not in OTHERS]


def make(config, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return config(**{"output_dir": "x", "report_to": "none", "use_cpu": True} | options)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_every_field_is_checked(config) -> None:
    known = rules_of(config).keys() | rules_of(config, bounded=False).keys()
    assert {field.name for field in fields(config)} == known


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
@given(data=st.data(), value=ODD)
@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_a_field_with_any_value_is_used_as_it_says_or_refused_by_name(config, data, value) -> None:
    name = data.draw(st.sampled_from([field.name for field in fields(config) if field.init]))
    found = None
    try:
        make(config, **{name: value})
    except Exception as error:
        found = error
    if found is not None:  # libraries name the fields that they refuse, such as an optimizer that is not installed
        assert name in str(found), f"{name}={value!r}: {type(found).__name__}: {found}"
        assert isinstance(found, ValueError | ImportError), f"{name}={value!r}: {type(found).__name__}: {found}"
        return
    rule, optional = (rules_of(config) | rules_of(config, bounded=False))[name]
    default = config.__dataclass_fields__[name].default
    assert value is default or (value is None and optional) or rule.holds(value)


@pytest.mark.parametrize("value", [NAN, INF, -INF, "x", [], {}, b"1"], ids=repr)
@pytest.mark.parametrize(("config", "name"), NUMBERS, ids=lambda each: getattr(each, "__name__", each))
def test_no_number_field_takes_what_is_no_finite_number(config, name, value) -> None:
    refused(lambda: make(config, **{name: value}), f"{name}={value!r}")


TOGETHER = [
    (PPOMaxConfig, {"max_steps": 5, "critic_warmup_steps": 5}, ["critic_warmup_steps", "5"]),
    (PPOMaxConfig, {"steps_per_generation": 3, "gradient_accumulation_steps": 2}, ["steps_per_generation"]),
    (PPOMaxConfig, {"critic_warmup_explained_variance": 0.5, "critic_warmup_steps": 0}, ["critic_warmup"]),
    (PPOMaxConfig, {"kl_horizon": 1e-3}, ["kl_horizon"]),
    (PPOMaxConfig, {"gradient_checkpointing_kwargs": {"use_reentrant": True}}, ["use_reentrant"]),
    (PPOMaxConfig, {"generation_kwargs": {"max_length": 3}}, ["max_length", "max_completion_length"]),
    (PPOMaxConfig, {"generation_kwargs": {"_x": 3}}, ["_x"]),
    (PPOMaxConfig, {"generation_kwargs": {"bogus": 3}}, ["bogus"]),
    (PPOMaxConfig, {"use_vllm": True}, ["use_vllm"]),
    (PPOMaxConfig, {"sync_ref_model": True}, ["sync_ref_model"]),
    (PPOMaxConfig, {"mask_truncated_completions": True}, ["mask_truncated_completions", "missing_eos_penalty"]),
    (PPOMaxConfig, {"reward_clip_range": (-1.0, 1.0)}, ["reward_clip_range", "reward_clip"]),
    (PPOMaxConfig, {"use_liger_kernel": True}, ["use_liger_kernel"]),
    (
        PPOMaxConfig,
        {"use_transformers_continuous_batching": True, "repetition_penalty": 1.2},
        ["repetition_penalty", "continuous_batching"],
    ),
    (RRHFConfig, {"rank_coef": 0, "sft_coef": 0}, ["rank_coef", "sft_coef"]),
    (RRHFConfig, {"online_every_steps": 1, "online_every_pass": True}, ["online_every_steps", "online_every_pass"]),
    (RRHFConfig, {"online_keep_best": True}, ["online_keep_best", "online_every_steps"]),
    (RRHFConfig, {"remove_unused_columns": True}, ["remove_unused_columns"]),
    (RRHFConfig, {"label_smoothing_factor": 0.1}, ["label_smoothing_factor"]),
    (RRHFConfig, {"use_liger_kernel": True}, ["use_liger_kernel"]),
    (RRHFConfig, {"gradient_checkpointing_kwargs": {"use_reentrant": True}}, ["use_reentrant"]),
    (RewardModelConfig, {"remove_unused_columns": True}, ["remove_unused_columns"]),
    (RewardModelConfig, {"pad_to_multiple_of": 8}, ["pad_to_multiple_of"]),
    (RewardModelConfig, {"label_smoothing": 0.5}, ["label_smoothing"]),
    (RewardModelConfig, {"normalization_samples": 1}, ["normalization_samples", "normalize_rewards"]),
    *[(config, {"max_steps": 4, "warmup_steps": 4}, ["warmup_steps"]) for config in CONFIGS],
    *[(config, {"max_steps": -1, "num_train_epochs": 0}, ["num_train_epochs", "max_steps"]) for config in CONFIGS],
    *[(config, {"save_strategy": False}, ["save_strategy", "quotes"]) for config in CONFIGS],
    *[(config, {"accelerator_config": {"a": 1}}, ["accelerator_config"]) for config in CONFIGS],
]


@pytest.mark.parametrize(("config", "options", "names"), TOGETHER)
def test_fields_that_contradict_each_other_are_named(config, options, names) -> None:
    if config is PPOMaxConfig and "critic_warmup_steps" not in options and "max_steps" in options:
        options = options | {"critic_warmup_steps": 0}
    refused(lambda: make(config, **options), *names)


@pytest.mark.parametrize("error", [KeyError("x"), AttributeError("x"), AssertionError("x"), IndexError("x")], ids=repr)
def test_an_error_of_python_itself_is_not_clear(error: Exception) -> None:
    assert "no kind of error" in str(problem_of(error))


def test_an_error_of_a_library_is_not_clear() -> None:
    with pytest.raises(ValueError) as found:
        json.loads("{")
    assert problem_of(found.value) is not None
    with pytest.raises(ValueError) as found:
        torch.zeros(2).numpy().reshape(3)
    assert "raised by a library" in str(problem_of(found.value))
