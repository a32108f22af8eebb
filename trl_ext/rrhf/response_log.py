"""A jsonl file that grows by finished prompts and survives being killed at any moment.

One line holds one prompt, under its `index` in the dataset. Lines are flushed and forced to disk before `append`
returns. A kill can therefore leave at most one torn line, the last: it is removed when the file is opened again.
"""

import json
import os
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class ResponseLog:
    """The records of a run so far, and where the next ones go.

    Args:
        path: The file; made if missing. `path` with `.settings.json` added holds what the run was started with.
        settings: What decides the responses. A file that was begun with others is not continued.

    Attributes:
        done: index -> prompt of every record in the file.
        torn: bytes of a torn last line that were removed.

    Raises:
        ValueError: Other settings, a line before the last that is no record, or one index twice.
    """

    def __init__(self, path: str | Path, settings: dict[str, Any]):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._check_settings(json.loads(json.dumps(settings)))
        self.torn = self._remove_torn_line()
        self.done: dict[int, Any] = {}
        for record in self.records():
            if record["index"] in self.done:
                raise ValueError(
                    f"{self.path} has two lines with index {record['index']}: two runs wrote it at once. Delete one of "
                    "the two lines, or the file."
                )
            self.done[record["index"]] = record["prompt"]
        self._file = self.path.open("ab")

    def append(self, records: list[Record]) -> None:
        """Add finished prompts; on return they are on disk."""
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        self._file.write(text.encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self.done |= {record["index"]: record["prompt"] for record in records}

    def close(self) -> None:
        """No more records."""
        self._file.close()

    def records(self) -> list[Record]:
        """`read_records` of the file."""
        return read_records(self.path)

    def _remove_torn_line(self) -> int:
        """Cut off what follows the last whole record, one line at most; how many bytes that was."""
        if not self.path.is_file():
            self.path.touch()
            return 0
        content = self.path.read_bytes()
        start = content.rstrip(b"\n").rfind(b"\n") + 1
        last = content[start:]
        if not last or (last.endswith(b"\n") and _parse(last) is not None):
            return 0
        os.truncate(self.path, start)
        return len(last)

    def _check_settings(self, settings: dict[str, Any]) -> None:
        path = self.path.with_name(self.path.name + ".settings.json")
        if self.path.is_file() and self.path.stat().st_size > 0 and path.is_file():
            before = json.loads(path.read_text(encoding="utf-8"))
            names = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
            if names:
                changes = ", ".join(f"{name}={before.get(name)!r} -> {settings.get(name)!r}" for name in names)
                raise ValueError(
                    f"{self.path} was begun with other settings ({changes}): its responses would be mixed with those "
                    "of another run. Go back to them, or name another file."
                )
            return
        scratch = path.with_name(path.name + ".new")
        scratch.write_text(json.dumps(settings, indent=1), encoding="utf-8")
        scratch.replace(path)


def read_records(path: Path) -> list[Record]:
    """All records of such a file, in its order.

    Raises:
        ValueError: A line that is no record, with its number.
    """
    found = []
    with path.open("rb") as file:  # in bytes, only a newline ends a line
        for number, line in enumerate(file, start=1):
            record = _parse(line)
            if record is None:
                raise ValueError(f"{path} line {number} is no record: {line[:80]!r}. Delete the line.")
            found.append(record)
    return found


def _parse(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(record, dict) and {"index", "prompt"} <= set(record) and isinstance(record["index"], int)
    return record if whole else None
