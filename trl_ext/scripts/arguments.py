"""Flags that several recipes have, and what of them goes together."""

from dataclasses import dataclass, field, fields
from typing import Any

from trl_ext.scripts.parsing import Given

# Flags of TRL's ModelConfig that shape a fresh adapter, and those that say how a base is loaded
LORA = (
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "lora_target_parameters",
    "lora_modules_to_save",
    "lora_task_type",
    "use_rslora",
    "use_dora",
)
ENSEMBLE = ("", "_coef", "_weights")
FOUR_BIT = ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage")
BASE = ("model_revision", "dtype", "attn_implementation", "load_in_8bit", "load_in_4bit", *FOUR_BIT)


@dataclass
class WorldArguments:
    """The embedded world, where no model is named."""

    world_seed: int | None = field(
        default=None, metadata={"help": "Embedded world: seed of its data and models. Default: `--seed`."}
    )
    world_scale: float = field(default=1.0, metadata={"help": "Embedded world: factor on its trainings, for tests."})


@dataclass
class PromptArguments:
    """Prompts, where the policy starts, and what scores its responses."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Prompts: Hub id, folder, or a jsonl/gz file with a column `prompt`."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset on the Hub."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_name: str | None = field(
        default=None,
        metadata={
            "help": "Prompts to evaluate on. Default: `dataset_name` with `--dataset_test_split`; without that, a "
            "tenth of the prompts, at most 1,000, by a hash of the prompt, which are then not trained on."
        },
    )
    dataset_test_split: str | None = field(
        default=None,
        metadata={"help": "Split to evaluate on. Default, with `--dataset_test_name`: test, or the only one."},
    )
    policy_adapter: str | None = field(
        default=None, metadata={"help": "LoRA adapter the policy starts from and stays near. Default: a fresh one."}
    )
    reward_adapter: list[str] | None = field(
        default=None,
        metadata={
            "help": "LoRA adapter of a reward model on the same base (trl-ext reward-model); several are an ensemble."
        },
    )
    reward_funcs: list[str] | None = field(
        default=None, metadata={"help": "Reward functions, path/to/file.py:function, or sequence classifiers by id."}
    )
    eval_prompts: int = field(default=256, metadata={"help": "Prompts of the evaluation before and after."})


@dataclass
class PPOArguments(WorldArguments, PromptArguments):
    """What trl-ext ppo-max needs beside `PPOMaxConfig` and `ModelConfig`."""

    critic_adapter: str | None = field(default=None, metadata={"help": "Default: a copy of the reward adapter."})
    adapter_dtype: str = field(
        default="float32",
        metadata={"help": "Of every role's adapter: float32, or bfloat16, half the memory and coarser updates."},
    )
    ptx_dataset_name: str | None = field(
        default=None, metadata={"help": "Texts for PPO-ptx: Hub id, folder or file. Needs `--ptx_coef`."}
    )
    auto_batch: bool = field(
        default=False,
        metadata={
            "help": "Choose micro-batch, accumulation, evaluation batch, and how many sequences are generated and "
            "scored at a time, for the card by the memory plan; those in an optimizer step and in a rollout batch stay."
        },
    )
    gpu: str = field(default="auto", metadata={"help": "Size of the card for --auto_batch, as in 24GB."})


@dataclass
class PreferenceArguments:
    """Where preferences come from."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Preferences or rankings: Hub id, folder, or a jsonl/json/gz/parquet file."}
    )
    dataset_format: str = field(
        default="auto",
        metadata={"help": "hh-rlhf, shp, summarize-from-feedback, webgpt, ultrafeedback, trl, ranking; or by columns."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset on the Hub."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_name: str | None = field(
        default=None, metadata={"help": "Preferences to evaluate on. Default: `dataset_name`, with another split."}
    )
    dataset_test_split: str | None = field(
        default=None,
        metadata={"help": "Split to evaluate on. Default: a tenth of the training split, held out by prompt."},
    )
    dataset_mixture: list[str] | None = field(
        default=None,
        metadata={
            "help": "In place of `dataset_name`: several sets by weight, name=set:weight each, as "
            "helpful=helpful.jsonl:2 harmless=harmless.jsonl:1. Accuracy is shown for each."
        },
    )
    deduplicate: bool = field(
        default=True, metadata={"help": "Remove from training what shares a prompt and response with the test rows."}
    )


def check_preference_flags(recipe: PreferenceArguments) -> None:
    """Check that there are preferences, from one place.

    Raises:
        ValueError: None, a set and a mixture, or a split to test on of a mixture.
    """
    if recipe.dataset_mixture:
        if recipe.dataset_name is not None:
            raise ValueError("--dataset_name and --dataset_mixture: give one of them.")
        if recipe.dataset_test_split is not None and recipe.dataset_test_name is None:
            raise ValueError("--dataset_test_split: with --dataset_mixture name the set too, --dataset_test_name.")
        mixture_of(recipe.dataset_mixture)
    elif recipe.dataset_name is None:
        raise ValueError("--dataset_name is missing: preferences by Hub id, folder or file.")


def mixture_of(specs: list[str]) -> dict[str, tuple[str, float]]:
    """Name -> set and weight, of name=set:weight each.

    Raises:
        ValueError: One that is not of this form, or a name that is there twice.
    """
    found: dict[str, tuple[str, float]] = {}
    for spec in specs:
        name, equals, rest = spec.partition("=")
        where, _, weight = rest.rpartition(":")
        try:
            number = float(weight)
        except ValueError:
            number = 0.0
        if not (name and equals and where and 0 < number < float("inf")) or name in found:
            raise ValueError(
                f"--dataset_mixture {spec}: give name=set:weight, a weight above 0 and each name once, as "
                "helpful=helpful.jsonl:2 harmless=harmless.jsonl:1."
            )
        found[name] = (where, number)
    return found


def names_of(*classes: Any) -> tuple[str, ...]:
    """Names of the flags of some dataclasses."""
    return tuple(f.name for each in classes for f in fields(each))


def check_model_flags(
    given: Given, model_args: Any, policy_adapter: str | None = None, task: str = "CAUSAL_LM"
) -> None:
    """Check that every flag of `ModelConfig` has an effect.

    Args:
        given: What was set.
        model_args: `ModelConfig`.
        policy_adapter: Brings a LoRA configuration of its own.
        task: The `task_type` that a fresh adapter gets here.

    Raises:
        ValueError: A flag that would be dropped.
    """
    if policy_adapter is not None:
        given.refuse(LORA, f"the policy starts at --policy_adapter {policy_adapter}, which brings its own. Drop one.")
    if model_args.lora_task_type != task:
        given.refuse(["lora_task_type"], f"adapters made here have the task type {task}. Drop it.")
    if not model_args.load_in_4bit:
        given.refuse(FOUR_BIT, "only a base in 4 bits has this. Set --load_in_4bit, or drop it.")


def check_world_flags(given: Given, in_world: bool, *brought: str) -> None:
    """Check that flags of the embedded world and of one's own model are not mixed.

    Args:
        given: What was set.
        in_world: Whether the run is in the embedded world.
        brought: Further flags that the world answers itself.

    Raises:
        ValueError: A flag that would be dropped.
    """
    if in_world:
        why = "without --model_name_or_path this is a run in the embedded world, which has its own. Name a model too."
        given.refuse([*BASE, "model_init_kwargs", "trust_remote_code", *brought], why)
    else:
        given.refuse(names_of(WorldArguments), "of the embedded world, and this run has a model of its own. Drop it.")


def check_prompt_flags(given: Given, recipe: Any) -> None:
    """Check that prompts are named, and that flags about rewards have something to act on.

    Args:
        given: What was set.
        recipe: With `dataset_name`, `reward_adapter` and `reward_funcs`.

    Raises:
        ValueError: No dataset, nothing that scores, or a flag that would be dropped.
    """
    if recipe.dataset_name is None:
        raise ValueError("--dataset_name is missing: a Hub id, a folder or a jsonl/gz file with a column `prompt`.")
    if not recipe.reward_adapter and not recipe.reward_funcs:
        raise ValueError("nothing scores the responses: give --reward_adapter, or --reward_funcs file.py:function.")
    if not recipe.reward_adapter:
        names = ["reward_role_weight", *(f"{of}ensemble{part}" for of in ("reward_", "") for part in ENSEMBLE)]
        given.refuse(names, "there is no reward role. Give --reward_adapter, or drop it.")
    if not recipe.reward_funcs:
        given.refuse(["reward_weights"], "there are no reward functions. Give --reward_funcs, or drop it.")
