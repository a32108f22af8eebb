"""Data and reward functions by name, checked before a model is loaded."""

import contextlib
import difflib
import hashlib
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset

from trl_ext.data import deduplicate, has_splits, load_preferences, load_split, mix_datasets
from trl_ext.scripts.arguments import (
    PreferenceArguments,
    PromptArguments,
    WorldArguments,
    check_preference_flags,
    mixture_of,
)
from trl_ext.scripts.held_out import split_by_prompt
from trl_ext.scripts.running import printer
from trl_ext.text import check_prompts

TOY_PAIRS, TOY_TEST_PAIRS = 2560, 1000
HELD_OUT, HELD_OUT_AT_MOST = 0.1, 1000
WORLD_DATA = "embedded world of trl_ext"  # what cards call its data
PROMPT_COLUMNS = ("prompts", "question", "questions", "instruction", "query", "input", "text", "messages")


# ---------------------------------------------------------------------- reward functions


def load_reward_function(spec: str) -> str | Callable[..., Any]:
    """`path/to/file.py:function` as that function; anything else as the id of a sequence-classification model.

    The file becomes a module under a name of its own, so that one called torch.py or json.py replaces none.

    Raises:
        ValueError: No such file or function, or a file that cannot be imported.
    """
    stem, found, name = spec.rpartition(".py:")
    if spec.endswith(".py"):
        known = f": it has {', '.join(_functions(spec))}" if Path(spec).is_file() else ""
        raise ValueError(f"--reward_funcs {spec}: name the function too, as in {spec}:reward{known}.")
    if not found:
        return spec
    path = Path(f"{stem}.py")
    if not path.is_file():
        raise ValueError(f"--reward_funcs {spec}: there is no file {path.resolve()}.")
    function = getattr(_module(path), name, None)
    if not callable(function):
        raise ValueError(
            f"--reward_funcs {spec}: {path} has no function {name!r}, only {', '.join(_functions(str(path)))}."
        )
    return function


def load_reward_functions(specs: list[str] | None, weights: list[float] | None = None) -> list[Any]:
    """`load_reward_function` of each.

    Raises:
        ValueError: See there; or not one weight for each.
    """
    functions = [load_reward_function(spec) for spec in specs or []]
    if weights is not None and len(weights) != len(functions):
        counts = f"{len(weights)} numbers for {len(functions)} --reward_funcs"
        raise ValueError(f"--reward_weights has {counts}: give one for each.")
    return functions


def _module(path: Path) -> Any:
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    name = f"trl_ext_reward_{path.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        what = f"--reward_funcs {path} cannot be imported: {type(error).__name__}: {error}"
        raise ValueError(f"{what}. Mend the file: `python {path}` must run.") from error
    return module


def _functions(file: str) -> list[str]:
    with contextlib.suppress(ValueError):
        module = _module(Path(file))
        own = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
        return [name for name in own if callable(getattr(module, name)) and not name.startswith("_")] or ["none"]
    return ["none that can be imported"]


# ---------------------------------------------------------------------- prompts


def load_prompts(recipe: PromptArguments, show: Callable[..., Any] = print) -> tuple[Dataset, Dataset]:
    """Prompts to train on and prompts to evaluate on, by name; where the second are none of their own, it is said.

    Args:
        recipe: Without a test set, prompts are held out of the training: `hold_out`.
        show: Prints, in the main process.

    Raises:
        ValueError: A split that is not there, or rows that are no prompts.
    """
    train = training_prompts(recipe)
    if recipe.dataset_test_name is None and recipe.dataset_test_split is None:
        train, test = hold_out(train)
        if test is train:
            show(f"Evaluation: on prompts that are trained on too; {recipe.dataset_name} has too few to hold some out.")
        else:
            show(f"Evaluation: {len(test):,} rows held out, by a hash of the prompt; {len(train):,} are trained on.")
        return train, test
    test, name = test_prompts(recipe)
    trained = {_digest(prompt) for prompt in train["prompt"]}
    known = sum(_digest(prompt) in trained for prompt in test["prompt"])
    if known:
        show(f"Evaluation: {known:,} of the {len(test):,} prompts of {name} are trained on too.")
    return train, test


def training_prompts(recipe: Any) -> Dataset:
    """The rows of `dataset_name`, those included that `hold_out` takes away.

    Raises:
        ValueError: A split that is not there, or rows that are no prompts.
    """
    train = load_split(recipe.dataset_name, recipe.dataset_train_split, config=recipe.dataset_config)
    check_prompt_rows(train, recipe.dataset_name)
    return train


def test_prompts(recipe: Any) -> tuple[Dataset, str]:
    """Prompts that are named to evaluate on, and what to call them.

    Raises:
        ValueError: A split that is not there, or rows that are no prompts.
    """
    name = recipe.dataset_test_name or recipe.dataset_name
    if name is None:
        raise ValueError(f"--dataset_test_split {recipe.dataset_test_split}: of what? Give --dataset_test_name.")
    split = recipe.dataset_test_split or ("test" if has_splits(name) else "train")
    config = recipe.dataset_config if recipe.dataset_name in (name, None) else None
    test = load_split(name, split, config=config)
    called = f"{name} (split {split})" if has_splits(name) else name
    check_prompt_rows(test, called)
    return test, called


