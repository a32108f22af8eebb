"""Preference rows to token ids, with a count of those that cannot be used; and the batches of the trainer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm

from trl_ext.data import ConversionReport, RowError, check_preference_row, check_ranking_row
from trl_ext.ops.packing import pack
from trl_ext.reward.config import RewardModelConfig
from trl_ext.reward.losses import smoothing_of
from trl_ext.text import TextEncoder, score_length

TRAINING = "train_dataset"
AS_IT_STANDS = "dataset"  # rows that are only scored: chosen and rejected stay where they are
SWAPPED = "sides swapped, their soft label is below 0.5: the rejected response is the better one"
UNDECIDED = "soft label 0.5: not in any accuracy"
PAIR, RANKING = {"chosen", "rejected"}, {"prompt", "responses", "scores"}


def prepare_tokenizer(tokenizer: Any, args: RewardModelConfig) -> None:
    """Set the special tokens and the chat template that `args` ask for, which `RewardTrainer` does after tokenizing.

    Raises:
        ValueError: A token is not in the vocabulary, or the template is not a file: cloning one from a Hub id adds
            tokens to the embeddings, which adapters on one base share.
    """
    for name in ("eos_token", "pad_token"):
        token = getattr(args, name)
        if token is None:
            continue
        if token not in tokenizer.get_vocab():
            raise ValueError(f"{name}={token!r} is not in the vocabulary of the tokenizer.")
        setattr(tokenizer, name, token)
    if args.chat_template_path is not None:
        path = Path(args.chat_template_path)
        if not path.is_file():
            raise ValueError(
                f"chat_template_path={args.chat_template_path!r} is not a file: give the template itself (.jinja). "
                "Copying one from another model adds tokens to the base, which all adapters share."
            )
        tokenizer.chat_template = path.read_text(encoding="utf-8")


def check_columns(dataset: Any, name: str, args: RewardModelConfig) -> None:
    """Whether the columns are there that the rows need, and in training those that the options read.

    Raises:
        TypeError: Not a `datasets.Dataset`.
        ValueError: No rows, or a column is missing.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"{name} must be a datasets.Dataset, got {type(dataset).__name__}: its rows are checked and counted before "
            "training, so a stream has to be read into one (Dataset.from_generator)."
        )
    if not len(dataset):
        raise ValueError(f"{name} has no rows.")
    columns = set(dataset.column_names)
    if not columns >= PAIR and not columns >= RANKING:
        raise ValueError(
            f"{name} has the columns {sorted(columns)}: it needs `chosen` and `rejected` (and `prompt`), or `prompt`, "
            "`responses` and `scores`. trl_ext.data.load_preferences converts public sets."
        )
    ignored = sorted(columns & {"tools", "chat_template_kwargs"})
    if ignored:
        raise ValueError(
            f"{name} has the columns {ignored}, with which RewardTrainer would render each row in its own way: a "
            "reward role could not read samples so. Remove them: dataset.remove_columns(...)."
        )
    if name != TRAINING:  # what is only evaluated or scored needs no margin
        return
    if args.margin_column is not None and args.margin_column not in columns:
        raise ValueError(
            f"margin_column={args.margin_column!r} is no column of {name}: it has {sorted(columns)}. "
            "trl-ext preference-strength measures `strength_mean`."
        )
    if args.soft_label_column is not None and args.soft_label_column not in columns:
        raise ValueError(
            f"soft_label_column={args.soft_label_column!r} is no column of {name}: it has {sorted(columns)}. "
            "trl-ext label --export writes `soft_label`."
        )
    if args.label_smoothing > 0 and args.label_smoothing_on == "suspected" and "suspected" not in columns:
        raise ValueError(
            f"label_smoothing_on='suspected', but {name} has no column `suspected`. trl-ext preference-strength "
            "writes one; or use label_smoothing_on='all'."
        )


