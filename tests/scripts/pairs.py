"""Preference pairs as conversations, in the words of the embedded world."""

import json
from pathlib import Path

PLACES = {"train": ("river", "hill"), "test": ("lake",)}


def preference_rows(split: str) -> list[dict[str, list[dict[str, str]]]]:
    """32 rows of "train", 16 of "test"."""
    return [
        {
            "prompt": [{"role": "user", "content": f"one {time} the small {animal} went to the {place} ."}],
            "chosen": [{"role": "assistant", "content": "she helped a frog . then she went home ."}],
            "rejected": [{"role": "assistant", "content": "she bit a frog ."}],
        }
        for place in PLACES[split]
        for time in ("morning", "day", "evening", "night")
        for animal in ("fox", "bear", "crow", "hen")
    ]


def write_pairs(folder: Path) -> None:
    """`folder` with train.jsonl and test.jsonl."""
    for split in PLACES:
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, preference_rows(split))))
