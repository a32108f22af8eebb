"""A finished policy on held-out prompts, beside where it started: reward, KL, length, variety, with intervals; samples.

    trl-ext evaluate --policy_adapter runs/toy
    trl-ext evaluate --policy_adapter me/llama-ppo --dataset_name me/prompts --reward_adapter me/llama-rm

Of a run of trl-ext ppo-max or rrhf the prompts that it held out, its reward adapters and its reference are known; for
any other adapter they are named. Both policies write with the same random numbers, one completion to a prompt, at
temperature 1. With `--num_processes 2` the prompts are shared among processes.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl import ModelConfig

from trl_ext.scripts.evaluating import EvaluationArguments, evaluated, make_setting, parse_evaluation
from trl_ext.scripts.finished_runs import check_no_run, names_of
from trl_ext.scripts.parsing import Given
from trl_ext.scripts.prompts_to_answer import seen_in_training
from trl_ext.scripts.running import check_output_dir, printer, quiet_libraries
from trl_ext.scripts.tables import print_pairs, print_table

SAMPLES = 3


@dataclass
class RecipeArguments(EvaluationArguments):
    """What this command needs beside `ModelConfig`."""

    policy_adapter: str | None = field(
        default=None, metadata={"help": "The adapter: output_dir of a run, folder or Hub id."}
    )


def parse(arguments: list[str]) -> tuple[RecipeArguments, ModelConfig, Given]:
    """Flags over config file.

    Raises:
        ValueError: No adapter, or a flag that this command cannot honour.
    """
    recipe, model_args, given = parse_evaluation(RecipeArguments, "evaluate", arguments)
    if recipe.policy_adapter is None:
        raise ValueError("--policy_adapter is missing: the output_dir of a run, a folder of PEFT's, or a Hub id.")
    return recipe, model_args, given


def main(arguments: list[str] | None = None) -> None:
    """Let reference and policy answer, write what is found, and show it."""
    quiet_libraries()
    recipe, model_args, given = parse(sys.argv[1:] if arguments is None else arguments)
    check_no_run(recipe.output_dir)
    check_output_dir(recipe.output_dir)
    show = printer()
    setting = make_setting(recipe, model_args, given, str(recipe.policy_adapter), show)
    name = names_of([str(recipe.policy_adapter)])[0]
    notes = seen_in_training([str(recipe.policy_adapter)], recipe, setting.prompts["prompt"])
    show(f"Evaluating {name} and its reference on {len(setting.prompts):,} prompts ...", flush=True)
    policies = evaluated(setting, [(name, str(recipe.policy_adapter))])
    facts = setting.facts() | {"policy_adapter": recipe.policy_adapter}
    show_results(policies, facts, recipe.output_dir, "evaluation", show, tuple(notes))


def show_results(
    policies: list[Any], facts: dict[str, Any], folder: str, stem: str, show: Any, notes: tuple[str, ...] = ()
) -> None:
    """Write figures, samples, picture and page in the main process, then show them and say where everything is."""
    from accelerate import PartialState

    from trl_ext.report.comparison import changes_tables, compare_policies, figures_table, write_comparison
    from trl_ext.report.machine import this_command, versions

    if not PartialState().is_main_process:
        return
    comparison = compare_policies(policies, notes)
    names = ", ".join(policy.name for policy in policies[1:])
    facts = {"command": this_command()} | facts | {"versions": versions()}
    paths = write_comparison(comparison, Path(folder).resolve(), stem, f"{names}: {stem}", facts)
    for note in comparison.notes:
        show(note)
    head, rows = figures_table(comparison)
    print_table(f"{len(comparison.keys):,} prompts; below each figure its 95 % interval", head, rows)
    for title, head, rows in changes_tables(comparison):
        print_table(title, head, rows)
    lines = [[policy.samples[key] for key in comparison.keys[:SAMPLES]] for policy in comparison.policies]
    if len(lines) == 2:
        texts = [[str(line["completion"]) for line in written] for written in lines]
        print_pairs([line["prompt"] for line in lines[0]], texts[0], texts[1], "completion")
    for what, path in paths.items():
        show(f"{what:17}{path}")
