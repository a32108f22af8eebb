"""Finished policies on prompts: by which rewards, from which reference, and what each policy writes.

What is not given is taken from the run that the adapter comes from, by its `run.json`: the same base, held-out prompts,
reward adapters and lengths. Files of reward functions are never run unless a flag names them.
"""

import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from trl import ModelConfig

from trl_ext import PPOMaxConfig, RRHFConfig
from trl_ext.ops.ensemble import ENSEMBLE_MODES, check_weights
from trl_ext.report.comparison import REFERENCE, Policy
from trl_ext.report.evaluation import answered, sample_lines
from trl_ext.report.loading import load_run
from trl_ext.report.samples import keyed
from trl_ext.rrhf import SamplingConfig
from trl_ext.scripts.arguments import BASE, LORA, PPOArguments, check_model_flags
from trl_ext.scripts.finished_runs import is_run, reward_folders
from trl_ext.scripts.inputs import first_prompts, load_reward_functions
from trl_ext.scripts.models import base_options, config_options, placed, quantization_of, tokenizer_of
from trl_ext.scripts.parsing import FlagParser, Given
from trl_ext.scripts.prompts_to_answer import PROMPTS, choose_prompts, fill_names

NONE = "none"
# Options of a run's score -> ours
OWN_SCORE = {
    "reward_ensemble": "ensemble",
    "reward_ensemble_coef": "ensemble_coef",
    "reward_ensemble_weights": "ensemble_weights",
    "reward_role_weight": "reward_role_weight",
}
NEW_TOKENS = 256


