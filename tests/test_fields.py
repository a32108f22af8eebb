"""Bounds of configurations: declared at the field, and the same in every configuration that has it."""

import math
from dataclasses import dataclass, field
from typing import Annotated

import pytest
from transformers import HfArgumentParser

from trl_ext import PPOMaxConfig, RewardModelConfig, RRHFConfig
from trl_ext.fields import (
    INHERITED,
    above,
    above_to,
    at_least,
    at_most,
    between,
    check_fields,
    each,
    from_to_below,
    number,
    one_of,
    rules_of,
    whole,
)
from trl_ext.rrhf.sampling import SamplingConfig

NAN, INF = math.nan, math.inf
CONFIGS = [PPOMaxConfig, RewardModelConfig, RRHFConfig]
NO_NUMBERS = [NAN, INF, -INF, True, "1", [1], {}]


@pytest.mark.parametrize(
    ("rule", "good", "bad"),
    [
        (number(), [-1, 0, 2.5, 10**30], NO_NUMBERS),
        (above(0), [1e-30, 3], [0, -1, *NO_NUMBERS]),
        (at_least(0), [0, 1], [-1e-30, *NO_NUMBERS]),
        (at_most(1), [1, -5], [1.1, *NO_NUMBERS]),
        (between(0, 1), [0, 0.5, 1], [-0.1, 1.1, *NO_NUMBERS]),
        (above_to(0, 1), [0.5, 1], [0, 1.1, *NO_NUMBERS]),
        (from_to_below(0, 0.5), [0, 0.4], [0.5, -0.1, *NO_NUMBERS]),
        (whole(1), [1, 7], [0, 1.5, 1.0, *NO_NUMBERS]),
        (one_of(["a", "b"]), ["a"], ["c", 1, True]),
        (each(number()), [[], [1, 2.0], (3,)], [[1, NAN], [None], "12", 1, {"a": 1}]),
    ],
    ids=lambda value: getattr(value, "wording", None),
)
def test_rules_by_example(rule, good, bad):
    assert [value for value in good if not rule.holds(value)] == []
    assert [value for value in bad if rule.holds(value)] == []


@dataclass
class Options:
    size: Annotated[float, above(0, "half of it is fine")] = field(default=1.0, metadata={"help": "How large."})
    limit: Annotated[int | None, whole(1)] = field(default=None, metadata={"help": "How many."})
    learning_rate: float = 1e-3
    free: float = -1.0


def test_a_field_is_checked_by_its_own_rule_or_by_that_of_its_name():
    check_fields(Options())
    check_fields(Options(limit=3))
    for options, message in (
        ({"size": 0}, r"^size=0 must be a number above 0; half of it is fine\.$"),
        ({"size": None}, r"size=None must be a number above 0"),
        ({"limit": 0}, r"^limit=0 must be a whole number of at least 1, or null \(None\)\.$"),
        ({"learning_rate": NAN}, r"learning_rate=nan must be a number above 0\.$"),
    ):
        with pytest.raises(ValueError, match=message):
            check_fields(Options(**options))


def test_the_command_line_is_the_same_with_rules_as_without():
    parser = HfArgumentParser(Options)
    (options,) = parser.parse_args_into_dataclasses(["--size", "2", "--limit", "3"])
    assert (options.size, options.limit) == (2.0, 3)
    assert "How large." in parser.format_help()


def make(config, tmp_path, **options):
    return config(output_dir=str(tmp_path), **{"report_to": "none", "use_cpu": True} | options)


