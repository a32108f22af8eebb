"""Files that a run grows by a line at a time: one JSON object a line, in strict JSON, readable after a kill."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PLAIN = bool | int | float | str | None  # what JSON has itself
Line = dict[str, Any]
METRICS, SAMPLES, RUN, REPORT = "metrics.jsonl", "samples.jsonl", "run.json", "report.html"
CURVE = "learning_curve.png"
FORMAT = 1  # of these files
# Legal in JSON, but many readers end a line at them; and halves of pairs, which no UTF-8 file can hold
ESCAPED = re.compile("[\ud800-\udfff\u2028\u2029\u0085]")


def strict(value: Any) -> Any:
    """A value as strict JSON can hold it: numbers that are not finite are None, what JSON does not know is its text."""
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): strict(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [strict(each) for each in value]
    if getattr(value, "size", None) == 1 and hasattr(value, "item"):  # a number of numpy
        return strict(value.item())
    return str(value)


def as_json(record: Any, indent: int | None = None) -> str:
    """Strict JSON in one line, or indented; texts stay readable in any script."""
    text = json.dumps(strict(record), ensure_ascii=False, allow_nan=False, indent=indent)
    return ESCAPED.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


class JsonLines:
    """A file of lines; each is in the operating system's hands when `append` returns.

    Args:
        path: The file. Nothing is written before `begin`.
    """

    def __init__(self, path: Path):
        self.path = path

    def begin(self, kept: Sequence[Line]) -> None:
        """Let the file hold these lines and no others; whole, or as it was."""
        write_whole(self.path, "".join(as_json(line) + "\n" for line in kept))

    def append(self, lines: Sequence[Line]) -> None:
        """Add lines at the end, by one write."""
        with self.path.open("ab") as file:
            file.write("".join(as_json(line) + "\n" for line in lines).encode())


def write_whole(path: Path, text: str) -> None:
    """Write a file by another one that takes its place: a kill leaves the old one or the new one."""
    aside = path.with_name(f".unfinished-{path.name}")
    aside.write_text(text, encoding="utf-8", newline="")
    aside.replace(path)


def read_lines(path: Path) -> tuple[list[Line], list[int]]:
    """The records of a file, and the numbers of the lines that are none, as a kill leaves one at the end."""
    found, broken = [], []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):  # in bytes, only a newline ends a line
        if not line:
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            found.append(record)
        else:
            broken.append(number)
    return found, broken
