"""From rows of a dataset to the tokens of a batch: what is wrong is an error or is counted, nothing is passed over."""

import logging
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset, Features, List, Value
from torch import Tensor

from trl_ext.ops.packing import PackedBatch, pack
from trl_ext.text import Prompt, TextEncoder, check_prompt, message_text

LOGGER = logging.getLogger(__name__)
EXAMPLES = 3
COUNTED = {
    "responses_cut": "response(s) longer than max_length were cut; raise max_length to train on all of them",
    "responses_empty": "empty response(s) were left out",
    "rows_without_a_pair": "row(s) have no two different scores: their best response is imitated, nothing is ranked",
}
ENCODED = {
    "prompt_ids": List(Value("int32")),
    "response_ids": List(List(Value("int32"))),
    "scores": List(Value("float64")),
    **dict.fromkeys(COUNTED, Value("int32")),
}


@dataclass(slots=True)
class RankedRow:
    """One prompt and K responses with their scores, as tokens."""

    prompt: Prompt
    prompt_ids: list[int]
    response_ids: list[list[int]]  # K lists; none in the online variants before they are sampled
    scores: list[float]  # K numbers, higher is better
    columns: dict[str, Any] = field(default_factory=dict)  # the dataset's other columns, for reward functions


@dataclass(slots=True)
class RankedBatch:
    """N responses to G prompts."""

    parts: list[PackedBatch]  # all N, laid out by `ops.packing.pack`
    rewards: Tensor  # (N,) float32
    group: Tensor  # (N,) int64, the number of the prompt that each answers, 0 to G - 1


@dataclass(slots=True)
class DataReport:
    """What a dataset held that is not quite right: how often, and the first rows where."""

    rows: int = 0
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTED, 0))
    examples: dict[str, list[int]] = field(default_factory=lambda: {name: [] for name in COUNTED})

    def report(self, name: str) -> str:
        """One line for each thing counted; empty where nothing was."""
        lines = [
            f"  {count} {COUNTED[what]} (first in rows {', '.join(map(str, self.examples[what]))})"
            for what, count in self.counts.items()
            if count
        ]
        return "\n".join([f"{name}, {self.rows} rows:", *lines]) if lines else ""


