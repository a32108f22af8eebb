"""How much several reward models believe each label, and what to do with the doubtful ones.

    trl-ext preference-strength --policy flip --share 0.2

trains M reward adapters one after another on one base, each with its own start and order of the data, scores every
training pair with each of them, writes mean and spread of the difference into the dataset, and flips, smooths, drops or
margins the suspicious part. Without a model it does so in the embedded world. Real data:

    trl-ext preference-strength --config reward_qlora_8b \\
        --model_name_or_path meta-llama/Llama-3.1-8B --dataset_name Anthropic/hh-rlhf --output_dir out/strength

The dataset in `output_dir/dataset` is what `trl-ext reward-model --dataset_name` takes; members that are done are
loaded when the recipe runs again.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl import ModelConfig

from trl_ext import RewardModelConfig
from trl_ext.scripts.arguments import (
    PreferenceArguments,
    WorldArguments,
    check_model_flags,
    check_world_flags,
    names_of,
)
from trl_ext.scripts.configs import CONFIGS
from trl_ext.scripts.models import fresh_reward_model
from trl_ext.scripts.parsing import FlagParser, Given, names_a_model
from trl_ext.scripts.reward_model import load_inputs
from trl_ext.scripts.running import printer, quiet_libraries, show_progress, start_run, write_json
from trl_ext.scripts.tables import last_text, print_table

NEXT_STEP = {
    "flip": "",
    "drop": "",
    "smooth": " --label_smoothing 0.1 --label_smoothing_on suspected",
    "margin": " --margin_column strength_mean",
}


@dataclass
class StrengthArguments(WorldArguments, PreferenceArguments):
    """What to measure and what to do about it."""

    members: int = field(default=5, metadata={"help": "Reward adapters, M; at least 2."})
    policy: str = field(default="flip", metadata={"help": "flip, smooth, margin or drop."})
    share: float | None = field(
        default=None, metadata={"help": "Doubt this share of the labels. Default: those below `threshold`."}
    )
    threshold: float = field(default=0.0, metadata={"help": "Mean strength below which a label is doubted."})


def parse(arguments: list[str]) -> tuple[StrengthArguments, RewardModelConfig, ModelConfig, Given]:
    """Flags over config file over defaults; without a model and without a config, the embedded world's config.

    Raises:
        ValueError: A flag that there is not, or that this run cannot honour.
    """
    from trl_ext.reward.strength import ACTIONS

    parser = FlagParser((StrengthArguments, RewardModelConfig, ModelConfig), "preference-strength")
    default = None
    if not names_a_model(arguments):
        default = CONFIGS / "reward_toy.yaml"
        if not any(flag.split("=")[0] in ("--output_dir", "--output-dir") for flag in arguments):
            arguments = ["--output_dir", "runs/strength_toy", *arguments]
    recipe, training, model_args, given = parser.parse(arguments, default)
    if recipe.policy not in ACTIONS:
        raise ValueError(f"--policy {recipe.policy} is unknown: use one of {', '.join(ACTIONS)}.")
    if recipe.members < 2:
        raise ValueError(f"--members {recipe.members}: the spread of one model is no measure, use at least 2.")
    check_world_flags(given, model_args.model_name_or_path is None, *names_of(PreferenceArguments))
    check_model_flags(given, model_args, task="SEQ_CLS")
    if recipe.share is not None:
        given.refuse(["threshold"], f"--share {recipe.share} says which labels are doubted. Give one of them.")
    flags = given.on_command_line()
    flags.refuse(
        ["resume_from_checkpoint"],
        "members go on where they were by themselves. Drop it.",
    )
    flags.refuse(["normalize_rewards", "normalization_samples"], "strengths are of raw scores. Drop it.")
    return recipe, training, model_args, given


def measure(recipe: StrengthArguments, training: RewardModelConfig, inputs: tuple[Any, ...]) -> tuple[Any, Any]:
    """(rows, differences): indices of the usable rows, (N,), and score(chosen) - score(rejected), (M, N)."""
    import torch

    from trl_ext import RewardModelTrainer
    from trl_ext.reward.strength import train_ensemble

    model, tokenizer, train = inputs

    def make_trainer(model: Any, args: Any) -> Any:
        trainer = RewardModelTrainer(model, args, train, processing_class=tokenizer)
        show_progress(trainer, {"loss": "loss", "accuracy": "accuracy"})
        return trainer

    seeds = [training.seed + k for k in range(recipe.members)]
    differences: list[torch.Tensor] = []
    for k, trainer in enumerate(train_ensemble(model, training, seeds, make_trainer), start=1):
        scores = trainer.score(train)
        lead = scores["chosen"] - scores["rejected"]
        differences.append(lead)
        agreed = float((lead > 0).float().mean())
        printer()(f"member {k} of {recipe.members}: agrees with {agreed:.3f} of the labels")
    return scores["rows"], torch.stack(differences)


def show_examples(dataset: Any, examples: list[tuple[int, float, float]]) -> None:
    """The most doubted pairs, as texts."""
    for row, mean, std in examples:
        record = dataset[row]
        prompt = record.get("prompt") or ""
        texts = [("prompt", prompt), ("labelled chosen", record["chosen"]), ("labelled rejected", record["rejected"])]
        body = [(name, last_text(text)) for name, text in texts]
        print_table(f"strength {mean:.2f} ± {std:.2f}", ("", "text"), body)


def main(arguments: list[str] | None = None) -> None:
    """Train the members, measure, write the dataset, and show what was doubted."""
    quiet_libraries()
    recipe, training, model_args, _ = parse(sys.argv[1:] if arguments is None else arguments)
    from accelerate import PartialState

    from trl_ext.reward.strength import apply_strength

    training.normalize_rewards = False  # strengths are of raw scores
    start_run(training)
    base, tokenizer, train, _ = load_inputs(recipe, training, model_args)
    model = fresh_reward_model(base, model_args)
    rows, differences = measure(recipe, training, (model, tokenizer, train))
    if not PartialState().is_main_process:
        return
    judged = train.select(rows.tolist())
    result, report = apply_strength(judged, differences, recipe.policy, share=recipe.share, threshold=recipe.threshold)
    folder = Path(str(training.output_dir)).resolve()
    result.save_to_disk(str(folder / "dataset"))
    write_json(folder / "report.json", dict(report.rows()))
    print_table("Preference strength", ("", "value"), report.rows())
    show_examples(judged, report.examples)
    if len(judged) < len(train):
        print(f"{len(train) - len(judged)} rows that cannot be used were left out; the tables above say why.")
    print(f"dataset          {folder / 'dataset'}")
    print(f"train on it      trl-ext reward-model --dataset_name {folder / 'dataset'}{NEXT_STEP[recipe.policy]}")
