"""Several finished policies beside each other, without any training: a table, a picture of reward against KL, a page.

    trl-ext compare runs/a runs/b
    trl-ext compare runs/a runs/b me/llama-ppo --dataset_name me/prompts --reward_adapter me/llama-rm

Of finished runs alone, it is read from what each wrote to its held-out prompts at its end: no model is loaded. Where
prompts or rewards are named, or an adapter is of no run, all policies answer the same prompts now, as in trl-ext
evaluate. Differences are measured in pairs, on answers to the same prompt.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl import ModelConfig

from trl_ext.report.comparison import REFERENCE
from trl_ext.report.loading import load_run
from trl_ext.roles.adapters import WEIGHTS_FILE
from trl_ext.scripts.evaluate_policy import show_results
from trl_ext.scripts.evaluating import EvaluationArguments, evaluated, make_setting, parse_evaluation
from trl_ext.scripts.finished_runs import check_no_run, is_run, names_of
from trl_ext.scripts.parsing import Given
from trl_ext.scripts.prompts_to_answer import seen_in_training
from trl_ext.scripts.running import check_output_dir, printer, quiet_libraries


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


def main(arguments: list[str] | None = None) -> None:
    """Read what runs have left, or let all policies answer; write what is found, and show it."""
    quiet_libraries()
    recipe, model_args, given = parse(sys.argv[1:] if arguments is None else arguments)
    check_no_run(recipe.output_dir)
    check_output_dir(recipe.output_dir)
    show = printer()
    names = names_of(recipe.policies)
    asked = set(given) - {"policies", "output_dir"}
    anew = bool(asked) or not all(map(is_run, recipe.policies))
    notes: list[str] = []
    if anew:
        named = recipe.reference_adapter is not None
        setting = make_setting(recipe, model_args, given, recipe.policies[0], show)
        if not named:
            check_same_start(recipe.policies, recipe.reference_adapter)
        notes = seen_in_training(recipe.policies, recipe, setting.prompts["prompt"])
        show(f"{len(names)} policies answer {len(setting.prompts):,} prompts ...", flush=True)
        policies: list[Any] = evaluated(setting, list(zip(names, recipe.policies, strict=True)))
        facts = setting.facts()
    else:
        from trl_ext.report.comparison import policies_of_runs

        policies, notes = policies_of_runs([load_run(each) for each in recipe.policies], names)
        facts = {"read from": "what the runs wrote at their last evaluation"}
    facts = facts | {"policies": recipe.policies}
    show_results(policies, facts, recipe.output_dir, "comparison", show, tuple(notes))
