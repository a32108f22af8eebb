"""Bounds and choices of a configuration's fields, declared at the field and checked in one place.

    kl_target: Annotated[float, above(0)] = field(default=6.0, metadata={"help": ...})

`Annotated` and not `metadata`, because transformers' `HfArgumentParser` hands all of a field's metadata to argparse,
and strips `Annotated`. None is fine for a field whose type says so. Fields that a configuration inherits from TRL or
transformers have their bounds in `INHERITED`. Every other field must hold what its type says: "false" is no bool.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from functools import cache, partial
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from transformers.trainer_pt_utils import AcceleratorConfig


@dataclass(frozen=True)
class Rule:
    """What the value of a field must be.

    Attributes:
        wording: What follows "name=value must be".
        holds: Whether a value is so. It is given anything but None.
        remedy: What to write instead, or "".
    """

    wording: str
    holds: Callable[[Any], bool]
    remedy: str = ""


def is_number(value: Any) -> bool:
    """A finite number; neither a bool nor a text that reads as one."""
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


def is_whole(value: Any) -> bool:
    """An integer that is no bool."""
    return not isinstance(value, bool) and isinstance(value, Integral)


def number() -> Rule:
    """Any finite number."""
    return Rule("a finite number", is_number)


def above(low: float, remedy: str = "") -> Rule:
    """A number greater than `low`."""
    return Rule(f"a number above {low:g}", lambda value: is_number(value) and value > low, remedy)


def at_least(low: float, remedy: str = "") -> Rule:
    """A number of `low` or more."""
    return Rule(f"a number of at least {low:g}", lambda value: is_number(value) and value >= low, remedy)


def at_most(high: float, remedy: str = "") -> Rule:
    """A number of `high` or less."""
    return Rule(f"a number of at most {high:g}", lambda value: is_number(value) and value <= high, remedy)


def between(low: float, high: float, remedy: str = "") -> Rule:
    """A number in [low, high]."""
    wording = f"a number between {low:g} and {high:g}"
    return Rule(wording, lambda value: is_number(value) and low <= value <= high, remedy)


def from_to_below(low: float, high: float, remedy: str = "") -> Rule:
    """A number in [low, high)."""
    wording = f"a number of at least {low:g} and below {high:g}"
    return Rule(wording, lambda value: is_number(value) and low <= value < high, remedy)


def above_to(low: float, high: float, remedy: str = "") -> Rule:
    """A number in (low, high]."""
    wording = f"a number above {low:g} and at most {high:g}"
    return Rule(wording, lambda value: is_number(value) and low < value <= high, remedy)


def whole(least: int, remedy: str = "") -> Rule:
    """A whole number of `least` or more."""
    return Rule(f"a whole number of at least {least}", lambda value: is_whole(value) and value >= least, remedy)


def one_of(choices: Sequence[str]) -> Rule:
    """One of several texts."""
    return Rule(f"one of {', '.join(choices)}", lambda value: value in choices)


def each(rule: Rule) -> Rule:
    """A list or tuple of which every entry is as `rule` says."""

    def holds(values: Any) -> bool:
        return isinstance(values, list | tuple) and all(value is not None and rule.holds(value) for value in values)

    return Rule(f"a list of which each is {rule.wording}", holds, rule.remedy)


def kind_of(hint: Any, choices: Sequence[Any] | None = None) -> Rule | None:
    """What a type annotation says of a value that is not None; None: anything.

    Args:
        hint: Of the field, without `Annotated`.
        choices: Of its metadata, where the command line has them.
    """
    members = [each for each in (get_args(hint) if get_origin(hint) in UNIONS else (hint,)) if each is not NoneType]
    kinds: list[Any] = [get_origin(member) or member for member in members]
    enums = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Enum)]
    if enums or choices:
        known = list(choices or [member.value for member in enums[0]])
        remedy = 'a yaml file needs quotes around "no"' if "no" in known else ""
        return Rule(
            f"one of {', '.join(map(str, known))}", lambda value: getattr(value, "value", value) in known, remedy
        )
    if Any in kinds or not kinds:
        return None
    if dict in kinds and str in kinds:
        return Rule("a mapping, or a JSON object as text", is_mapping)
    literal = [value for member in members if get_origin(member) is Literal for value in get_args(member)]
    checks = [KINDS.get(kind, (kind.__name__, partial(is_instance, kind))) for kind in kinds if kind is not Literal]
    wording = " or ".join([*(words for words, _ in checks), *map(repr, literal)])
    return Rule(
        wording, lambda value: any(holds(value) for _, holds in checks) or any(value is each for each in literal)
    )


def is_instance(kind: type, value: Any) -> bool:
    """`isinstance`, the other way round."""
    return isinstance(value, kind)


def is_mapping(value: Any) -> bool:
    """A mapping, or a text that is one in JSON, as on a command line."""
    if not isinstance(value, str):
        return isinstance(value, Mapping)
    try:
        return isinstance(json.loads(value), dict)
    except ValueError:
        return False


def is_accelerator_config(value: Any) -> bool:
    """Options of transformers' `AcceleratorConfig`, itself, or a JSON file of them."""
    if isinstance(value, AcceleratorConfig) or (isinstance(value, str | PathLike) and Path(value).is_file()):
        return True
    options = json.loads(value) if isinstance(value, str) and is_mapping(value) else value
    return isinstance(options, Mapping) and set(options) <= {field.name for field in fields(AcceleratorConfig)}


