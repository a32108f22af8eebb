"""A set of preferences or rankings by name, converted row by row, with a report of what was dropped and why."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_ext.data.reading import check_split, is_json_file, load_split, read_json_rows
from trl_ext.data.rows import STRENGTHS, Record, Row, RowError, is_tie, shorten
from trl_ext.data.sources import FORMATS, Format, detect_format

if TYPE_CHECKING:
    from datasets import Dataset, Features

BATCH = 1000  # records that are held as Python objects; the rest is Arrow
PEEK = 100  # rows whose fields are taken for the columns of a file


@dataclass
class ConversionReport:
    """What became of the rows. `str(report)` is a table.

    Attributes:
        format: name of the format that the rows were read as.
        rows_read: rows read.
        rows_kept: rows in the dataset; rows_read = rows_kept + the sum of `dropped`.
        dropped: reason -> number of rows dropped for it.
        examples: reason -> (index, detail) of the first row dropped for it, counted from 0.
        ignored: what was left out of rows that were kept -> number of rows.
        changed: what was done to rows that were kept -> number of rows.
    """

    format: str
    rows_read: int = 0
    rows_kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, tuple[int, str]] = field(default_factory=dict)
    ignored: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)

    def drop(self, index: int, error: RowError) -> None:
        """Count one dropped row."""
        self.dropped[error.reason] += 1
        self.examples.setdefault(error.reason, (index, error.detail))

    def __str__(self) -> str:
        share = f" ({self.rows_kept / self.rows_read:.1%})" if self.rows_read else ""
        lines = [f"{self.format}: {self.rows_read:,} rows read, {self.rows_kept:,} kept{share}"]
        if self.dropped:
            width = max(len("dropped because"), *map(len, self.dropped))
            lines.append(f"  {'dropped because':<{width}}  {'rows':>9}  {'first':>9}  example")
        for reason, count in self.dropped.most_common():
            index, detail = self.examples[reason]
            lines.append(f"  {reason:<{width}}  {count:>9,}  {index:>9,}  {' '.join(detail.split())}".rstrip())
        lines += [f"  ignored in {count:,} rows: {what}" for what, count in self.ignored.items()]
        lines += [f"  {count:,} rows: {what}" for what, count in self.changed.items()]
        return "\n".join(lines)


def load_preferences(
    source: str | Path,
    format: str = "auto",
    split: str = "train",
    *,
    ties: str = "drop",
    config: str | None = None,
    data_dir: str | None = None,
    revision: str | None = None,
) -> "tuple[Dataset, ConversionReport]":
    """A public preference set in TRL's preference format, or a set of rankings.

    Args:
        source: a Hub id, a folder of `save_to_disk` or of data files, or a file: .jsonl or .json (.gz), .parquet, .csv.
        format: a name in `FORMATS`, or "auto", which goes by the columns. "trl" and "ranking" check rows that
            have the right format already.
        split: the split of a Hub dataset or folder; a single file has only "train".
        ties: "drop" counts and drops rows without a preference; "keep" keeps rankings whose scores are all equal.
        config: as `load_split`, and so are `data_dir` and `revision`.

    Returns:
        The dataset, and the report of the conversion.

    Raises:
        ValueError: what `convert_rows` and `load_split` raise it for.
        FileNotFoundError: no such file.
    """
    if is_json_file(source):
        check_split(source, split)
        rows: Iterable[Row | RowError] = read_json_rows(source)
    else:
        rows = load_split(source, split, config=config, data_dir=data_dir, revision=revision)
    return convert_rows(rows, format, ties=ties)


def convert_rows(
    rows: "Iterable[Row | RowError] | Dataset", format: str = "auto", *, ties: str = "drop"
) -> "tuple[Dataset, ConversionReport]":
    """Rows as published -> the dataset and the report. The first record decides which columns all must have.

    Args:
        rows: the rows, read once, in order; a RowError among them is a row that could not be read.
        format: as for `load_preferences`.
        ties: as for `load_preferences`.

    Raises:
        ValueError: an unknown format or way with ties; ties="keep" for pairs; columns missing (before any row is
            converted); no rows; no row that can be used.
    """
    name, rows, total, worded = _open(rows, format)
    kind = FORMATS[name]
    _check_ties(ties, name, kind)
    report = ConversionReport(name)
    rows = _without(rows, worded, report)
    dataset = _to_dataset(_records(rows, total, kind, ties == "keep", report))
    if dataset is None:
        raise ValueError(f"no row could be used\n{report}")
    return dataset, report


def deduplicate(train: "Dataset", test: "Dataset", by: str = "response") -> "tuple[Dataset, ConversionReport]":
    """The rows of `train` that are not in `test`, whitespace around texts aside.

    Args:
        train: preferences or rankings, as `convert_rows` returns them.
        test: the same kind of rows.
        by: "response" drops a row if one of its responses follows the same prompt in `test`, chosen or not; "prompt"
            drops it if its prompt is in `test`.

    Returns:
        What is left of `train`, and the report of what was dropped.

    Raises:
        ValueError: an unknown `by`, or prompts that are texts in one and messages in the other.
    """
    from datasets.utils import tqdm

    if by not in ("response", "prompt"):
        raise ValueError(f"by must be 'response' or 'prompt', got {by!r}")
    if train.features["prompt"] != test.features["prompt"]:
        raise ValueError("train and test must both have prompts that are texts, or both messages: convert both alike")
    seen = {key for row in tqdm(test, desc="Reading test rows", delay=2) for key in _keys(row, by)}
    report = ConversionReport(f"deduplicated by {by}", rows_read=len(train))
    kept = []
    for index, row in enumerate(tqdm(train, desc="Looking for test rows", delay=2)):
        if seen.isdisjoint(_keys(row, by)):
            kept.append(index)
        else:
            report.drop(index, RowError(f"{by} also in the test split", _last_text(row["prompt"])))
    report.rows_kept = len(kept)
    return train.select(kept), report


def _open(
    rows: "Iterable[Row | RowError] | Dataset", format: str
) -> tuple[str, Iterator[Row | RowError], int | None, dict[str, str]]:
    """What a look at the first rows tells.

    Returns:
        The format's name; all rows; their number if it is known; columns of strengths that are words -> the first word.
    """
    if format != "auto" and format not in FORMATS:
        raise ValueError(f"format must be 'auto' or one of {', '.join(FORMATS)}; got {format!r}")
    total = len(rows) if isinstance(rows, Sized) else None
    iterator = iter(rows)
    head = list(islice(iterator, PEEK))
    readable = [row for row in head if not isinstance(row, RowError)]
    if not readable:
        what = f"the first {len(head)} rows cannot be read, the first because: {head[0]}" if head else "no rows"
        raise ValueError(f"nothing to convert: {what}")
    columns = {name for row in readable for name in row}
    name = detect_format(columns, readable) if format == "auto" else format
    missing = FORMATS[name].columns - columns
    if missing:
        raise ValueError(
            f"format {name!r} expects the columns {sorted(FORMATS[name].columns)}, found {sorted(columns)}: "
            f"{sorted(missing)} missing; rename the columns, or choose another format ({', '.join(FORMATS)})"
        )
    return name, chain(head, iterator), total, _worded(readable)


def _worded(rows: list[Row]) -> dict[str, str]:
    """Columns for a strength that hold words only, as "clear" and "slight", and their first one."""
    found = {}
    for name in STRENGTHS:
        values = [row[name] for row in rows if row.get(name) is not None]
        if values and all(isinstance(value, str) for value in values):
            found[name] = values[0]
    return found


def _without(
    rows: Iterator[Row | RowError], worded: dict[str, str], report: ConversionReport
) -> Iterator[Row | RowError]:
    """The rows without these columns; counts in `report` those that had one."""
    for row in rows:
        if worded and not isinstance(row, RowError):
            for name in worded.keys() & row.keys():
                report.ignored[f"{name} is a word, as {worded[name]!r}, and no number"] += 1
            row = {name: value for name, value in row.items() if name not in worded}
        yield row


def _check_ties(ties: str, name: str, kind: Format) -> None:
    if ties not in ("drop", "keep"):
        raise ValueError(f"ties must be 'drop' or 'keep', got {ties!r}")
    if ties == "keep" and not kind.ranking:
        raise ValueError(f"ties='keep' is for rankings: a pair of format {name!r} must have a winner; use ties='drop'")


def _records(
    rows: Iterator[Row | RowError], total: int | None, kind: Format, keep_ties: bool, report: ConversionReport
) -> Iterator[Record]:
    """The records of the rows that can be used; counts all of them in `report`."""
    from datasets.utils import tqdm

    shape = None
    for index, row in enumerate(tqdm(rows, total=total, desc=f"Converting {report.format}", unit="row", delay=2)):
        report.rows_read += 1
        try:
            if isinstance(row, RowError):
                raise row
            record = kind.convert(row)
            if kind.ranking and not keep_ties and is_tie(record):
                raise RowError("tie", f"all {len(record['scores'])} scores are {record['scores'][0]:g}")
            this = {name: type(value) for name, value in record.items()}
            shape = shape or this
            if this != shape:
                raise RowError("not like the first record", f"{_describe(this)}; the first has {_describe(shape)}")
        except RowError as error:
            report.drop(index, error)
            continue
        report.rows_kept += 1
        yield record


def _describe(shape: dict[str, type]) -> str:
    return ", ".join(f"{name} ({'text' if kind is str else kind.__name__})" for name, kind in shape.items())


def _to_dataset(records: Iterator[Record]) -> "Dataset | None":
    """A dataset of all records, written to Arrow batch by batch; None without records."""
    from datasets import Dataset, concatenate_datasets

    parts: list[Any] = []
    features = None
    while batch := list(islice(records, BATCH)):
        features = features or _features(batch[0])
        parts.append(Dataset.from_list(batch, features=features))
    return concatenate_datasets(parts) if parts else None


def _features(record: Record) -> "Features":
    from datasets import Features, List, Value

    text = Value("string")
    messages = List({"role": text, "content": text})
    lists = {"responses": List(text), "scores": List(Value("float64"))}

    def feature(name: str, value: Any) -> Any:
        if isinstance(value, float):
            return Value("float64")
        return text if isinstance(value, str) else lists.get(name, messages)

    return Features({name: feature(name, value) for name, value in record.items()})


def _last_text(prompt: Any) -> str:
    return shorten(prompt if isinstance(prompt, str) else prompt[-1]["content"])


def _text(value: Any) -> Any:
    """A text without the whitespace around it; messages as a tuple of (role, text)."""
    if isinstance(value, str):
        return value.strip()
    return tuple((message["role"], message["content"].strip()) for message in value)


def _keys(row: Row, by: str) -> list[Any]:
    """What `row` is recognised by: its prompt, or the prompt with each of its responses."""
    prompt = _text(row["prompt"])
    if by == "prompt":
        return [prompt]
    responses = row["responses"] if "responses" in row else (row["chosen"], row["rejected"])
    return [(prompt, _text(response)) for response in responses]
