"""Which prompts finished policies answer: those that a run held out, or others by name; and who was trained on them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from trl_ext.report.loading import load_run
from trl_ext.run_identity import data_facts
from trl_ext.scripts.arguments import PromptArguments
from trl_ext.scripts.finished_runs import in_world, is_run
from trl_ext.scripts.held_out import prompt_key
from trl_ext.scripts.inputs import hold_out, load_prompts, test_prompts, training_prompts
from trl_ext.scripts.parsing import Given
from trl_ext.scripts.running import options_of

TRAINING, TEST = ("dataset_name", "dataset_config", "dataset_train_split"), ("dataset_test_name", "dataset_test_split")
PROMPTS = (*TRAINING, *TEST)
CONTENT = "content of train_dataset"
WORLD = ("world_scale", "world_seed", "seed")  # by these a run in the embedded world has its prompts


@dataclass
class Chosen:
    """Prompts to answer.

    Attributes:
        prompts: Rows.
        said: What they are, a sentence for a reader.
        gold: A reward that nobody trained on, in the embedded world.
    """

    prompts: Dataset
    said: str
    gold: Any = None


def fill_names(recipe: Any, given: Given, known: dict[str, Any]) -> None:
    """Set the names of the prompts that were not given from a run's.

    Data that the run was trained on is split as the run has split it; a test set named without training data stands
    alone.

    Args:
        recipe: With the fields `PROMPTS`.
        known: The run's options; empty where the adapter is of no run.
    """
    whole = options_of(recipe)  # as run.json has them
    recipe.dataset_name, recipe.dataset_test_name = whole["dataset_name"], whole["dataset_test_name"]
    if "dataset_name" in given:
        if recipe.dataset_name != known.get("dataset_name"):
            return
    elif "dataset_test_name" in given:
        return
    tested = any(name in given for name in TEST)
    for name in TRAINING if tested else PROMPTS:
        if name not in given and known.get(name) is not None:
            setattr(recipe, name, known[name])


def choose_prompts(recipe: Any, known: dict[str, Any], adapter: str, base: Path) -> Chosen:
    """The prompts by their names, or those of the run's embedded world, or those that its evaluations wrote down.

    Args:
        recipe: As filled by `fill_names`.
        known: The run's options; empty where the adapter is of no run.
        adapter: The first policy that is evaluated.
        base: Folder of the base, in the embedded world.

    Raises:
        ValueError: No prompts are named, or rows that are none.
    """
    if in_world(known, recipe):
        prompts, gold = world_prompts(known, base)
        return Chosen(prompts, f"Prompts: those of the embedded world that {adapter} was not trained on.", gold)
    if recipe.dataset_test_name is not None or recipe.dataset_test_split is not None:
        test, name = test_prompts(recipe)
        own = names_same(PromptArguments(**named(known)), recipe)
        return Chosen(test, f"Prompts: {name}, on which {adapter} was evaluated." if own else f"Prompts: {name}.")
    name = recipe.dataset_name
    if name is None:
        recorded = recorded_prompts(adapter)
        if not recorded:
            raise ValueError(
                "--dataset_test_name is missing: prompts by Hub id, folder or file. "
                f"{adapter} names none and has written down none."
            )
        return Chosen(Dataset.from_list(recorded), f"Prompts: those that {adapter} was evaluated on, as it has them.")
    rows = training_prompts(recipe)
    train, test = hold_out(rows)
    if test is rows:
        return Chosen(test, f"Prompts: all of {name}, which has too few to hold some out.")
    if not names_same(PromptArguments(**named(known)), recipe):
        return Chosen(
            test,
            f"Prompts: a tenth of those of {name}, drawn by a hash. --dataset_test_name {name} takes all of them.",
        )
    held = {prompt_key(prompt) for prompt in test["prompt"]}
    recorded = recorded_prompts(adapter)
    missing = sum(prompt_key(row["prompt"]) not in held for row in recorded)
    if missing or (recorded and not same_content(adapter, train)):
        return Chosen(
            Dataset.from_list(recorded),
            f"Prompts: those that {adapter} was evaluated on, as it has them, without other columns: {name} has "
            "changed since, and would hold out others.",
        )
    return Chosen(test, f"Prompts: those of {name} that {adapter} held out of its training, by a hash.")


def recorded_prompts(adapter: str) -> list[dict[str, Any]]:
    """Rows with the prompts of a run's last whole evaluation, in order; none where it was not evaluated."""
    evaluations = load_run(adapter).evaluations if is_run(adapter) else {}
    whole = [step for step, lines in evaluations.items() if not any(line.get("part") for line in lines.values())]
    return [{"prompt": line["prompt"]} for line in evaluations[max(whole)].values()] if whole else []