UNIONS = (Union, UnionType)
KINDS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    bool: ("true or false", lambda value: isinstance(value, bool)),
    int: ("a whole number", is_whole),
    float: ("a finite number", is_number),
    str: ("a text", lambda value: isinstance(value, str | PathLike)),
    list: ("a list", lambda value: isinstance(value, list | tuple)),
    tuple: ("a list", lambda value: isinstance(value, list | tuple)),
    dict: ("a mapping", lambda value: isinstance(value, Mapping)),
}

# From one log, evaluation or save to the next
STEPS = Rule(
    "a whole number of at least 1, or a share of all steps between 0 and 1",
    lambda value: is_number(value) and value > 0 and (value < 1 or value == int(value)),
    "the strategy 'no' switches it off",
)
# Fields of TrainingArguments, RLOOConfig and RewardConfig, which declare no bounds of their own
INHERITED = {
    "accelerator_config": Rule("options of transformers' AcceleratorConfig", is_accelerator_config),
    "adam_beta1": from_to_below(0, 1),
    "adam_beta2": from_to_below(0, 1),
    "adam_epsilon": above(0),
    "beta": at_least(0),
    "center_rewards_coefficient": at_least(0),
    "dataloader_num_workers": whole(0),
    "data_seed": whole(0),
    "dataloader_prefetch_factor": whole(1),
    "dataset_num_proc": whole(1),
    "ddp_bucket_cap_mb": whole(1),
    "ddp_timeout": whole(1),
    "eval_accumulation_steps": whole(1),
    "eval_delay": at_least(0),
    "eval_steps": STEPS,
    "epsilon": between(0, 1, "the ratio is clipped to 1 - epsilon, which is not negative"),
    "epsilon_high": at_least(0),
    "generation_batch_size": whole(1),
    "gradient_accumulation_steps": whole(1),
    "label_smoothing_factor": between(0, 1),
    "learning_rate": above(0),
    "logging_steps": STEPS,
    "deepspeed": Rule("a mapping, or a file", lambda value: isinstance(value, Mapping | str | PathLike)),
    "fsdp_config": Rule("a mapping, or a file", lambda value: isinstance(value, Mapping | str | PathLike)),
    "max_completion_length": whole(1),
    "max_grad_norm": at_least(0, "0 switches the clip off"),
    "max_length": whole(2),
    "max_steps": Rule(
        "-1, which leaves it to num_train_epochs, or a whole number of at least 1",
        lambda value: is_whole(value) and (value == -1 or value >= 1),
    ),
    "min_p": between(0, 1),
    "neftune_noise_alpha": at_least(0),
    "num_completions_to_print": whole(1),
    "num_generations": whole(1),
    "num_generations_eval": whole(1),
    "num_iterations": whole(1),
    "num_train_epochs": at_least(0),
    "pad_to_multiple_of": Rule("a whole number of at least 1", lambda value: str(value).isdecimal() and int(value) > 0),
    "per_device_eval_batch_size": whole(1),
    "per_device_train_batch_size": whole(1),
    "repetition_penalty": above(0, "1 switches it off"),
    "reward_weights": each(number()),
    "save_steps": STEPS,
    "save_total_limit": whole(1),
    "seed": Rule("a whole number from 0 to 2**32 - 1", lambda value: is_whole(value) and 0 <= value < 2**32),
    "steps_per_generation": whole(1),
    "temperature": above(0),
    "torch_empty_cache_steps": whole(1),
    "top_k": whole(0, "0 switches it off"),
    "top_p": above_to(0, 1, "1 switches it off"),
    "warmup_steps": at_least(0),
    "weight_decay": at_least(0),
}
# Those of which libraries say that they may be None, and then do without
NEVER_NONE = {"max_completion_length", "num_generations"}
NONE_TOO = {"debug"}  # where the command line has not been given it


