"""Labels in and out: TRL's preference format with soft labels and strengths, and labels that were made elsewhere."""

import csv
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl_ext.data.reading import read_json_rows
from trl_ext.data.rows import RowError, check_preference_row, shorten
from trl_ext.feedback.labels import VERDICTS, Label, LabelFile, check_annotator
from trl_ext.feedback.pairs import Pair, by_id, make_pair, pair_id

WRITTEN = ("prompt", "chosen", "rejected", "strength", "margin", "soft_label", "votes")
# Words of strength of Llama 2 (arXiv 2307.09288, section 3.2.1), of HH-like sets and of their interfaces -> 2, 1 or 0
STRENGTH_WORDS = {
    "significantly": 2, "much": 2, "strong": 2, "strongly": 2, "clear": 2, "clearly": 2, "far": 2, "2": 2,
    "": 1, "better": 1, "moderate": 1, "moderately": 1, "slight": 1, "slightly": 1, "weak": 1, "1": 1,
    "negligible": 0, "negligibly": 0, "unsure": 0, "tie": 0, "same": 0, "0": 0,
}  # fmt: skip
TIES = {"tie": "tie", "same": "tie", "equal": "tie", "unsure": "tie", "both_bad": "both_bad", "both bad": "both_bad"}
SIDES = {"a": "a", "first": "a", "answer_a": "a", "b": "b", "second": "b", "answer_b": "b"}
SWAPPED = {"a_much": "b_much", "a": "b", "b": "a", "b_much": "a_much", "tie": "tie", "both_bad": "both_bad"}


# ---------------------------------------------------------------------- out


@dataclass(frozen=True)
class Vote:
    """What all annotators said of one pair.

    Attributes:
        votes: How many labels.
        soft_label: Share of the votes for the first answer; ties, and both bad, count one half.
        strength: Mean of the labels' values, from -2 to 2, the first answer's lead.
    """

    votes: int
    soft_label: float
    strength: float


def count_votes(labels: Iterable[Label]) -> dict[str, Vote]:
    """Pair -> what all annotators said.

    soft_label = 1/V sum_v (1 if value_v > 0, 1/2 if value_v = 0, else 0)        strength = 1/V sum_v value_v
    """
    values: dict[str, list[int]] = {}
    for label in labels:
        values.setdefault(label.pair, []).append(label.value)
    return {
        pair: Vote(len(v), sum(1.0 if x > 0 else 0.5 if x == 0 else 0.0 for x in v) / len(v), sum(v) / len(v))
        for pair, v in values.items()
    }


