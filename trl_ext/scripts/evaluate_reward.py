"""How good a reward model is: accuracy, calibration, length bias, agreement with others; a table and pictures.

    trl-ext evaluate-reward --reward_adapter out/rm [out/rm2 ...] --output_dir out/evaluation \\
        --dataset_name Anthropic/hh-rlhf --dataset_test_split test

Several adapters of one base are evaluated one by one and as an ensemble; the base is loaded once. Probabilities are
sigmoid of the difference of raw scores, as the loss has them and as trl-ext reward-model reports them.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl import ModelConfig

from trl_ext.scripts.arguments import LORA, check_model_flags
from trl_ext.scripts.models import load_placed_base, tokenizer_of
from trl_ext.scripts.parsing import FlagParser, Given
from trl_ext.scripts.running import check_output_dir, quiet_libraries, write_json
from trl_ext.scripts.tables import print_table


@dataclass
class EvaluationArguments:
    """What to evaluate, on what."""

    reward_adapter: list[str] = field(
        default_factory=list, metadata={"help": "Adapters of reward models on one base: folders or Hub ids."}
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Preferences: Hub id, folder or file."})
    dataset_format: str = field(default="auto", metadata={"help": "As in trl-ext reward-model."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset on the Hub."})
    dataset_test_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on. Default: test; of a single file all rows."}
    )
    output_dir: str = field(default="runs/evaluation", metadata={"help": "Where table and pictures go."})
    batch_size: int = field(default=16, metadata={"help": "Pairs scored at a time."})
    max_length: int | None = field(default=1024, metadata={"help": "Longer pairs are left out, and counted."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Let the model bring code of its own."})


def parse(arguments: list[str]) -> tuple[EvaluationArguments, ModelConfig, Given]:
    """Flags over config file.

    Raises:
        ValueError: No adapter, no dataset, or a flag that this recipe cannot honour.
    """
    recipe, model_args, given = FlagParser((EvaluationArguments, ModelConfig), "evaluate-reward").parse(arguments)
    if not recipe.reward_adapter:
        raise ValueError("--reward_adapter is missing: one or several adapters that trl-ext reward-model saved.")
    if recipe.dataset_name is None:
        raise ValueError("--dataset_name is missing: preferences by Hub id, folder or file.")
    if recipe.batch_size < 1:
        raise ValueError(f"--batch_size {recipe.batch_size}: score at least 1 pair at a time.")
    given.refuse([*LORA, "use_peft"], "nothing is trained here: the adapters bring their own. Drop it.")
    check_model_flags(given, model_args)
    return recipe, model_args, given


def score_all(recipe: EvaluationArguments, model_args: ModelConfig) -> tuple[list[Any], list[Any], Any, Any]:
    """Raw scores of each adapter, (N, 2), and its stored scale; the tokenised rows; strengths, if there are any."""
    from trl_ext.data import has_splits, load_preferences

    assert recipe.dataset_name is not None
    split = recipe.dataset_test_split or ("test" if has_splits(recipe.dataset_name) else "train")
    dataset, report = load_preferences(recipe.dataset_name, recipe.dataset_format, split, config=recipe.dataset_config)
    print(report)
    dataset = better_first(dataset)
    scores, scales, rows = score_dataset(recipe, model_args, dataset)
    column = next((c for c in ("strength", "strength_mean") if c in dataset.column_names), None)
    return scores, scales, rows, None if column is None else [dataset[i][column] for i in rows["row"]]


def better_first(dataset: Any) -> Any:
    """Preferences with soft labels, the better response as `chosen`; says how many sides are swapped, how many rows go.

    Where the soft label is below 0.5 the sides and the sign of a strength are swapped; rows of 0.5 are left out.

    Raises:
        ValueError: None is left.
    """
    if "soft_label" not in dataset.column_names or "chosen" not in dataset.column_names:
        return dataset
    turned, undecided = (sum(test(q) for q in dataset["soft_label"]) for test in ((0.5).__gt__, (0.5).__eq__))
    if undecided == len(dataset):
        raise ValueError("every soft_label is 0.5: no pair says which response is better, and there is no accuracy.")
    if turned or undecided:
        print(
            f"soft labels: {turned:,} rows below 0.5 have their sides swapped, {undecided:,} rows of 0.5 are left out"
        )

    def swap(row: dict[str, Any]) -> dict[str, Any]:
        if row["soft_label"] > 0.5:
            return row
        signed = {name: -row[name] for name in ("strength", "strength_mean", "margin") if name in row}
        sides = {"chosen": row["rejected"], "rejected": row["chosen"], "soft_label": 1 - row["soft_label"]}
        return row | signed | sides

    return type(dataset).from_list([swap(row) for row in dataset.to_list() if row["soft_label"] != 0.5])


def score_dataset(recipe: Any, model_args: ModelConfig, dataset: Any) -> tuple[list[Any], list[Any], Any]:
    """Raw scores of preferences by each adapter, (N, 2), and its stored scale; the tokenised rows, N that can be used.

    Args:
        recipe: With `reward_adapter`, `batch_size`, `max_length` and `trust_remote_code`.
        model_args: `ModelConfig`; without a model, what the adapters name.
        dataset: `chosen` and `rejected`.
    """
    from trl_ext import RewardModelConfig
    from trl_ext.reward.data import tokenize_preferences
    from trl_ext.reward.scoring import make_collator, score_rows
    from trl_ext.roles import RewardModel, read_adapter
    from trl_ext.text import TextEncoder

    adapters = [read_adapter(path, f"--reward_adapter {path}") for path in recipe.reward_adapter]
    model_args.model_name_or_path = model_args.model_name_or_path or adapters[0].config.base_model_name_or_path
    tokenizer = tokenizer_of(model_args, recipe)
    settings = RewardModelConfig("unused", max_length=recipe.max_length, use_cpu=True, bf16=False)  # writes nothing
    rows, report = tokenize_preferences(dataset, TextEncoder(tokenizer), settings, "dataset")
    print(report)
    base = load_placed_base(model_args, recipe)
    scores, scales = [], []
    for path, adapter in zip(recipe.reward_adapter, adapters, strict=True):
        model = RewardModel(base, adapter.config)
        model.load(path)
        scores.append(score_rows(model, rows, make_collator(model, tokenizer), recipe.batch_size))
        scales.append(model.scale)
        model.unload()
    return scores, scales, rows


def ensemble_scores(scores: list[Any], scales: list[Any]) -> Any:
    """Scores of several adapters together, (N, 2): the mean of the normalised ones, as PPO takes it.

    It is multiplied by the mean of their standard deviations, so that its differences are log-odds as those of one
    model are; without a scale for every adapter it is the mean of the raw scores.
    """
    import torch

    from trl_ext.ops.ensemble import combine_scores

    spread = 1.0
    if all(scale is not None for scale in scales):
        scores = [(raw - scale.mean) / scale.std for raw, scale in zip(scores, scales, strict=True)]
        spread = sum(scale.std for scale in scales) / len(scales)
    members = torch.stack(scores, dim=-1)
    return spread * combine_scores(members.flatten(0, 1))[0].view(-1, 2)


def main(arguments: list[str] | None = None) -> None:
    """Score, write figures and pictures, and show them."""
    quiet_libraries()
    recipe, model_args, _ = parse(sys.argv[1:] if arguments is None else arguments)
    from trl_ext.reward.metrics import evaluate_pairs, result_rows
    from trl_ext.reward.pair_statistics import reward_agreement
    from trl_ext.reward.pictures import write_pictures
    from trl_ext.reward.scoring import response_lengths

    check_output_dir(recipe.output_dir)
    scores, scales, rows, strength = score_all(recipe, model_args)
    lengths: Any = dict(zip(("chosen_lengths", "rejected_lengths"), response_lengths(rows), strict=True))
    folder = Path(recipe.output_dir).resolve()
    names = [*recipe.reward_adapter]
    if len(scores) > 1:
        names.append(f"ensemble of {len(scores)} (mean)")
        scores.append(ensemble_scores(scores, scales))
    results: dict[str, Any] = {}
    tables = {}
    for name, pair in zip(names, scores, strict=True):
        results[name] = evaluate_pairs(pair[:, 0], pair[:, 1], **lengths, strength=strength)
        tables[f"{name}: {len(pair):,} pairs"] = result_rows(results[name])
    for i in range(len(recipe.reward_adapter)):
        for j in range(i):
            both = f"{names[j]} and {names[i]}"
            results[both] = reward_agreement(scores[j][:, 0] - scores[j][:, 1], scores[i][:, 0] - scores[i][:, 1])
            tables[both] = result_rows(results[both])
    write_json(folder / "evaluation.json", results)
    pictures = write_pictures(folder, scores[-1][:, 0], scores[-1][:, 1], **lengths, strength=strength)
    for title, table in tables.items():
        print_table(title, ("", "value"), table)
    print(f"pictures         {', '.join(str(path) for path in pictures)}")