def hold_out(dataset: Dataset) -> tuple[Dataset, Dataset]:
    """Rows to train on and rows held out: a tenth of the different prompts, at most `HELD_OUT_AT_MOST`, by their hash.

    Which ones does not depend on the order of the rows. All rows of a prompt are on one side. A dataset of fewer than
    ten different prompts is returned twice.
    """
    digests = [_digest(prompt) for prompt in dataset["prompt"]]
    different = sorted(set(digests))
    held = set(different[: min(HELD_OUT_AT_MOST, int(HELD_OUT * len(different)))])
    if not held:
        return dataset, dataset
    sides = [[i for i, digest in enumerate(digests) if (digest in held) == out] for out in (False, True)]
    return dataset.select(sides[0]), dataset.select(sides[1])


def _digest(prompt: Any) -> str:
    return hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).hexdigest()


def check_prompt_rows(dataset: Dataset, name: str) -> None:
    """Check that a dataset has prompts, and nothing else in their place.

    Raises:
        ValueError: What is missing; and the column that was probably meant.
    """
    columns = dataset.column_names
    if "prompt" not in columns:
        near = [column for column in PROMPT_COLUMNS if column in columns]
        near = near or difflib.get_close_matches("prompt", columns, n=1)
        meant = f" Rename {near[0]!r}: dataset.rename_column({near[0]!r}, 'prompt')." if near else " Rename one to it."
        raise ValueError(f"{name} has no column 'prompt', only {columns}.{meant}")
    if not len(dataset):
        raise ValueError(f"{name} is empty: give at least one prompt.")
    check_prompts(dataset["prompt"], name)


def first_prompts(dataset: Dataset, count: int) -> Dataset:
    """The first prompts, for the evaluation before and after.

    Raises:
        ValueError: Fewer than one was asked for.
    """
    if count < 1:
        raise ValueError(f"--eval_prompts {count}: the evaluation before and after needs at least 1.")
    return dataset.select(range(min(count, len(dataset))))


# ---------------------------------------------------------------------- preferences


def load_preference_splits(
    recipe: PreferenceArguments, seed: int, show: Callable[..., Any] = print
) -> tuple[Dataset, Dataset]:
    """Training and test rows by name, converted and checked, with a printed report of what was left out.

    Test rows that are held out of the training rows have prompts that these have not.

    Raises:
        ValueError: No dataset, a split that is not there, or no row that is not in the test set.
    """
    check_preference_flags(recipe)
    if recipe.dataset_mixture:
        train = load_mixture(recipe, seed, show)
    else:
        train, report = load_preferences(
            str(recipe.dataset_name), recipe.dataset_format, recipe.dataset_train_split, config=recipe.dataset_config
        )
        show(report)
    if recipe.dataset_test_name is None and recipe.dataset_test_split is None:
        count = max(1, min(HELD_OUT_AT_MOST, round(HELD_OUT * len(train))))
        if count == len(train):
            named = recipe.dataset_name or "the mixture"
            raise ValueError(f"{named} has one usable row: it cannot be trained and tested on.")
        train, test = split_by_prompt(train, count, seed, show)
    else:
        name = str(recipe.dataset_test_name or recipe.dataset_name)
        split = recipe.dataset_test_split or ("test" if has_splits(name) else "train")
        test, report = load_preferences(name, recipe.dataset_format, split, config=recipe.dataset_config)
        show(report)
    if recipe.deduplicate:
        train, report = deduplicate(train, test)
        show(report)
        if not len(train):
            raise ValueError("every training row is in the test set too: name other rows to test on.")
    return train, test


def load_mixture(recipe: PreferenceArguments, seed: int, show: Callable[..., Any] = print) -> Dataset:
    """The sets of `--dataset_mixture` as one, with a printed report of each.

    Raises:
        ValueError: See `mixture_of`, `load_preferences` and `mix_datasets`.
    """
    mixture = mixture_of(recipe.dataset_mixture or [])
    sets = {}
    for name, (where, _) in mixture.items():
        sets[name], report = load_preferences(
            where, recipe.dataset_format, recipe.dataset_train_split, config=recipe.dataset_config
        )
        show(report)
    mixed = mix_datasets(sets, {name: weight for name, (_, weight) in mixture.items()}, seed)
    counts = {name: mixed["source"].count(name) for name in sets}
    show("mixture: " + ", ".join(f"{count:,} rows of {name}" for name, count in counts.items()))
    return mixed


# ---------------------------------------------------------------------- the embedded world


def toy_world(recipe: WorldArguments, training: Any) -> Any:
    """The embedded world of a run: built under its output folder, or loaded from there."""
    from trl_ext.toy import build_world

    seed = training.seed if recipe.world_seed is None else recipe.world_seed
    folder = Path(training.output_dir) / "world"
    kept = "loading the one that is there" if any(folder.glob("world-*")) else "building one: some minutes on a CPU"
    printer()(f"No --model_name_or_path, so this is the embedded world, in {folder} ({kept}).", flush=True)
    return build_world(folder, seed, scale=recipe.world_scale)


def toy_preferences(recipe: WorldArguments, training: Any) -> tuple[Any, Dataset, Dataset]:
    """The embedded world, its noisy training pairs, and test pairs that the gold reward has labelled."""
    import random

    from trl_ext.toy.task import preference_pairs

    world = toy_world(recipe, training)
    seed = training.seed if recipe.world_seed is None else recipe.world_seed
    count = max(64, round(TOY_PAIRS * min(1.0, recipe.world_scale)))
    train = Dataset.from_list(preference_pairs(count, random.Random(f"preferences-{seed}")))
    test = preference_pairs(TOY_TEST_PAIRS, random.Random(f"test-{seed}"), temperature=0, split="eval")
    return world, train, Dataset.from_list(test)