def same_content(adapter: str, train: Dataset) -> bool:
    """Whether a run was trained on these rows; of one that has not written that down it is taken to be so.

    RRHF writes down its responses, and not the prompts that they are of.
    """
    info = load_run(adapter).info if is_run(adapter) else {}
    content = (info.get("identity") or {}).get(CONTENT) if info.get("method") == "PPO-Max" else None
    return content is None or content == data_facts("train_dataset", train)[CONTENT]


def world_prompts(known: dict[str, Any], base: Path) -> tuple[Any, Any]:
    """Held-out prompts and gold reward of the embedded world that a run was in.

    Raises:
        ValueError: The world is not there any more, or another version would build another one.
    """
    from trl_ext.toy import build_world, gold_reward

    seed = known["seed"] if known.get("world_seed") is None else known["world_seed"]
    if not base.is_dir():
        raise ValueError(
            f"the embedded world of this run was in {base}, which is not there. Train again, or move it back."
        )
    world = build_world(base.parents[1], seed, scale=known["world_scale"])
    if world.base.resolve() != base.resolve():
        raise ValueError(f"{base} was built by other versions of the libraries: train again with those installed.")
    return world.eval_prompts, gold_reward


# ---------------------------------------------------------------------- who was trained on them


def seen_in_training(policies: list[str], recipe: Any, prompts: list[Any]) -> list[str]:
    """Say of which policies it is known that they were trained on some of the prompts, or not known whether.

    A run that names the same data without a test set, or was in the same embedded world, has held out the same prompts.
    Of another one the training prompts are read again.

    Args:
        policies: As named; the prompts may be those that the first one has written down.
        recipe: The evaluation's, with the names of its prompts.
        prompts: That are answered.

    Raises:
        ValueError: One was that names other prompts than the evaluation: its figures are beside those of policies that
            were not.
    """
    asked, notes = [prompt_key(prompt) for prompt in prompts], []
    configurations = {each: load_run(each).configuration for each in policies if is_run(each)}
    first = configurations.get(policies[0], {})
    for each in policies:
        unknown = f"Whether {each} was trained on these prompts is not known"
        if each not in configurations:
            notes.append(f"{unknown}: it is of no run.")
            continue
        known = configurations[each]
        own = PromptArguments(**named(known))
        if own.dataset_name is None:
            if not same_world(known, first, recipe):
                notes.append(f"{unknown}: its run names no prompts.")
            continue
        try:
            train, test = load_prompts(own, lambda *_, **__: None)
        except (OSError, ValueError) as error:
            notes.append(f"{unknown}: {own.dataset_name} cannot be read any more ({error}).")
            continue
        recorded = {prompt_key(row["prompt"]) for row in recorded_prompts(each)}
        by_hash = own.dataset_test_name is None and own.dataset_test_split is None and test is not train
        if by_hash and recorded.issuperset(asked):  # held out, even if the data has changed since
            continue
        prompts_of = train["prompt"][: known.get("max_prompts") or len(train)]
        trained = {prompt_key(prompt) for prompt in prompts_of}
        seen = sum(key in trained for key in asked)
        if not seen:
            continue
        count = f"{each} was trained on {seen:,} of the {len(asked):,} prompts"
        if len(policies) > 1 and not names_same(own, recipe):
            raise ValueError(
                f"{count} that all are to answer. Name prompts that none has seen: --dataset_test_name, with "
                "--dataset_name."
            )
        notes.append(f"{count}.")
    return notes


def named(known: dict[str, Any]) -> dict[str, Any]:
    """Of a run's options, those that name prompts."""
    return {name: known[name] for name in PROMPTS if known.get(name) is not None}


def names_same(own: PromptArguments, recipe: Any) -> bool:
    """Whether a run and an evaluation name the same prompts and splits."""
    return all(getattr(own, name) == getattr(recipe, name) for name in PROMPTS)


def same_world(known: dict[str, Any], other: dict[str, Any], recipe: Any) -> bool:
    """Whether two runs were in the same embedded world, and so have its prompts in the same way."""
    same = all(known.get(name) == other.get(name) for name in WORLD)
    return same and in_world(known, recipe) and in_world(other, recipe)