def tokenize_preferences(
    dataset: Dataset,
    encoder: TextEncoder,
    args: RewardModelConfig,
    name: str,
    positions: int | None = None,
    sources: dict[str, int] | None = None,
) -> tuple[Dataset, ConversionReport]:
    """Check and tokenise every row; those that cannot be used are counted by reason.

    Args:
        dataset: Pairs or rankings, plain or conversational.
        encoder: Of a tokenizer with a chat template, if rows are conversations.
        args: For `max_length` and the options that read columns.
        name: Whose rows they are, for errors and the progress bar; only `train_dataset` must have those columns. A row
            with a soft label below 0.5 has its sides swapped, and the sign of its margin, but in "dataset".
        positions: Of the model; longer rows are left out too.
        sources: Names in the column `source` -> their numbers; names that are new here get one.

    Returns:
        Columns `row`, its index in the dataset given; `ids` (K token sequences, best first); `prompt_length`; `ranks`
        (K, lower is better, equal for ties); `margin`; `label_smoothing`, soft labels included; `decided`, false at a
        soft label of 0.5; `source`, a number, -1 without one; and for `RewardTrainer` `chosen_ids` and `rejected_ids`,
        the best and the worst.

    Raises:
        ValueError: A missing column, a margin or strength that is not a number, a soft label that is no probability or
            is one of a ranking, or no row left.
    """
    check_columns(dataset, name, args)
    is_ranking = not set(dataset.column_names) >= PAIR
    report = ConversionReport("ranking" if is_ranking else "preference")
    margin_column = args.margin_column or "margin"
    has_margin = margin_column in dataset.column_names
    soft_column = args.soft_label_column or "soft_label"
    has_soft = soft_column in dataset.column_names
    if has_soft and is_ranking:
        raise ValueError(f"{name} has {soft_column!r} beside rankings, whose pairs are many: remove that column.")
    sources = {} if sources is None else sources
    rows = []
    for index, row in enumerate(tqdm(dataset, desc=f"tokenizing {name}", leave=False, disable=args.disable_tqdm)):
        report.rows_read += 1
        margin = _number(row[margin_column], margin_column, index, name) if has_margin else 0.0
        smoothed = args.label_smoothing_on == "all" or bool(row.get("suspected"))
        smoothing = args.label_smoothing if smoothed else 0.0
        soft = _soft(row[soft_column], soft_column, index, name) if has_soft else 1.0
        swapped = soft < 0.5 and name != AS_IT_STANDS
        if swapped:
            row, soft, margin = {**row, "chosen": row["rejected"], "rejected": row["chosen"]}, 1 - soft, -margin
        if has_soft:
            smoothing = smoothing_of(soft, smoothing)
        source = row.get("source")
        try:
            tokens = _ranking(row, encoder) if is_ranking else _pair(row, encoder)
            longest = max(map(len, tokens["ids"]))
            if args.max_length is not None and longest > args.max_length:
                raise RowError(f"longer than max_length={args.max_length} tokens", f"{longest} tokens")
            if positions is not None and longest > positions:
                raise RowError(f"longer than the model's {positions} positions", f"{longest} tokens")
        except RowError as error:
            report.drop(index, error)
            continue
        report.rows_kept += 1
        report.changed.update([SWAPPED] * swapped + [UNDECIDED] * (soft == 0.5))
        rows.append(
            tokens
            | {
                "row": index,
                "margin": args.margin + margin,
                "label_smoothing": smoothing,
                "decided": soft != 0.5,
                "source": -1 if source in (None, "") else sources.setdefault(str(source), len(sources)),
                "chosen_ids": tokens["ids"][0],
                "rejected_ids": tokens["ids"][-1],
            }
        )
    if not rows:
        raise ValueError(f"no row of {name} can be used:\n{report}")
    return Dataset.from_list(rows), report


