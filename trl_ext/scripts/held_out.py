"""What is held out of a training is held out by its prompt, in every kind of rows that the training reads."""

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset

from trl_ext.feedback.pairs import write_rows

Show = Callable[..., Any]


def prompt_key(prompt: Any) -> str:
    """The same for a prompt as a text and as the one message of a user, whitespace around it aside."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    turns = [(turn.get("role"), turn.get("content")) for turn in messages]
    return json.dumps([(role, text.strip() if isinstance(text, str) else text) for role, text in turns], default=str)


def split_by_prompt(rows: Dataset, count: int, seed: int, show: Show) -> tuple[Dataset, Dataset]:
    """Rows to train on, and about `count` rows to test on; all rows of a prompt are on one side.

    Rows that have one prompt alone are split by row, and that is said.
    """
    keys = [prompt_key(prompt) for prompt in rows["prompt"]]
    sizes = Counter(keys)
    if len(sizes) == 1:
        show("All rows have the same prompt: those to test on are drawn by row, and have it too.")
        parts = rows.train_test_split(test_size=count, seed=seed)
        return parts["train"], parts["test"]
    order = sorted(sizes)
    random.Random(f"held-out-{seed}").shuffle(order)
    held, taken = set[str](), 0
    for key in order[:-1]:
        if not held or taken + sizes[key] <= count:
            held.add(key)
            taken += sizes[key]
    sides = [[i for i, key in enumerate(keys) if (key in held) == out] for out in (False, True)]
    return rows.select(sides[0]), rows.select(sides[1])


def prompts_of(rows: Any, encoder: Any, longest: int, show: Show) -> Any:
    """The different prompts of rows, without those that are too long.

    Raises:
        ValueError: None is left.
    """
    prompts = list({json.dumps(prompt): prompt for prompt in rows["prompt"]}.values())
    lengths = encoder.prompt_lengths(prompts)
    kept = [{"prompt": prompt} for prompt, length in zip(prompts, lengths, strict=True) if length <= longest]
    left = len(prompts) - len(kept)
    show(f"{len(kept):,} different prompts of at most {longest} tokens, {left:,} longer ones left out")
    if not kept:
        raise ValueError(f"--max_prompt_length {longest}: the shortest prompt has {min(lengths)} tokens. Raise it.")
    return Dataset.from_list(kept)


def prompts_of_both(train: Any, test: Any, encoder: Any, longest: int, show: Show) -> tuple[Dataset, Dataset]:
    """Prompts to train on and prompts to judge on; the first without the second."""
    prompts, held_out = (prompts_of(rows, encoder, longest, show) for rows in (train, test))
    return prompts_apart(prompts, held_out, show), held_out


def prompts_apart(prompts: Dataset, held_out: Dataset, show: Show) -> Dataset:
    """Prompts to train on, without those that are held out; says how many that were.

    Raises:
        ValueError: None is left.
    """
    held = {prompt_key(prompt) for prompt in held_out["prompt"]}
    kept = [i for i, prompt in enumerate(prompts["prompt"]) if prompt_key(prompt) not in held]
    left = len(prompts) - len(kept)
    if not kept:
        raise ValueError(
            f"all {left:,} prompts to train on are among those held out to judge on: give more prompts, or other ones "
            "to test on."
        )
    if left:
        show(f"{left:,} prompts left out of the training: they are held out to judge on.")
    return prompts.select(kept) if left else prompts


def demonstrations_apart(rows: Dataset, held_out: Dataset, show: Show) -> Dataset:
    """Demonstrations whose prompts are not held out; says how many were, or that it cannot be known.

    Raises:
        ValueError: None is left.
    """
    if not {"prompt", "messages"} & set(rows.column_names):
        show("Demonstrations are whole texts: whether they hold prompts that are held out is not known.")
        return rows
    held = {prompt_key(prompt) for prompt in held_out["prompt"]}
    kept = [i for i, row in enumerate(rows) if held.isdisjoint(_prompts_in(row))]
    left = len(rows) - len(kept)
    if not kept:
        raise ValueError(f"all {left:,} demonstrations answer prompts that are held out to judge on: give other ones.")
    if left:
        show(f"{left:,} demonstrations left out: their prompts are held out to judge on.")
    return rows.select(kept) if left else rows


def _prompts_in(row: Any) -> Iterator[str]:
    if row.get("prompt") is not None:
        yield prompt_key(row["prompt"])
    messages = row.get("messages") or []
    for place, turn in enumerate(messages):
        if turn.get("role") == "assistant":
            yield prompt_key(messages[:place])


def keep_prompts(folder: Path, prompts: Dataset, held_out: Dataset) -> dict[str, Any]:
    """Write both kinds of prompts down, and return the options by which `trl-ext evaluate` finds those held out."""
    from accelerate import PartialState

    paths = [folder / "data" / name for name in ("prompts.jsonl", "held_out.jsonl")]
    state = PartialState()
    if state.is_main_process:
        for path, rows in zip(paths, (prompts, held_out), strict=True):
            write_rows(path, rows.select_columns("prompt"))
    state.wait_for_everyone()
    names = {"dataset_name": str(paths[0].resolve()), "dataset_test_name": str(paths[1].resolve())}
    return names | {"dataset_config": None, "dataset_train_split": "train", "dataset_test_split": None}