@cache
def rules_of(config: Any, bounded: bool = True) -> dict[str, tuple[Rule, bool]]:
    """For each bounded field of a dataclass its rule, or for each other that of its type; and whether None is fine."""
    rules, hints = {}, get_type_hints(config, include_extras=True)
    for field in fields(config):
        name = field.name
        hint, rule = hints[name], INHERITED.get(name)
        if get_origin(hint) is Annotated:
            hint, *extras = get_args(hint)
            rule = next((extra for extra in extras if isinstance(extra, Rule)), rule)
        if (rule is not None) != bounded:
            continue
        rule = rule or kind_of(hint, field.metadata.get("choices"))
        if rule is not None:
            rules[name] = rule, (NoneType in get_args(hint) or name in NONE_TOO) and name not in NEVER_NONE
    return rules


def check_fields(args: Any) -> None:
    """Check every field of a configuration against its rule, or its type.

    Call it before anything computes with the fields: where `__post_init__` begins.

    Args:
        args: An instance of a dataclass.

    Raises:
        ValueError: A field that is out of its bounds, not of its kind, or none of its choices: name, value and remedy.
    """
    kind: Any = type(args)
    defaults = {field.name: field.default for field in fields(args)}
    for name, (rule, optional) in (rules_of(kind) | rules_of(kind, bounded=False)).items():
        value = getattr(args, name)
        if value is defaults[name] or (value is None and optional):
            continue
        if value is None or not rule.holds(value):
            remedy = f"; {rule.remedy}" if rule.remedy else ", or null (None)" if optional else ""
            raise ValueError(f"{name}={value!r} must be {rule.wording}{remedy}.")


def check_schedule(args: Any) -> None:
    """Check that a run of these `TrainingArguments` trains at all, and longer than its learning rate warms up.

    Args:
        args: After their `__post_init__`.

    Raises:
        ValueError: Nothing would be trained, or the warm-up is as long as the run.
    """
    if args.max_steps < 1 and args.num_train_epochs <= 0:
        raise ValueError(
            f"num_train_epochs={args.num_train_epochs!r} and max_steps={args.max_steps} train nothing: set one of them "
            "above 0."
        )
    if args.max_steps >= 1:
        check_warmup(args, args.max_steps)


def check_warmup(args: Any, steps: int) -> None:
    """Check that the learning rate warms up in fewer optimizer steps than there are.

    Raises:
        ValueError: The whole run would be warm-up.
    """
    warmup = args.get_warmup_steps(steps)
    if warmup >= steps and warmup > 0:
        raise ValueError(
            f"warmup_steps={args.warmup_steps:g} warms the learning rate up for {warmup} of {steps} optimizer steps: "
            "the whole run. Lower it, or train longer."
        )