def _number(value: Any, column: str, index: int, name: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if isinstance(value, bool | str) or number != number or abs(number) == float("inf"):
        raise ValueError(f"row {index} of {name}: {column} is {value!r}, it must be a finite number.")
    return number


def _soft(value: Any, column: str, index: int, name: str) -> float:
    number = _number(value, column, index, name)
    if not 0 <= number <= 1:
        raise ValueError(
            f"row {index} of {name}: {column} is {value!r}, it must be from 0 to 1: the probability that the chosen "
            "response is the better one."
        )
    return number


def _pair(row: Mapping[str, Any], encoder: TextEncoder) -> dict[str, Any]:
    record = check_preference_row({name: row.get(name) for name in ("prompt", "chosen", "rejected")})
    ids, start = _encode(record["prompt"], [record["chosen"], record["rejected"]], encoder)
    if ids[0] == ids[1]:
        raise RowError("chosen equals rejected once tokenized")
    return {"ids": ids, "prompt_length": start, "ranks": [0, 1]}


def _ranking(row: Mapping[str, Any], encoder: TextEncoder) -> dict[str, Any]:
    record = check_ranking_row(row)
    scores = record["scores"]
    if len(set(scores)) == 1:
        raise RowError("all scores of a ranking are equal", f"{scores[0]}")
    order = sorted(range(len(scores)), key=lambda k: -scores[k])
    responses: list[Any] = [record["responses"][k] for k in order]
    ids, start = _encode(record["prompt"], responses, encoder)
    better = sorted(set(scores), reverse=True)
    ranks = [better.index(scores[k]) for k in order]
    responses = list(map(tuple, ids))
    if len(set(responses)) < len(set(zip(responses, ranks, strict=True))):
        raise RowError("one response with two scores once tokenized")
    return {"ids": ids, "prompt_length": start, "ranks": ranks}


def _encode(prompt: Any, responses: list[Any], encoder: TextEncoder) -> tuple[list[list[int]], int]:
    """Token ids of prompt and response, each of them, and how many of them are the prompt's."""
    ids, alone = [encoder.rendered_ids(prompt, response) for response in responses], encoder.prompt_ids(prompt)
    shortest = min([len(alone), *(len(sequence) - 1 for sequence in ids)])
    start = next((i for i in range(shortest) if any(sequence[i] != alone[i] for sequence in ids)), shortest)
    if start < 1:
        raise RowError("the prompt has no token of its own", "its tokens change with the response")
    return ids, start


def overlap(train: Dataset, test: Dataset) -> int:
    """How many rows of `test` hold a sequence of tokens, prompt and response, that `train` holds too."""
    seen = {tuple(ids) for row in train["ids"] for ids in row}
    return sum(any(tuple(ids) in seen for ids in row) for row in test["ids"])


@dataclass
class PreferenceCollator:
    """Rows of `tokenize_preferences` to a batch: every response once, all pairs of a row, packed for few passes.

    The batch of B rows with N responses and P pairs: `prompts` (B,), the length of each prompt; `sources` (B,), the
    number of where each row comes from, -1 where it is not known; `decided` (B,) bool, whether the label says which
    response is better; `winners`, `losers`
    (P,), numbers of responses; `rows` (P,), the row of each pair; `weights` (P,), 1 / (pairs in the row) / B;
    `margins`, `label_smoothing` (P,); `best`, `worst` (B,); `is_best` (N,) bool; `parts` for `RewardModel`, whose
    scores are read on the last token that is not padding, as transformers' classifiers do.
    """

    pad_token_id: int
    share: bool = True
    max_columns: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        pairs: list[tuple[int, int, int]] = []
        best, worst, number = [], [], 0
        for r, row in enumerate(rows):
            ranks = row["ranks"]
            pairs += [(number + i, number + j, r) for i, j in combinations(range(len(ranks)), 2) if ranks[i] < ranks[j]]
            best.append(number)
            number += len(ranks)
            worst.append(number - 1)
        winners, losers, owners = (torch.tensor(column) for column in zip(*pairs, strict=True))
        counts = torch.bincount(owners, minlength=len(rows))
        is_best = torch.zeros(number, dtype=torch.bool)
        is_best[best] = True

        def per_pair(column: str) -> Tensor:
            return torch.tensor([float(row[column]) for row in rows])[owners]

        groups = [row["ids"] for row in rows]
        starts = [[row["prompt_length"]] * len(row["ids"]) for row in rows]
        return {
            "prompts": torch.tensor([row["prompt_length"] for row in rows]),
            "sources": torch.tensor([row.get("source", -1) for row in rows]),
            "decided": torch.tensor([row.get("decided", True) for row in rows]),
            "winners": winners,
            "losers": losers,
            "rows": owners,
            "weights": 1 / counts[owners] / len(rows),
            "margins": per_pair("margin"),
            "label_smoothing": per_pair("label_smoothing"),
            "best": torch.tensor(best),
            "worst": torch.tensor(worst),
            "is_best": is_best,
            "parts": pack(
                groups,
                starts,
                self.pad_token_id,
                share=self.share,
                max_columns=self.max_columns,
                ends=[[score_length(ids, self.pad_token_id) for ids in group] for group in groups],
            ),
        }
