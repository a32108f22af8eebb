"""Pairs of answers to a prompt: how they are read, checked and named."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl_ext.data.reading import read_json_rows
from trl_ext.data.rows import Messages, RowError, check_preference_row, is_list, shorten

Prompt = str | Messages


@dataclass(frozen=True)
class Pair:
    """A prompt with two answers.

    Attributes:
        id: `pair_id` of the three.
        prompt: A text, or messages of which the last is the user's.
        a, b: The answers, as texts.
        columns: What else the row holds, as a topic or a source.
    """

    id: str
    prompt: Prompt
    a: str
    b: str
    columns: Mapping[str, Any] = field(default_factory=dict)


def pair_id(prompt: Prompt, a: str, b: str) -> str:
    """16 hexadecimal digits of the SHA-256 of a prompt and both answers, in this order."""
    content = json.dumps([prompt, a, b], ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def make_pair(row: Mapping[str, Any]) -> Pair:
    """A row as a pair.

    Args:
        row: `prompt` with `answer_a` and `answer_b`, or with two `responses`; or `chosen` and `rejected`, with or
            without `prompt`, as TRL has them: then a is the chosen one. Other fields are kept.

    Raises:
        RowError: There are not two answers, they are equal or empty, or the prompt is none.
    """
    if {"answer_a", "answer_b"} <= set(row):
        answers, used = [row["answer_a"], row["answer_b"]], {"answer_a", "answer_b"}
    elif "responses" in row:
        if not is_list(row["responses"]) or len(row["responses"]) != 2:
            count = len(row["responses"]) if is_list(row["responses"]) else shorten(row["responses"])
            raise RowError("not two answers", f"responses holds {count}; choose makes pairs of more")
        answers, used = list(row["responses"]), {"responses"}
    elif {"chosen", "rejected"} <= set(row):
        answers, used = [row["chosen"], row["rejected"]], {"chosen", "rejected"}
    else:
        raise RowError(
            "not two answers",
            f"the row has {sorted(row)}; give answer_a and answer_b, responses, or chosen and rejected",
        )
    whole = {"prompt": row.get("prompt"), "chosen": answers[0], "rejected": answers[1]}
    if is_list(whole["prompt"]):  # answers to a conversation may be plain texts
        whole |= {
            name: [{"role": "assistant", "content": whole[name]}]
            for name in ("chosen", "rejected")
            if isinstance(whole[name], str)
        }
    checked = check_preference_row(whole)
    a, b = (_text(checked[name]) for name in ("chosen", "rejected"))
    rest = {name: value for name, value in row.items() if name not in {"prompt", *used}}
    return Pair(pair_id(checked["prompt"], a, b), checked["prompt"], a, b, rest)


def _text(answer: Any) -> str:
    return answer if isinstance(answer, str) else answer[0]["content"]


def read_pairs(path: str | Path) -> list[Pair]:
    """All pairs of a .jsonl or .json file, in its order.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A row that is no pair, or one that is there twice, in either order; with its number, from 0 on.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {Path(path).resolve()}: name a jsonl file of pairs.")
    pairs = []
    seen: dict[frozenset[str], int] = {}
    for number, row in enumerate(read_json_rows(path)):
        if isinstance(row, RowError):
            raise ValueError(f"{path}, row {number}: {row}. Mend or remove the line.")
        try:
            pair = make_pair(row)
        except RowError as error:
            raise ValueError(f"{path}, row {number}: {error}. Mend or remove the line.") from error
        first = seen.setdefault(unordered(pair), number)
        if first != number:
            raise ValueError(
                f"{path}, row {number}: the same prompt and answers as in row {first}. Remove one of the lines, so "
                "that no pair is labelled twice."
            )
        pairs.append(pair)
    if not pairs:
        raise ValueError(f"{path} has no pairs: give at least one row.")
    return pairs


def unordered(pair: Pair) -> frozenset[str]:
    """The same for a pair and for the pair with its answers swapped."""
    return frozenset((pair.id, pair_id(pair.prompt, pair.b, pair.a)))


def as_messages(prompt: Prompt) -> Messages:
    """A prompt as messages to show: a text is one message of the user."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def last_words(prompt: Prompt) -> str:
    """The last message of a prompt, as a text."""
    return as_messages(prompt)[-1]["content"].strip()


def write_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write rows as a jsonl file, whole or not at all; how many there were."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".unfinished-{target.name}")
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    aside.write_text("".join(lines), encoding="utf-8")
    aside.replace(target)
    return len(lines)


def by_id(pairs: Sequence[Pair]) -> dict[str, Pair]:
    """Id -> pair."""
    return {pair.id: pair for pair in pairs}


def without_nan(value: Any) -> Any:
    """The same with None for NaN, which JSON has not."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