# What a configuration got and used in silence, or died of without naming it
ANY = {
    "learning_rate": [NAN, INF, -1e-5, 0, "1e-5", True],
    "weight_decay": [NAN, -0.1],
    "per_device_train_batch_size": [0, -1, 1.5],
    "per_device_eval_batch_size": [0],
    "gradient_accumulation_steps": [0, 1.5, True],
    "max_grad_norm": [NAN, -1],
    "max_steps": [0, -2, 1.5],
    "num_train_epochs": [-1, NAN],
    "warmup_steps": [NAN, -1],
    "logging_steps": [0, -1, 1.5, NAN],
    "eval_steps": [0],
    "save_steps": [0, 2.5],
    "adam_beta1": [1.0],
    "seed": [-1],
}
ONLINE = {"top_p": [0, 1.5, NAN], "temperature": [0, NAN], "reward_role_weight": [NAN, "1"]}
ONLINE |= {"reward_weights": [[NAN], [1.0, INF], 0.5, [None]]}
PPO = {"num_iterations": [0, 1.5], "steps_per_generation": [0], "generation_batch_size": [0], "epsilon": [1.5, NAN]}
PPO |= {"top_k": [-1, 1.5], "min_p": [2, NAN], "repetition_penalty": [0], "num_generations": [0, None]}
CASES = [(config, name, value) for config in CONFIGS for name, values in ANY.items() for value in values]
CASES += [(config, n, v) for config in (PPOMaxConfig, RRHFConfig) for n, values in ONLINE.items() for v in values]
CASES += [(PPOMaxConfig, name, value) for name, values in PPO.items() for value in values]
CASES += [(RewardModelConfig, "center_rewards_coefficient", -1), (RewardModelConfig, "max_length", 0)]


@pytest.mark.parametrize(("config", "name", "value"), CASES)
def test_every_configuration_refuses_by_name(tmp_path, config, name, value):
    with pytest.raises(ValueError) as error:
        make(config, tmp_path, **{name: value})
    assert f"{name}={value!r} must be" in str(error.value)


OF_A_KIND = {
    "bf16": "no",
    "fp16": NAN,
    "gradient_checkpointing": "false",
    "disable_tqdm": 3,
    "optim": (),
    "run_name": 3,
}
OF_A_KIND |= {"save_strategy": False, "lr_scheduler_type": "wavy", "accelerator_config": {"a": 1}, "label_names": "x"}
OF_A_KIND |= {"gradient_checkpointing_kwargs": "x", "parallelism_config": 3, "run_name": 3}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", OF_A_KIND)
def test_a_field_without_bounds_holds_what_its_type_says(tmp_path, config, name):
    with pytest.raises(ValueError) as error:
        make(config, tmp_path, **{name: OF_A_KIND[name]})
    assert f"{name}={OF_A_KIND[name]!r} must be" in str(error.value)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_train_epochs": 0}, r"num_train_epochs=0 and max_steps=-1 train nothing"),
        (
            {"max_steps": 10, "warmup_steps": 10},
            r"warmup_steps=10 warms .* for 10 of 10 optimizer steps: the whole run",
        ),
        ({"max_steps": 1, "warmup_steps": 0.5}, r"warmup_steps=0.5 warms .* for 1 of 1 optimizer steps"),
    ],
)
def test_a_run_that_would_train_nothing_is_refused(tmp_path, config, options, message):
    if config is PPOMaxConfig:
        options = options | {"critic_warmup_steps": 0}
    with pytest.raises(ValueError, match=message):
        make(config, tmp_path, **options)


@pytest.mark.parametrize("config", CONFIGS)
def test_what_is_fine_stays_fine(tmp_path, config):
    options = {"num_train_epochs": 0, "max_steps": 30, "max_grad_norm": 0, "logging_steps": 0.1, "save_steps": 5.0}
    made = make(config, tmp_path, **options, warmup_steps=3)
    assert made.max_steps == 30


@pytest.mark.parametrize("config", [*CONFIGS, SamplingConfig])
def test_every_number_of_ours_has_a_rule(config):
    """A new field without bounds is an oversight; a flag or a text needs none."""
    of_others = [base for base in config.__mro__ if not base.__module__.startswith("trl_ext")]
    inherited = set().union(*(getattr(base, "__dataclass_fields__", {}) for base in of_others))
    rules = rules_of(config)
    numbers = {
        name
        for name, own in config.__dataclass_fields__.items()
        if name not in inherited and any(kind in str(own.type) for kind in ("int", "float"))
    }
    assert len(numbers) > 1
    assert numbers - set(rules) == set()


def test_the_shared_table_names_fields_that_exist():
    known = set().union(*(config.__dataclass_fields__ for config in CONFIGS))
    assert set(INHERITED) - known == set()
