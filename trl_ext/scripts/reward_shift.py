"""Whether a run's reward is still to be trusted: scores of an ensemble and its spread on what the policy wrote.

    trl-ext reward-shift --run out/ppo --reward_adapter out/rm1 out/rm2 out/rm3

Reads `samples.jsonl` of the run: evaluations by their step, completions of the training in at most `--moments` parts.
Where the mean score rises and the spread of the ensemble rises with it, the policy writes what the reward models have
not seen. `reward_shift.json` and a picture go to the run's folder, or to `--output_dir`.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl import ModelConfig

from trl_ext.scripts.arguments import LORA, check_model_flags
from trl_ext.scripts.judging import member_scores
from trl_ext.scripts.models import load_placed_base, tokenizer_of
from trl_ext.scripts.parsing import FlagParser, Given
from trl_ext.scripts.running import check_output_dir, quiet_libraries, write_json
from trl_ext.scripts.tables import plot_run, print_table

KINDS = ("evaluation", "training")


@dataclass
class ShiftArguments:
    """Which run, by which reward models."""

    run: str | None = field(default=None, metadata={"help": "Folder of a PPO or RRHF run, with samples.jsonl."})
    reward_adapter: list[str] = field(
        default_factory=list,
        metadata={"help": "At least two reward adapters on its base; more than PPO had is better."},
    )
    kind: str = field(default="training", metadata={"help": "Samples of the training, or of evaluations."})
    moments: int = field(default=10, metadata={"help": "Parts into which the training is cut."})
    output_dir: str | None = field(default=None, metadata={"help": "Where the result goes. Default: the run's folder."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Let the model bring code of its own."})


def parse(arguments: list[str]) -> tuple[ShiftArguments, ModelConfig, Given]:
    """Flags over config file.

    Raises:
        ValueError: What is missing, or a flag that would be dropped.
    """
    recipe, model_args, given = FlagParser((ShiftArguments, ModelConfig), "reward-shift").parse(arguments)
    if recipe.run is None:
        raise ValueError("--run is missing: name the folder of a run, with samples.jsonl in it.")
    if len(recipe.reward_adapter) < 2:
        raise ValueError("--reward_adapter: at least two are needed, which can disagree.")
    if recipe.kind not in KINDS:
        raise ValueError(f"--kind {recipe.kind} is unknown: use one of {', '.join(KINDS)}.")
    if recipe.moments < 2:
        raise ValueError(f"--moments {recipe.moments}: a course has at least 2.")
    if recipe.kind == "evaluation":
        given.refuse(["moments"], "evaluations have their own. Drop it.")
    given.refuse([*LORA, "use_peft"], "nothing is trained here. Drop it.")
    check_model_flags(given, model_args)
    return recipe, model_args, given


def samples_of(recipe: ShiftArguments) -> tuple[list[int], list[dict[str, Any]]]:
    """Steps, those of the training moved to the beginning of their part, and samples.

    Raises:
        ValueError: There is no such run, or it has none of this kind.
    """
    from trl_ext.report.loading import load_run

    if not (Path(str(recipe.run)) / "samples.jsonl").is_file():
        raise ValueError(f"--run {recipe.run}: name the folder of a run, with samples.jsonl in it.")
    run = load_run(str(recipe.run))
    if recipe.kind == "evaluation":
        pairs = [(step, sample) for step, samples in run.evaluations.items() for sample in samples.values()]
    else:
        pairs = [(int(sample["step"]), sample) for sample in run.training]
        last = max((step for step, _ in pairs), default=0) + 1
        parts = [step * recipe.moments // last for step, _ in pairs]
        first: dict[int, int] = {}
        for (step, _), part in zip(pairs, parts, strict=True):
            first[part] = min(step, first.get(part, step))
        pairs = [(first[part], sample) for (_, sample), part in zip(pairs, parts, strict=True)]
    if not pairs:
        raise ValueError(f"{recipe.run} has no samples of --kind {recipe.kind}.")
    return [step for step, _ in pairs], [sample for _, sample in pairs]


def main(arguments: list[str] | None = None) -> None:
    """Score the samples, and show how scores and spread went."""
    quiet_libraries()
    recipe, model_args, _ = parse(sys.argv[1:] if arguments is None else arguments)
    import torch

    from trl_ext.feedback.pairs import without_nan
    from trl_ext.reward.shift import shift_over_run
    from trl_ext.roles import read_adapter
    from trl_ext.text import TextEncoder, message_text

    steps, samples = samples_of(recipe)
    folder = Path(recipe.output_dir or str(recipe.run))
    check_output_dir(folder)
    adapters = [read_adapter(path, f"--reward_adapter {path}") for path in recipe.reward_adapter]
    model_args.model_name_or_path = model_args.model_name_or_path or adapters[0].config.base_model_name_or_path
    encoder = TextEncoder(tokenizer_of(model_args, recipe, padding_side="left"))
    base = load_placed_base(model_args, recipe)
    texts = [message_text(sample["completion"]) for sample in samples]
    prompts = [sample["prompt"] for sample in samples]
    scores, _ = member_scores(base, encoder, recipe.reward_adapter, prompts, texts)
    golds = [sample.get("rewards", {}).get("gold_reward") for sample in samples]
    gold = None
    if any(value is not None for value in golds):
        gold = torch.tensor([float("nan") if value is None else float(value) for value in golds])
    course = shift_over_run(steps, scores, gold)
    content = {"run": str(recipe.run), "reward_adapter": recipe.reward_adapter, "course": course}
    write_json(folder / "reward_shift.json", without_nan(content))
    scored = {"mean": "reward models"} | ({"gold": "gold reward"} if gold is not None else {})
    panels = {"mean score of the samples": scored, "spread of the ensemble": {"spread": "spread"}}
    plot_run(course, panels, folder / "reward_shift.png", marker="o")
    columns = ("from step", "samples", "mean score", "shift", "spread", "doubt", "gold")
    rows = [
        (
            f"{moment['step']}",
            f"{moment['count']}",
            *(f"{moment[name]:.3f}" for name in ("mean", "shift", "spread", "doubt")),
            f"{moment['gold']:.3f}" if "gold" in moment else "-",
        )
        for moment in course
    ]
    print_table(f"Reward models on {len(samples):,} samples of {recipe.run}", columns, rows)
    print(f"picture          {folder / 'reward_shift.png'}")
