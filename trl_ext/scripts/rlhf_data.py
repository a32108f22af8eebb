"""The data of `trl-ext rlhf`: by name, or of the embedded world; what is judged on is trained on nowhere."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset

from trl_ext.data import convert_rows, load_split
from trl_ext.scripts.arguments import PreferenceArguments, PromptArguments
from trl_ext.scripts.held_out import demonstrations_apart, prompts_of_both
from trl_ext.scripts.inputs import load_preference_splits, load_prompts

WORLD_DEMONSTRATIONS, WORLD_TEST_PAIRS = 3200, 500


def own_data(recipe: Any, training: Any, encoder: Any, show: Callable[..., Any]) -> tuple[Any, ...]:
    """Demonstrations, preferences, test pairs, prompts, and prompts to judge on, by the names in the flags.

    Raises:
        ValueError: Data that cannot be trained on, or nothing is left beside what is held out.
    """
    demonstrations = None
    if recipe.sft_dataset is not None:
        demonstrations = load_split(recipe.sft_dataset, "train")
        check_demonstrations(demonstrations, recipe.sft_dataset)
    named = PreferenceArguments(
        dataset_name=recipe.preferences,
        dataset_format=recipe.preferences_format,
        dataset_test_name=recipe.preferences_test,
    )
    preferences, test_pairs = load_preference_splits(named, training.seed, show)
    if "chosen" not in preferences.column_names:
        raise ValueError(f"--preferences {recipe.preferences}: rankings; this recipe labels and trains on pairs.")
    rows: tuple[Any, Any] = (preferences, test_pairs)
    if recipe.prompts is not None:
        named_apart = recipe.prompts_test is not None  # prompts in both are left out below, and that is said there
        told = (lambda *_: None) if named_apart else show
        rows = load_prompts(PromptArguments(recipe.prompts, dataset_test_name=recipe.prompts_test), told)
    prompts, held_out = prompts_of_both(*rows, encoder, recipe.max_prompt_length, show)
    if demonstrations is not None:
        demonstrations = demonstrations_apart(demonstrations, held_out, show)
    return demonstrations, preferences, test_pairs, prompts, held_out


def check_demonstrations(dataset: Any, name: str) -> None:
    """Check that TRL's SFTTrainer can learn from the rows.

    Raises:
        ValueError: No rows, or none of its columns.
    """
    columns = set(dataset.column_names)
    if not len(dataset) or not ({"prompt", "completion"} <= columns or columns & {"messages", "text"}):
        raise ValueError(
            f"--sft_dataset {name} has {len(dataset):,} rows with the columns {sorted(columns)}: it needs prompt and "
            "completion, or messages, or text."
        )


def world_data(recipe: Any, training: Any, show: Callable[..., Any]) -> tuple[str, tuple[Any, ...]]:
    """The folder of the embedded world's base, and its data."""
    from trl_ext.toy import build_base
    from trl_ext.toy.task import demonstrations, preference_pairs, sample_prompts

    seed = training.seed if recipe.world_seed is None else recipe.world_seed
    folder = Path(str(training.output_dir)) / "world"
    show(f"No --model_name_or_path, so this is the embedded world, in {folder}.", flush=True)
    base = build_base(folder, seed, scale=recipe.world_scale)
    count = max(64, round(WORLD_DEMONSTRATIONS * min(1.0, recipe.world_scale)))
    told = Dataset.from_list(demonstrations(count, random.Random(f"rlhf-demonstrations-{seed}")))
    pairs = preference_pairs(recipe.world_pairs, random.Random(f"rlhf-preferences-{seed}"))
    test = preference_pairs(WORLD_TEST_PAIRS, random.Random(f"rlhf-test-{seed}"), temperature=0, split="eval")
    sets = (Dataset.from_list(convert_rows(rows)[0].to_list()) for rows in (pairs, test))
    prompts = (sample_prompts(n, random.Random(f"rlhf-{s}-{seed}"), s) for s, n in (("train", 4096), ("eval", 512)))
    return str(base), (told, *sets, *(Dataset.from_dict({"prompt": each}) for each in prompts))