def encode_dataset(
    dataset: Dataset,
    name: str,
    encoder: TextEncoder,
    *,
    max_length: int,
    min_room: int = 1,
    needs_responses: bool = True,
    scored: bool = False,
    num_proc: int | None = None,
) -> tuple[Dataset, DataReport]:
    """Tokenise a dataset with columns `prompt`, `responses` and `scores`; what is counted is logged once.

    Args:
        dataset: `prompt` plain or conversational; `responses` a list of strings, or of lists of messages; `scores` a
            list of as many numbers. `truncated`, if there, a list of as many bools: true where sampling stopped at its
            length limit, so that the response gets no end. Other columns are kept.
        name: What errors call it.
        encoder: Of a tokenizer with a chat template, where prompts are conversations.
        max_length: Tokens of prompt and response; longer responses are cut.
        min_room: Tokens of these that a prompt must leave for a response.
        needs_responses: False where responses are sampled online: rows may then have none.
        scored: Whether a reward role reads the samples, with what a chat template writes around them.
        num_proc: Processes.

    Returns:
        The dataset with columns `prompt_ids` and `response_ids` added and `scores` as floats, and what was counted.

    Raises:
        TypeError: Not a `datasets.Dataset`.
        ValueError: A column is missing, the dataset is empty, or a row cannot be used; with the row's number.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"{name} must be a datasets.Dataset with columns prompt, responses and scores, got "
            f"{type(dataset).__name__}. From a list of dicts: Dataset.from_list(rows)."
        )
    wanted = ("prompt", "responses", "scores") if needs_responses else ("prompt",)
    missing = [column for column in wanted if column not in dataset.column_names]
    if missing:
        raise ValueError(f"{name} has no column {', '.join(missing)}, only {dataset.column_names}. Add or rename it.")
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty: give at least one row.")
    settings = {"max_length": max_length, "min_room": min_room, "needs_responses": needs_responses, "scored": scored}
    dropped = [column for column in ("responses", "scores", "truncated") if column in dataset.column_names]
    kept = {column: kind for column, kind in dataset.features.items() if column not in dropped}
    encoded = dataset.map(
        _encode_row,
        with_indices=True,
        remove_columns=dropped,
        fn_kwargs={"name": name, "encoder": encoder, **settings},
        features=Features(kept | ENCODED),  # not to be guessed from rows that have no responses yet
        num_proc=num_proc,
        desc=f"Tokenizing {name}",
    )
    counts = DataReport(len(dataset))
    for what in COUNTED:
        column = list(encoded[what])
        counts.counts[what] = sum(column)
        counts.examples[what] = [row for row, count in enumerate(column) if count][:EXAMPLES]
    if counts.report(name):
        LOGGER.warning(counts.report(name))
    return encoded.remove_columns(list(COUNTED)), counts


def _encode_row(
    row: dict[str, Any],
    index: int,
    *,
    name: str,
    encoder: TextEncoder,
    max_length: int,
    min_room: int,
    needs_responses: bool,
    scored: bool,
) -> dict[str, Any]:
    """One row's tokens, and how often each of `COUNTED` occurs in it."""
    where = f"{name} row {index}"
    prompt, responses, scores = row["prompt"], row.get("responses") or [], row.get("scores") or []
    check_prompt(prompt, where)
    if not isinstance(responses, list) or not isinstance(scores, list):
        raise ValueError(
            f"{where}: responses={responses!r} and scores={scores!r} must both be lists, one entry for each."
        )
    for response in responses:
        if not isinstance(response, str):
            check_prompt(response, f"{where}, a response")  # messages, as in a prompt
    if len(responses) != len(scores):
        raise ValueError(f"{where} has {len(responses)} responses and {len(scores)} scores: give one for each.")
    truncated = row.get("truncated") or [False] * len(responses)
    if len(truncated) != len(responses) or not all(isinstance(cut, bool) for cut in truncated):
        raise ValueError(
            f"{where} has truncated={truncated!r} for {len(responses)} responses: give true or false for each, or drop "
            "the column."
        )
    if needs_responses and len(responses) < 2:
        raise ValueError(
            f"{where} has {len(responses)} response(s): a ranking needs at least 2. Drop such rows: "
            "dataset.filter(lambda r: len(r['responses']) >= 2)."
        )
    bad = [score for score in scores if type(score) not in (int, float) or not math.isfinite(score)]
    if bad:
        raise ValueError(f"{where} has the score {bad[0]!r}: give finite numbers, or drop the response.")
    prompt_ids = encoder.prompt_ids(prompt)
    room = max_length - len(prompt_ids) - (encoder.added_length(prompt) if scored else 0)
    if room < min_room:
        raise ValueError(
            f"{where}: a prompt of {len(prompt_ids)} tokens leaves {max(room, 0)} of max_length={max_length} for a "
            f"response, which needs {min_room}. Raise max_length (up to the model's positions), lower "
            "max_completion_length if responses are sampled online, or drop such rows."
        )
    rated = zip(responses, scores, truncated, strict=True)
    kept = [(response, float(score), cut) for response, score, cut in rated if message_text(response).strip()]
    if needs_responses and not kept:
        raise ValueError(f"{where} has only empty responses: drop it.")
    ids = [encoder.response_ids(prompt, response, not cut, where) for response, _, cut in kept]
    return {
        "prompt_ids": prompt_ids,
        "response_ids": [response[:room] for response in ids],
        "scores": [score for _, score, _ in kept],
        "responses_cut": sum(len(response) > room for response in ids),
        "responses_empty": len(responses) - len(kept),
        "rows_without_a_pair": int(bool(kept) and len({score for _, score, _ in kept}) < 2),
    }


def collate(features: list[dict[str, Any]]) -> dict[str, list[RankedRow]]:
    """Rows of an encoded dataset as records. They become tensors later: online, their responses are not known yet."""
    known = ("prompt", "prompt_ids", "response_ids", "scores")
    rows = []
    for feature in features:
        columns = {name: value for name, value in feature.items() if name not in known}
        rows.append(RankedRow(**{name: feature[name] for name in known}, columns=columns))
    return {"rows": rows}


def to_batch(
    rows: list[RankedRow], pad_token_id: int, *, share: bool, max_columns: int | None, device: Any = None
) -> RankedBatch:
    """Lay out the responses of some rows for one call of the model."""
    groups = [[row.prompt_ids + ids for ids in row.response_ids] for row in rows]
    starts = [[len(row.prompt_ids)] * len(row.response_ids) for row in rows]
    parts = pack(groups, starts, pad_token_id, share=share, max_columns=max_columns)
    sizes = torch.tensor([len(row.response_ids) for row in rows])
    return RankedBatch(
        parts=[part.to(device) for part in parts],
        rewards=torch.tensor([score for row in rows for score in row.scores], device=device),
        group=torch.arange(len(rows)).repeat_interleave(sizes).to(device),
    )
