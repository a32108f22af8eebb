"""What `trl-ext rlhf` says of itself: a table of its rounds, a page to begin with, and a card of the SFT stage."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trl_ext.report.cards import CardFacts, CardKind, loading, public, whole_card, write_card

SFT_KIND = CardKind(
    "text-generation",
    ["sft", "lora", "trl", "trl_ext"],
    ("learning_rate", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "seed"),
    ("step", "loss", "learning_rate"),
    "loss",
)
WHO = {
    "adapter": "the last reward model, which PPO never saw",
    "endpoint": "a model at an endpoint",
    "local": "a model on this machine",
    "people": "people",
}
COLUMNS = {
    "test accuracy": "of the reward models, mean of the members, on pairs that none was trained on",
    "on random pairs before": "accuracy of the reward models of the round before on pairs of what its policy wrote, "
    "drawn at random: lower than on the test pairs where the policy writes what they do not know",
    "proxy": "mean score of the policy's answers by the reward models that PPO had; the unit is the spread of "
    "reference responses",
    "judge": "the same by the last reward model, which PPO never saw",
    "spread": "how far the reward models disagree about an answer",
    "length": "of an answer, characters",
    "gold": "reward that the world knows, and nobody was shown",
}


def table_of(course: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the rounds."""
    lacking = set() if "gold" in course[0] else {"gold"}
    if len(course[0]["accuracy"]) == 1:  # the only one pays: none is left to judge
        lacking.add("judge")
    columns = [name for name in COLUMNS if name not in lacking]
    rows = []
    for found in course:
        cells = {"test accuracy": sum(found["accuracy"]) / len(found["accuracy"])} | dict(found)
        if "before" in found:
            cells["on random pairs before"] = found["before"]["ensemble"]
        rows.append([str(found["round"]), *(f"{cells[name]:.3f}" if name in cells else "-" for name in columns)])
    return ["round", *columns], rows


def write_summary(
    work: Any,
    course: Sequence[Mapping[str, Any]],
    places: Mapping[str, Path],
    judged: Mapping[str, Any] | None,
) -> Path:
    """Write `README.md` of the folder of the run: figures of the rounds, the judgement, and what is where.

    Args:
        work: What is shared, `rlhf_stages.Work`.
        course: Figures of each round.
        places: What it is -> its folder.
        judged: What `rlhf_rounds.judge` returns; None where nobody judged.
    """
    columns, rows = table_of(course)
    base = public(work.model_args.model_name_or_path) or "the embedded world"
    lines = [f"# {work.folder.name}", "", f"What `trl-ext rlhf` made of `{base}`.", ""]
    lines += ["## Rounds, on held-out prompts", "", f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", *(f"* {name}: {COLUMNS[name]}" for name in columns[1:])]
    lines += [f"* Round {each['round']} ended early: {each['ended_early']}" for each in course if "ended_early" in each]
    if len(course) > 1:
        lines += ["", "![scores by round](rounds.png)"]
    if judged is not None:
        lines += ["", "## Judgement", "", f"By {WHO[judged['judge']]}, on {judged['judged']:,} held-out prompts:"]
        if judged["judged"]:
            low, high = judged["interval"]
            lines[-1] += f" the tuned policy's win rate against the SFT policy is {judged['rate']:.3f} ({low:.3f} to"
            lines[-1] += f" {high:.3f}); a tie counts half."
        else:
            lines[-1] += " no pair has a verdict."
        lines += ["Wins, ties, losses and the length-controlled rate are in [judge/result.json](judge/result.json)."]
    lines += ["", "## What is where", ""]
    for what, folder in places.items():
        where = os.path.relpath(folder, work.folder) if folder.is_dir() else str(folder)
        named = [("card", "README.md"), ("report", "report.html"), ("labels", "preferences.jsonl")]
        found = [f"[{name}]({where}/{file})" for name, file in named if (folder / file).is_file()]
        lines.append(f"* {what}: `{where}`{': ' if found else ''}{', '.join(found)}")
    last = os.path.relpath(list(places.values())[-1], work.folder)
    lines += [
        "",
        "## Next",
        "",
        "Read answers in the report, and see what the policy refuses, before anybody else has it. In this folder:",
    ]
    lines += ["", f"    trl-ext red-team --policy {last}"]
    path = work.folder / "README.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_sft_card(work: Any, trainer: Any) -> None:
    """Write the card of the SFT adapter, in place of PEFT's form."""
    args, base, rows = trainer.args, str(work.base.name_or_path), len(work.demonstrations or ())
    facts = {"rows of train_dataset": rows}
    data = work.recipe.sft_dataset or "embedded world"
    card = CardFacts(args, base, trainer.state.log_history, None, facts, f"{work.folder.name}, SFT", data)
    what = f"A LoRA adapter on `{card.base_name}`, fine-tuned on demonstrations by TRL's SFTTrainer."
    body = [what, "", *loading(card)]
    evaluation = ["None was made of this stage."]
    write_card(str(args.output_dir), whole_card(card, SFT_KIND, body, "none, it imitates its data", evaluation))
