"""Which pairs of answers to label next, by what a label would tell about a reward ensemble.

    trl-ext sample --unscored true --sampling_methods temperature:4 --output responses.jsonl ...
    trl-ext choose --responses responses.jsonl --reward_adapter out/rm1 out/rm2 out/rm3 --count 300 \\
        --output pairs.jsonl
    trl-ext label pairs.jsonl

`--method random` and `--method different` need no reward model. `--exclude old_pairs.jsonl` passes over pairs that were
chosen before. A share of the pairs is drawn at random (`chosen_by`): hold it out, and measure the reward model on it.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl import ModelConfig

from trl_ext.scripts.arguments import LORA, check_model_flags, names_of
from trl_ext.scripts.parsing import FlagParser, Given
from trl_ext.scripts.running import check_output_dir, quiet_libraries
from trl_ext.scripts.tables import print_table


@dataclass
class ChooseArguments:
    """From what, by what, how many."""

    responses: str | None = field(
        default=None, metadata={"help": "jsonl with prompt and responses, as trl-ext sample writes it."}
    )
    output: str | None = field(default=None, metadata={"help": "jsonl file of pairs that is written."})
    count: int = field(default=100, metadata={"help": "Pairs to choose."})
    method: str = field(
        default="information", metadata={"help": "information (needs reward adapters), random, or different."}
    )
    random_share: float = field(default=0.2, metadata={"help": "Share that is drawn at random, for evaluation."})
    per_prompt: int = field(default=1, metadata={"help": "Pairs of one prompt at most."})
    exclude: list[str] = field(
        default_factory=list, metadata={"help": "Files of pairs that are not to be chosen again."}
    )
    seed: int = field(default=0, metadata={"help": "Of the draws."})
    reward_adapter: list[str] = field(
        default_factory=list, metadata={"help": "At least two adapters of reward models on one base."}
    )
    batch_size: int = field(default=16, metadata={"help": "Pairs scored at a time."})
    max_length: int | None = field(default=1024, metadata={"help": "Longer responses are not chosen, and counted."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Let the model bring code of its own."})


SCORING = ("reward_adapter", "batch_size", "max_length", "trust_remote_code")


def parse(arguments: list[str]) -> tuple[ChooseArguments, ModelConfig, Given]:
    """Flags over config file.

    Raises:
        ValueError: What is missing or out of its range, or a flag that would be dropped.
    """
    from trl_ext.feedback.choose import METHODS

    recipe, model_args, given = FlagParser((ChooseArguments, ModelConfig), "choose").parse(arguments)
    for name in ("responses", "output"):
        if getattr(recipe, name) is None:
            raise ValueError(f"--{name} is missing. See --help for an example.")
    if recipe.method not in METHODS:
        raise ValueError(f"--method {recipe.method} is unknown: use one of {', '.join(METHODS)}.")
    for name in ("count", "per_prompt", "batch_size"):
        if getattr(recipe, name) < 1:
            raise ValueError(f"--{name} {getattr(recipe, name)} must be at least 1.")
    if not 0 <= recipe.random_share <= 1:
        raise ValueError(f"--random_share {recipe.random_share} must be between 0 and 1.")
    given.refuse([*LORA, "use_peft"], "nothing is trained here: the adapters bring their own. Drop it.")
    if recipe.method == "information":
        if len(recipe.reward_adapter) < 2:
            raise ValueError("--reward_adapter: --method information needs at least two, which can disagree.")
        check_model_flags(given, model_args)
    else:
        given.refuse([*SCORING, *names_of(ModelConfig)], f"--method {recipe.method} uses no model. Drop it.")
    if recipe.method == "random":
        given.refuse(["random_share"], "--method random draws all pairs at random. Drop it.")
    return recipe, model_args, given


def read_responses(path: str) -> list[dict[str, Any]]:
    """Prompts with their responses.

    Raises:
        FileNotFoundError, ValueError: There is no such file, or a line is no record.
    """
    from trl_ext.data.reading import read_json_rows
    from trl_ext.data.rows import RowError

    if not Path(path).is_file():
        raise FileNotFoundError(f"--responses {path}: there is no such file.")
    rows = []
    for number, row in enumerate(read_json_rows(path)):
        if isinstance(row, RowError):
            raise ValueError(f"{path}, row {number}: {row}. Mend or remove the line.")
        rows.append({name: value for name, value in row.items() if name != "index"})
    return rows


def member_scores(
    recipe: ChooseArguments, model_args: ModelConfig, rows: list[dict[str, Any]]
) -> list[dict[tuple[int, int], float]]:
    """Raw scores of each adapter: (prompt, response) -> score; without those that are too long."""
    from datasets import Dataset

    from trl_ext.feedback.choose import response_couples
    from trl_ext.scripts.evaluate_reward import score_dataset

    couples, records = [], []
    for number, row in enumerate(rows):
        for i, j in response_couples(row["responses"]):
            answers = {"chosen": row["responses"][i], "rejected": row["responses"][j]}
            if not isinstance(row["prompt"], str):
                answers = {name: [{"role": "assistant", "content": text}] for name, text in answers.items()}
            couples.append((number, i, j))
            records.append({"prompt": row["prompt"], **answers})
    scores, _, used = score_dataset(recipe, model_args, Dataset.from_list(records))
    found: list[dict[tuple[int, int], float]] = []
    for member in scores:
        own: dict[tuple[int, int], float] = {}
        for index, (first, second) in zip(used["row"], member.tolist(), strict=True):
            number, i, j = couples[index]
            own[number, i], own[number, j] = first, second
        found.append(own)
    return found


def main(arguments: list[str] | None = None) -> None:
    """Score, choose, and write the pairs."""
    quiet_libraries()
    recipe, model_args, _ = parse(sys.argv[1:] if arguments is None else arguments)
    import numpy as np

    from trl_ext.feedback import choose
    from trl_ext.feedback.pairs import read_pairs, unordered, write_rows

    output = Path(str(recipe.output))
    if output.exists():
        raise ValueError(f"--output {output} is there already, and may have been labelled: name another file.")
    check_output_dir(output.resolve().parent, "--output, whose folder")
    taken = {unordered(pair) for path in recipe.exclude for pair in read_pairs(path)}
    rows = read_responses(str(recipe.responses))
    candidates, left_out = choose.make_candidates(rows, taken)
    values = None
    if recipe.method == "different":
        values = choose.difference_values(candidates)
    elif recipe.method == "information":
        differences = choose.member_differences(candidates, member_scores(recipe, model_args, rows))
        scored = np.asarray(~np.isnan(differences).any(0))
        if not scored.any():
            raise ValueError("no pair could be scored: all are longer than --max_length. Raise it.")
        left_unscored = int((~scored).sum())
        if left_unscored:
            print(f"{left_unscored:,} pairs with a response that could not be scored are left out")
        candidates = [candidate for candidate, keep in zip(candidates, scored.tolist(), strict=True) if keep]
        values = choose.information_gain(differences[:, scored])
    chosen = choose.choose_pairs(
        candidates,
        recipe.count,
        values,
        method=recipe.method,
        random_share=recipe.random_share,
        per_prompt=recipe.per_prompt,
        seed=recipe.seed,
    )
    write_rows(output, [choice.row() for choice in chosen])
    by = [choice.chosen_by for choice in chosen]
    table = [("candidates", f"{len(candidates):,}"), ("chosen before, passed over", f"{left_out:,}")]
    table += [(f"chosen by {name}", f"{by.count(name):,}") for name in dict.fromkeys(sorted(by))]
    if values is not None:
        unit = "nats" if recipe.method == "information" else "0 to 1"
        mine = [choice.value for choice in chosen if choice.value is not None]
        table.append((f"mean value of all, {unit}", f"{values.mean():.3f}"))
        table.append((f"mean value of the chosen, {unit}", f"{np.mean(mine):.3f}" if mine else "-"))
    print_table(f"Pairs in {output.resolve()}", ("", "value"), table)
    if len(chosen) < recipe.count:
        print(f"{len(chosen):,} of {recipe.count:,}: there are no more with --per_prompt {recipe.per_prompt}")
    print(f"label them       trl-ext label {output}")
