"""Several finished policies beside each other, without any training: a table, a picture of reward against KL, a page.

    trl-ext compare runs/a runs/b
    trl-ext compare runs/a runs/b me/llama-ppo --dataset_name me/prompts --reward_adapter me/llama-rm

Of finished runs alone, it is read from what each wrote to its held-out prompts at its end: no model is loaded. Where
prompts or rewards are named, or an adapter is of no run, all policies answer the same prompts now, as in trl-ext
evaluate. Differences are measured in pairs, on answers to the same prompt.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from trl import ModelConfig

from trl_ext.report.comparison import REFERENCE
from trl_ext.report.loading import load_run
from trl_ext.roles.adapters import WEIGHTS_FILE
from trl_ext.scripts.arguments import PromptArguments
from trl_ext.scripts.evaluate_policy import show_results
from trl_ext.scripts.evaluating import (
    PROMPTS,
    EvaluationArguments,
    evaluated,
    make_setting,
    parse_evaluation,
)
from trl_ext.scripts.finished_runs import check_no_run, in_world, is_run, names_of
from trl_ext.scripts.held_out import prompt_key
from trl_ext.scripts.inputs import load_prompts
from trl_ext.scripts.parsing import Given
from trl_ext.scripts.running import check_output_dir, printer, quiet_libraries, without_traceback

WORLD = ("world_scale", "world_seed", "seed")  # by these a run in the embedded world has its prompts


@dataclass
class RecipeArguments(EvaluationArguments):
    """What this command needs beside `ModelConfig`."""

    policies: list[str] = field(
        default_factory=list,
        metadata={"help": "output_dir of runs, adapters by folder or Hub id. They may stand first without this flag."},
    )
    output_dir: str = field(default="runs/comparison", metadata={"help": "Where table, samples, picture and page go."})


def parse(arguments: list[str]) -> tuple[RecipeArguments, ModelConfig, Given]:
    """Flags over config file; what stands before the first flag is `--policies`.

    Raises:
        ValueError: Fewer than two policies, one twice, or a flag that this command cannot honour.
    """
    first = next((i for i, word in enumerate(arguments) if word.startswith("--")), len(arguments))
    if first:
        arguments = ["--policies", *arguments[:first], *arguments[first:]]
    recipe, model_args, given = parse_evaluation(RecipeArguments, "compare", arguments)
    if len(recipe.policies) < 2:
        raise ValueError("name at least two policies: trl-ext compare runs/a runs/b. For one: trl-ext evaluate.")
    twice = [each for each in recipe.policies if recipe.policies.count(each) > 1]
    if twice:
        raise ValueError(f"{twice[0]} is named twice: name each policy once.")
    return recipe, model_args, given


def check_same_start(policies: list[str], reference: str | None) -> None:
    """Check that every run started from the policy that KL is measured from; one without `reference` from the base.

    Args:
        policies: As named; where an adapter of no run started is not known.
        reference: Folder, or None for the base.

    Raises:
        ValueError: One that did not, and what to do.
    """
    own = Path(str(reference)) / WEIGHTS_FILE
    for each in policies:
        theirs = Path(each) / REFERENCE / WEIGHTS_FILE
        if not theirs.is_file() and not is_run(each):
            continue
        if theirs.is_file() != own.is_file() or (theirs.is_file() and theirs.read_bytes() != own.read_bytes()):
            raise ValueError(
                f"{each} started from another policy than {policies[0]}: say where KL is measured from, "
                "--reference_adapter FOLDER, or none for the base."
            )


def check_not_trained_on(policies: list[str], recipe: Any, prompts: Sequence[Any]) -> list[str]:
    """Check that no policy was trained on the prompts that all of them answer.

    A run that names the same data and splits has held out the same prompts. Of another one the training prompts are
    read again.

    Args:
        policies: As named.
        recipe: The evaluation's, with the names of its prompts.
        prompts: That are answered.

    Returns:
        Of which policies it is not known, and why.

    Raises:
        ValueError: One was.
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
        own = PromptArguments(**{name: known[name] for name in PROMPTS if known.get(name) is not None})
        if all(getattr(own, name) == getattr(recipe, name) for name in PROMPTS) and (
            own.dataset_name is not None or same_world(known, first, recipe)
        ):
            continue
        if own.dataset_name is None:
            notes.append(f"{unknown}: its run names no prompts.")
            continue
        try:
            train, _ = load_prompts(own, lambda *_, **__: None)
        except (OSError, ValueError) as error:
            notes.append(f"{unknown}: {own.dataset_name} cannot be read any more ({error}).")
            continue
        trained = {prompt_key(prompt) for prompt in train["prompt"]}
        seen = sum(key in trained for key in asked)
        if seen:
            raise ValueError(
                f"{each} was trained on {seen:,} of the {len(asked):,} prompts that all are to answer. Name prompts "
                "that none has seen: --dataset_test_name, with --dataset_name."
            )
    return notes


def same_world(known: dict[str, Any], other: dict[str, Any], recipe: Any) -> bool:
    """Whether two runs were in the same embedded world, and so have its prompts in the same way."""
    same = all(known.get(name) == other.get(name) for name in WORLD)
    return same and in_world(known, recipe) and in_world(other, recipe)


@without_traceback()
def main(arguments: list[str] | None = None) -> None:
    """Read what runs have left, or let all policies answer; write what is found, and show it."""
    quiet_libraries()
    recipe, model_args, given = parse(sys.argv[1:] if arguments is None else arguments)
    check_no_run(recipe.output_dir)
    check_output_dir(recipe.output_dir)
    show = printer()
    names = names_of(recipe.policies)
    ours = {each.name for each in fields(EvaluationArguments)} | {each.name for each in fields(ModelConfig)}
    anew = any(name in given for name in ours - {"output_dir"}) or not all(map(is_run, recipe.policies))
    notes: list[str] = []
    if anew:
        named = recipe.reference_adapter is not None
        setting = make_setting(recipe, model_args, given, recipe.policies[0], show)
        if not named:
            check_same_start(recipe.policies, recipe.reference_adapter)
        notes = check_not_trained_on(recipe.policies, recipe, setting.prompts["prompt"])
        show(f"{len(names)} policies answer {len(setting.prompts):,} held-out prompts ...", flush=True)
        policies: list[Any] = evaluated(setting, list(zip(names, recipe.policies, strict=True)))
        facts = setting.facts()
    else:
        from trl_ext.report.comparison import policies_of_runs

        policies, notes = policies_of_runs([load_run(each) for each in recipe.policies], names)
        facts = {"read from": "what the runs wrote at their last evaluation"}
    facts = facts | {"policies": recipe.policies}
    show_results(policies, facts, recipe.output_dir, "comparison", show, tuple(notes))