def preference_rows(
    pairs: Sequence[Pair], labels: Iterable[Label], *, margin: float | None = None, min_votes: int = 1
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Labelled pairs in TRL's preference format.

    The answer with more votes is the chosen one. `strength` is the mean of the labels (better 1, much better 2, tie 0,
    the other answer negative), at least 0; `soft_label` is the share of votes for the chosen answer, ties one half.

    Args:
        pairs: All pairs.
        labels: Of any number of annotators.
        margin: Writes a column `margin` = margin * strength, which `RewardModelTrainer` uses by itself. Without it
            `--margin_column strength` does the same with factor 1.
        min_votes: Pairs with fewer labels are left out.

    Returns:
        Rows with `prompt`, `chosen`, `rejected`, `strength`, `soft_label`, `votes`, perhaps `margin`, and the pairs'
        other columns; and reason -> how many pairs were left out for it.

    Raises:
        ValueError: Labels of other pairs, or a margin or number of votes that is none.
    """
    if margin is not None and not margin > 0:
        raise ValueError(f"margin={margin!r} must be a number above 0, or None to write none.")
    if min_votes < 1:
        raise ValueError(f"min_votes={min_votes!r} must be at least 1.")
    votes = count_votes(check_labels(pairs, labels))
    rows, dropped = [], Counter[str]()
    for pair in pairs:
        vote = votes.get(pair.id)
        if vote is None:
            dropped["not labelled"] += 1
        elif vote.votes < min_votes:
            dropped["too few votes"] += 1
        elif vote.soft_label == 0.5:
            dropped["tie"] += 1
        else:
            rows.append(_preference(pair, vote, margin))
    return rows, dropped


def _preference(pair: Pair, vote: Vote, margin: float | None) -> dict[str, Any]:
    first = vote.soft_label > 0.5
    chosen, rejected = (pair.a, pair.b) if first else (pair.b, pair.a)
    answers: dict[str, Any] = {"chosen": chosen, "rejected": rejected}
    if not isinstance(pair.prompt, str):
        answers = {name: [{"role": "assistant", "content": text}] for name, text in answers.items()}
    strength = max(0.0, vote.strength if first else -vote.strength)
    row = check_preference_row({"prompt": pair.prompt, **answers, "strength": strength})
    row["soft_label"] = vote.soft_label if first else 1 - vote.soft_label
    row["votes"] = vote.votes
    if margin is not None:
        row["margin"] = margin * strength
    return row | {name: value for name, value in pair.columns.items() if name not in WRITTEN}


def check_labels(pairs: Sequence[Pair], labels: Iterable[Label]) -> list[Label]:
    """The labels, if all are of these pairs.

    Raises:
        ValueError: Whose label is of another set.
    """
    known, checked = by_id(pairs), list(labels)
    for label in checked:
        if label.pair not in known:
            raise ValueError(
                f"the labels of {label.annotator!r} belong to another set of pairs: {label.pair} is not among these "
                f"{len(pairs)}. Name the pairs that they were made with."
            )
    return checked


# ---------------------------------------------------------------------- in


@dataclass
class ImportReport:
    """What became of labels that were made elsewhere.

    Attributes:
        written: Annotator -> labels that are new.
        there: Rows whose label was there already, the same.
        kept: (row, pair) of labels that say something else than the one that is there, which stays.
    """

    written: Counter[str] = field(default_factory=Counter)
    there: int = 0
    kept: list[tuple[int, str]] = field(default_factory=list)


def import_labels(
    path: str | Path, pairs: Sequence[Pair], folder: str | Path, annotator: str | None = None
) -> ImportReport:
    """Add labels of a csv or jsonl file to the annotators' files; labels that are there stay as they are.

    A row names its pair by `pair` (the id), by `prompt`, `answer_a` and `answer_b`, or by `chosen` and `rejected`, with
    the answers in either order. What it says stands in `verdict` or `choice` ("a", "b", "tie", "both_bad", "a_much",
    "A is slightly better", ...), and perhaps `strength` ("slight", "clear", ...); a row with `chosen` needs only that.
    "Significantly", "clear" and the like are much better; "better" and "slightly" are better; "negligibly better" and
    "unsure" are ties.

    Args:
        path: The file.
        pairs: The set that is labelled.
        folder: Of the annotators' files.
        annotator: Whose labels they are, where rows have no `annotator`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A row that cannot be read or is of another pair. Then nothing has been written.
    """
    known, swapped = by_id(pairs), {pair_id(p.prompt, p.b, p.a): p.id for p in pairs}
    found = []
    for number, row in enumerate(_read_rows(Path(path))):
        try:
            if isinstance(row, RowError):
                raise row
            who = check_annotator(row.get("annotator") or annotator or _missing("annotator"))
            name, verdict, turned = _pair_of(row), _verdict_of(row), False
            if name not in known:
                if name not in swapped:
                    raise ValueError(f"its pair, {name}, is not in this set of pairs")
                name, turned = swapped[name], True
            found.append((number, who, name, SWAPPED[verdict] if turned else verdict))
        except ValueError as error:
            raise ValueError(f"{path}, row {number}: {error}. Nothing was imported.") from error
    report, files = ImportReport(), dict[str, LabelFile]()
    for number, who, name, verdict in found:
        if who not in files:
            files[who] = LabelFile(folder, who, known)
        before = files[who].labels.get(name)
        if before is None:
            files[who].label(name, verdict, source=Path(path).name)
            report.written[who] += 1
        elif before.verdict == verdict:
            report.there += 1
        else:
            report.kept.append((number, name))
    return report


def _missing(name: str) -> str:
    raise ValueError(f"there is no column {name!r}: add it, or name one annotator for all rows")


def _read_rows(path: Path) -> Iterable[Mapping[str, Any] | RowError]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path.resolve()}: name a csv or jsonl file of labels.")
    if path.suffix.lower() != ".csv":
        return read_json_rows(path)
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            return [{k: v for k, v in row.items() if v not in ("", None)} for row in csv.DictReader(file)]
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path} is no csv file in UTF-8: {error}. Save it again.") from error


def _pair_of(row: Mapping[str, Any]) -> str:
    """Id of a row's pair, with its answers in the row's order."""
    if isinstance(row.get("pair"), str):
        return row["pair"]
    if not ({"answer_a", "answer_b"} <= set(row) or {"chosen", "rejected"} <= set(row)):
        raise ValueError("it names no pair: give pair, or prompt, answer_a and answer_b, or chosen and rejected")
    return make_pair(row).id


def _verdict_of(row: Mapping[str, Any]) -> str:
    said = row.get("verdict", row.get("choice"))
    strength = row.get("strength")
    if said is None:
        if "chosen" not in row:
            raise ValueError("it says nothing: give verdict or choice")
        said = "a"  # make_pair puts the chosen answer first
    return parse_verdict(said, strength)


def parse_verdict(said: Any, strength: Any = None) -> str:
    """A verdict of `VERDICTS` from words: ("b", "clear") and "B is much better" are b_much.

    Raises:
        ValueError: Other words than those of `import_labels`.
    """
    text = " ".join(str(said).strip().lower().split())
    if strength is None and text in VERDICTS:
        return text
    if text in TIES:
        return TIES[text]
    side, _, rest = text.partition(" ")
    words = str("" if strength is None else strength).strip().lower().removesuffix(".0")
    if strength is None and rest:
        words = rest.removeprefix("is ")
    words = words.removesuffix("better").strip() if words != "better" else words
    if side not in SIDES or words not in STRENGTH_WORDS or (strength is not None and rest):
        raise ValueError(
            f"verdict {shorten(said)} with strength {shorten(strength)} is unknown: use one of {', '.join(VERDICTS)}, "
            f"or a or b with one of {', '.join(word for word in STRENGTH_WORDS if word)}"
        )
    level = STRENGTH_WORDS[words]
    return "tie" if level == 0 else f"{SIDES[side]}_much" if level == 2 else SIDES[side]