@dataclass
class EvaluationArguments:
    """What finished policies are evaluated on, and by what."""

    reference_adapter: str | None = field(
        default=None,
        metadata={
            "help": "Where the policy started: KL is measured from it. Default: the run's own `reference` folder, else "
            "the base; `none`: the base."
        },
    )
    reward_adapter: list[str] | None = field(
        default=None, metadata={"help": "Adapters of reward models on the same base. Default: those of the run."}
    )
    ensemble: str = field(default="mean", metadata={"help": "How several make one score: mean, min or variance."})
    ensemble_coef: float = field(default=0.5, metadata={"help": "variance: mean - coef * variance."})
    ensemble_weights: list[float] | None = field(
        default=None, metadata={"help": "Of the reward adapters, one for each. Default: the run's, else all the same."}
    )
    reward_funcs: list[str] | None = field(
        default=None, metadata={"help": "Reward functions, path/to/file.py:function, or sequence classifiers by id."}
    )
    reward_weights: list[float] | None = field(default=None, metadata={"help": "One for each of `reward_funcs`."})
    reward_role_weight: float = field(
        default=1.0, metadata={"help": "Weight of the reward adapters' score. Default: the run's, else 1."}
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Data that prompts are held out of: Hub id, folder, or a jsonl/gz file with a column `prompt`. "
            "What a run was trained on is split as the run has split it; of other data a tenth is taken, by a hash. "
            "Default: the run's."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset on the Hub."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split that prompts are held out of."})
    dataset_test_name: str | None = field(
        default=None,
        metadata={
            "help": "Prompts to answer, all of them; `dataset_name` is not needed then. Default: those that the run "
            "held out, or was evaluated on."
        },
    )
    dataset_test_split: str | None = field(
        default=None, metadata={"help": "Split to answer. Default: test, or the only one."}
    )
    eval_prompts: int = field(default=256, metadata={"help": "Of the prompts, the first so many."})
    max_new_tokens: int | None = field(
        default=None, metadata={"help": f"Longest completion, tokens. Default: the run's, else {NEW_TOKENS}."}
    )
    chat_template_kwargs: str | None = field(
        default=None, metadata={"help": "Options of the chat template as JSON. Default: the run's."}
    )
    seed: int = field(default=42, metadata={"help": "Every prompt has random numbers of its own from it."})
    batch_size: int = field(default=64, metadata={"help": "Completions sampled and scored at a time."})
    output_dir: str = field(default="runs/evaluation", metadata={"help": "Where table, samples, picture and page go."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Let the model bring code of its own."})


def parse_evaluation(kind: Any, command: str, arguments: Sequence[str]) -> tuple[Any, ModelConfig, Given]:
    """Flags over config file over defaults; of a run's config file what evaluations do not have is passed over.

    Args:
        kind: `EvaluationArguments`, or what is more than that.
        command: Of `trl-ext`.

    Raises:
        ValueError: A flag or a value that cannot be honoured.
    """
    parser = FlagParser(
        (kind, ModelConfig), command, passed_over=(PPOArguments, PPOMaxConfig, RRHFConfig, SamplingConfig)
    )
    recipe, model_args, given = parser.parse(arguments)
    on_line = given.on_command_line()
    on_line.refuse([*LORA, "use_peft"], "nothing is trained here: the adapters bring their own. Drop it.")
    check_model_flags(on_line, model_args)
    for name in ("eval_prompts", "batch_size", "max_new_tokens"):
        value = getattr(recipe, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value}: give at least 1.")
    if recipe.ensemble not in ENSEMBLE_MODES:
        raise ValueError(f"--ensemble {recipe.ensemble}: use one of {', '.join(ENSEMBLE_MODES)}.")
    if recipe.chat_template_kwargs is not None:
        options_of_template(recipe.chat_template_kwargs)
    return recipe, model_args, given


def options_of_template(text: str) -> dict[str, Any]:
    """The options of a chat template from JSON.

    Raises:
        ValueError: It is no JSON object.
    """
    try:
        options = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--chat_template_kwargs {text}: no JSON: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(
            f"--chat_template_kwargs {text}: give a JSON object, such as '{{\"enable_thinking\": false}}'."
        )
    return options


# ---------------------------------------------------------------------- what the run says


def fill_from_run(recipe: Any, model_args: ModelConfig, given: Given, adapter: str) -> dict[str, Any]:
    """Set what was not given from the run that has made an adapter.

    Returns:
        The run's options, configuration included; empty where the adapter is of no run.

    Raises:
        ValueError: Its reward needs functions, which only a flag may name.
    """
    known = load_run(adapter).configuration if is_run(adapter) else {}
    for name in (*BASE, "model_name_or_path"):
        if name not in given and known.get(name) is not None:
            setattr(model_args, name, known[name])
    fill_names(recipe, given, known)
    if recipe.max_new_tokens is None:
        recipe.max_new_tokens = known.get("max_new_tokens") or known.get("max_completion_length") or NEW_TOKENS
    if recipe.chat_template_kwargs is None and isinstance(known.get("chat_template_kwargs"), dict):
        recipe.chat_template_kwargs = json.dumps(known["chat_template_kwargs"])
    folder = Path(adapter)
    if recipe.reference_adapter is None and (folder / REFERENCE).is_dir():
        recipe.reference_adapter = str(folder / REFERENCE)
    if recipe.reward_adapter is None and recipe.reward_funcs is None:
        own = reward_folders(folder)
        recipe.reward_adapter = [str(path) for path in own] or None
        if known.get("reward_funcs"):
            names = " ".join(known["reward_funcs"])
            raise ValueError(
                f"{adapter} was trained with --reward_funcs {names}, which are run only where a flag names them. Give "
                "them again, or another --reward_funcs or --reward_adapter."
            )
        for name, ours in OWN_SCORE.items():
            if ours not in given and known.get(name) is not None:
                setattr(recipe, ours, known[name])
    return known


# ---------------------------------------------------------------------- prompts, model, answers


@dataclass
class Setting:
    """What all policies of an evaluation have in common.

    Attributes:
        recipe, model_args: As filled.
        prompts: Rows that are answered.
        said: Which these are, a sentence.
        tokenizer: Of the base.
        functions: Reward functions.
        gold: A reward that nobody trained on, in the embedded world.
    """

    recipe: Any
    model_args: ModelConfig
    prompts: Any
    said: str
    tokenizer: Any
    functions: list[Any]
    gold: Any = None

    def facts(self) -> dict[str, Any]:
        """What files and pages say of it."""
        recipe = self.recipe
        names = (
            "reward_adapter",
            "reward_funcs",
            "reward_weights",
            "reward_role_weight",
            "ensemble",
            "ensemble_weights",
            "reference_adapter",
            *PROMPTS,
            "max_new_tokens",
            "seed",
        )
        known = {
            "base": self.model_args.model_name_or_path,
            "random_numbers": "those of a prompt are every policy's",
            "answered": self.said,
        }
        return known | {name: getattr(recipe, name) for name in names}


def make_setting(recipe: Any, model_args: ModelConfig, given: Given, adapter: str, show: Callable[..., Any]) -> Setting:
    """Prompts, tokenizer and rewards by the flags and by the run of the first adapter; no model is loaded.

    Raises:
        ValueError: What is missing, or data that cannot be evaluated on.
    """
    from trl_ext.roles import read_adapter

    known = fill_from_run(recipe, model_args, given, adapter)
    if recipe.reference_adapter == NONE:
        recipe.reference_adapter = None
    config = read_adapter(adapter, f"policy {adapter}").config
    model_args.model_name_or_path = model_args.model_name_or_path or config.base_model_name_or_path
    chosen = choose_prompts(recipe, known, adapter, Path(str(model_args.model_name_or_path)))
    show(chosen.said)
    if recipe.reward_adapter is None and recipe.reward_funcs is None:
        raise ValueError("nothing scores the completions: give --reward_adapter, or --reward_funcs file.py:function.")
    if recipe.reward_adapter is None:
        refused = ["ensemble", "ensemble_coef", "ensemble_weights", "reward_role_weight"]
        given.refuse(refused, "there is no reward adapter. Drop it.")
    else:
        check_weights(recipe.ensemble_weights, recipe.ensemble, len(recipe.reward_adapter))
    functions = load_reward_functions(recipe.reward_funcs, recipe.reward_weights)
    if recipe.reward_weights is not None and not functions:
        raise ValueError("--reward_weights: there are no reward functions. Give --reward_funcs, or drop it.")
    more = [name for name in ("responses", "scores", "truncated") if name in chosen.prompts.column_names]
    prompts = first_prompts(chosen.prompts.remove_columns(more), recipe.eval_prompts)  # without what RRHF trains on
    tokenizer = tokenizer_of(model_args, recipe)
    setting = Setting(recipe, model_args, prompts, chosen.said, tokenizer, functions, chosen.gold)
    check_room(setting)
    return setting


def encoder_for(setting: Setting, config: Any) -> Any:
    """The `TextEncoder` of an evaluation."""
    from trl_ext.text import TextEncoder, end_token_ids

    options = None
    if setting.recipe.chat_template_kwargs is not None:
        options = options_of_template(setting.recipe.chat_template_kwargs)
    return TextEncoder(setting.tokenizer, end_token_ids(setting.tokenizer, config), options)


def check_room(setting: Setting) -> None:
    """Check that the base has positions for every prompt and a completion of the length asked for.

    Raises:
        ValueError: It has not, for the row that is named.
    """
    from trl_ext.roles import load_base_config, max_positions
    from trl_ext.text import load_generation_config

    name, recipe = str(setting.model_args.model_name_or_path), setting.recipe
    positions = max_positions(load_base_config(name, **config_options(setting.model_args, recipe)))
    if positions is None:
        return
    encoder = encoder_for(setting, load_generation_config(name, **config_options(setting.model_args, recipe)))
    lengths = encoder.prompt_lengths(setting.prompts["prompt"])
    row = max(range(len(lengths)), key=lengths.__getitem__)
    needed = lengths[row] + recipe.max_new_tokens + encoder.added_length(setting.prompts[row]["prompt"])
    if needed > positions:
        raise ValueError(
            f"row {row}: a prompt of {lengths[row]} tokens and a completion of {recipe.max_new_tokens} "
            f"(--max_new_tokens) exceed the model's {positions} positions. Lower it, or drop long prompts."
        )


def evaluated(setting: Setting, adapters: Sequence[tuple[str, str]]) -> list[Policy]:
    """What the reference and each policy write to the prompts, on one process or shared among several.

    Args:
        setting: What they have in common.
        adapters: (name, folder or Hub id) of each policy.

    Returns:
        The reference, then the policies; whole on every process.
    """
    from trl_ext.roles import Role, swap_policy

    found: list[Policy] = []
    model: Any = None
    for name, adapter in adapters:
        if model is None or not swap_policy(model, adapter):
            model = None  # freed before the next one is loaded
            gc.collect()
            model = policy_model(setting, adapter)
        if not found:
            found.append(Policy(REFERENCE, answers(setting, model, REFERENCE, Role.REFERENCE)))
        found.append(Policy(name, answers(setting, model, name, Role.POLICY)))
    return found


def policy_model(setting: Setting, adapter: str) -> Any:
    """The base with a tuned policy, its reference and the reward role, where this process computes."""
    from trl_ext.roles import tuned_policy

    recipe, model_args = setting.recipe, setting.model_args
    rewards: Any = recipe.reward_adapter
    loaded = tuned_policy(
        str(model_args.model_name_or_path),
        adapter,
        recipe.reference_adapter,
        rewards,
        quantization_of(model_args),
        **base_options(model_args, recipe),
    )
    return placed(loaded)


def answers(setting: Setting, model: Any, name: str, role: Any) -> dict[str, Any]:
    """key -> sample by the policy or the reference of a model; each process writes every n-th one."""
    from trl_ext.scoring import ResponseScorer

    recipe, state = setting.recipe, PartialState()
    encoder = encoder_for(setting, model.generation_config)
    scorer = ResponseScorer(
        model,
        encoder,
        setting.functions,
        reward_weights=recipe.reward_weights,
        role_weight=recipe.reward_role_weight,
        ensemble=recipe.ensemble,
        ensemble_coef=recipe.ensemble_coef,
        ensemble_weights=recipe.ensemble_weights,
    )
    own = list(range(state.process_index, len(setting.prompts), state.num_processes))
    rows = answered(
        model,
        encoder,
        setting.prompts,
        scorer,
        max_new_tokens=recipe.max_new_tokens,
        seed=recipe.seed,
        gold=setting.gold,
        batch_size=recipe.batch_size,
        role=role,
        indices=own,
        name=name,
    )
    placed = list(zip(own, sample_lines(rows, encoder), strict=True))
    placed = sorted(gather_object(placed) if state.num_processes > 1 else placed, key=lambda pair: pair[0])
    return {line["key"]: line for line in keyed([line for _, line in placed], len(placed))}
