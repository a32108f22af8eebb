"""Labels on disk: for each annotator a jsonl file that only grows, one line for each act.

An act is a label, a skip, or an undo of the newest act that is not undone yet. A line is forced to disk before `label`,
`skip` or `undo` returns, and nothing that was written is ever changed. Writers hold a lock for one act, and
read first what others have added, so that two windows or two servers of one annotator do not label a pair twice.
"""

import hashlib
import json
import os
import re
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from trl_ext.data.rows import shorten

# Verdict -> how much more the first answer is preferred
VERDICTS = {"a_much": 2, "a": 1, "tie": 0, "both_bad": 0, "b": -1, "b_much": -2}
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
SIDES = ("a", "b")


class LabelError(ValueError):
    """An act that is refused: nothing was written."""


@dataclass(frozen=True)
class Label:
    """What an annotator said of a pair.

    Attributes:
        pair: Its id.
        annotator: Who.
        verdict: One of `VERDICTS`: which answer is better, by how much; "tie"; "both_bad".
        left: Which answer stood on the left, "a" or "b"; None where it is not known.
        time: When, in ISO 8601, UTC.
    """

    pair: str
    annotator: str
    verdict: str
    left: str | None
    time: str

    @property
    def value(self) -> int:
        """2, 1, 0, -1 or -2: how much more the first answer is preferred."""
        return VERDICTS[self.verdict]


def check_annotator(name: Any) -> str:
    """The name of an annotator, which becomes the name of a file.

    Raises:
        LabelError: It is empty, too long, or has other signs than letters, digits, dot, dash and underscore.
    """
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise LabelError(
            f"annotator={shorten(name)} is no name: use 1 to 64 letters, digits, '.', '-' and '_', beginning with a "
            "letter or digit."
        )
    return name


def blind_left(pair: str, annotator: str, seed: int = 0) -> str:
    """Which answer stands on the left, "a" or "b": at random for each annotator and pair, and always the same."""
    digest = hashlib.sha256(f"{seed}:{annotator}:{pair}".encode()).digest()
    return SIDES[digest[0] & 1]


def now() -> str:
    """The time of an act."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class LabelFile:
    """The acts of one annotator, and where the next ones go.

    Args:
        folder: Of all annotators' files; made if missing. The file is `folder/<annotator>.jsonl`.
        annotator: A name, see `check_annotator`.
        pairs: Ids of the pairs that may be labelled.

    Attributes:
        path: The file.
        torn: Bytes of a torn last line that were cut off when the file was opened, left by a kill.
        labels: Pair -> label that holds.
        skipped: Pairs that were skipped.
        acts: How many acts the file holds, undone ones and undos included.

    Raises:
        LabelError: A bad name.
        ValueError: A line that is no act, or of another annotator; labels of pairs that are not among `pairs`.
    """

    def __init__(self, folder: str | Path, annotator: str, pairs: Collection[str]):
        self.annotator = check_annotator(annotator)
        self.path = Path(folder) / f"{annotator}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.pairs = frozenset(pairs)
        self.torn = 0
        self.labels: dict[str, Label] = {}
        self.skipped: dict[str, None] = {}  # in order
        self.acts = 0
        self._history: list[str] = []  # pairs of the acts that hold, oldest first
        self._read = 0  # bytes
        self._lock = threading.Lock()  # among threads; the other one is among processes
        self._file_lock = FileLock(self.path.with_name(f".{annotator}.lock"), thread_local=False)
        with self._locked():
            pass

    def label(self, pair: str, verdict: str, left: str | None = None, **more: Any) -> Label:
        """Write a label; on return it is on disk.

        Args:
            pair: Id.
            verdict: One of `VERDICTS`.
            left: Which answer stood on the left.
            more: Further fields of the line, as where an imported label comes from.

        Raises:
            LabelError: An unknown verdict, side or pair, or one that has a label already: undo that first.
        """
        if verdict not in VERDICTS:
            raise LabelError(f"verdict={shorten(verdict)} is unknown: use one of {', '.join(VERDICTS)}.")
        if left not in (*SIDES, None):
            raise LabelError(f"left={shorten(left)} must be 'a' or 'b'.")
        with self._locked() as file:
            self._check_open(pair)
            label = Label(pair, self.annotator, verdict, left, now())
            self._append(file, {"act": "label", **asdict(label), **more})
        return label

    def skip(self, pair: str, left: str | None = None) -> None:
        """Write that a pair was passed over.

        Raises:
            LabelError: An unknown pair, or one that has a label.
        """
        with self._locked() as file:
            self._check_open(pair)
            act = {"act": "skip", "pair": pair, "annotator": self.annotator, "left": left, "time": now()}
            self._append(file, act)

    def undo(self, seen: int | None = None) -> str | None:
        """Take back the newest act that holds, and go one further back at every call.

        Args:
            seen: How many acts the caller knows of. If others have been added since, nothing is undone.

        Returns:
            The pair, which is open again; None where there is nothing to undo.

        Raises:
            LabelError: There are acts that the caller has not seen.
        """
        with self._locked() as file:
            if seen is not None and seen != self.acts:
                raise LabelError("something was labelled in another window meanwhile: look, and undo again.")
            if not self._history:
                return None
            pair = self._history[-1]
            self._append(file, {"act": "undo", "pair": pair, "annotator": self.annotator, "time": now()})
        return pair

    def refresh(self) -> None:
        """Read what others have added."""
        with self._locked():
            pass

    def _check_open(self, pair: Any) -> None:
        if pair not in self.pairs:
            raise LabelError(f"pair={shorten(pair)} is not in this set of pairs.")
        if pair in self.labels:
            raise LabelError(f"pair {pair} has a label of {self.annotator} already: undo that first.")

    @contextmanager
    def _locked(self) -> Iterator[Any]:
        """The file, locked against every other writer, and read to its end. A writer that is killed holds no lock."""
        with self._lock, self._file_lock, self.path.open("a+b") as file:
            self._catch_up(file)
            yield file

    def _catch_up(self, file: Any) -> None:
        file.seek(self._read)
        content = file.read()
        end = content.rfind(b"\n") + 1
        number = self.acts
        for line in content[:end].splitlines():
            number += 1
            self._take(_parse(line, self.path, number), number)
        self._read += end
        tail = content[end:]
        if tail:  # every writer holds the lock while it writes, so this one was killed
            os.ftruncate(file.fileno(), self._read)
            os.fsync(file.fileno())
            self.torn += len(tail)

    def _take(self, act: dict[str, Any], number: int) -> None:
        if act["annotator"] != self.annotator:
            raise ValueError(
                f"{self.path}, line {number}: an act of {act['annotator']!r}. Each annotator has a file of their own: "
                "move the file back to its name."
            )
        if act["pair"] not in self.pairs:
            raise ValueError(
                f"{self.path}, line {number}: pair {act['pair']} is not in this set of pairs. The file belongs to "
                "another set: name the pairs that it was made with, or another folder for the labels."
            )
        self.acts = number
        _apply(act, self.labels, self.skipped, self._history)

    def _append(self, file: Any, act: dict[str, Any]) -> None:
        line = json.dumps(act, ensure_ascii=False).encode() + b"\n"
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
        self._read += len(line)
        self._take(act, self.acts + 1)


def _apply(act: dict[str, Any], labels: dict[str, Label], skipped: dict[str, None], history: list[str]) -> None:
    pair = act["pair"]
    if act["act"] == "undo":
        labels.pop(pair, None)
        skipped.pop(pair, None)
        for i in range(len(history) - 1, -1, -1):
            if history[i] == pair:
                del history[i]
                break
        return
    history.append(pair)
    skipped.pop(pair, None)
    if act["act"] == "skip":
        skipped[pair] = None  # the last one skipped comes last again
    else:
        labels[pair] = Label(*(act[name] for name in ("pair", "annotator", "verdict", "left", "time")))


def _parse(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        act = json.loads(line)
    except ValueError:
        act = None
    whole = (
        isinstance(act, dict)
        and act.get("act") in ("label", "skip", "undo")
        and all(isinstance(act.get(name), str) for name in ("pair", "annotator", "time"))
        and (act["act"] != "label" or (act.get("verdict") in VERDICTS and act.get("left", 0) in (*SIDES, None)))
    )
    if not whole:
        raise ValueError(
            f"{path}, line {number} is no label: {line[:80]!r}. Nothing was changed: mend the line, or move it away."
        )
    return act


def read_labels(paths: str | Path | Sequence[str | Path]) -> list[Label]:
    """The labels that hold, of all annotators, by file and time; a torn last line is passed over.

    Args:
        paths: Files of annotators, or folders of them.

    Raises:
        FileNotFoundError: No such file or folder.
        ValueError: A line that is no act; no labels at all.
    """
    listed = [Path(p) for p in ([paths] if isinstance(paths, str | Path) else paths)]
    files: list[Path] = []
    for path in listed:
        if not path.exists():
            raise FileNotFoundError(
                f"there are no labels at {path.resolve()}: name a file or folder of the label page."
            )
        files += sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    found: list[Label] = []
    for path in files:
        labels: dict[str, dict[str, Label]] = {}
        skipped: dict[str, dict[str, None]] = {}
        history: dict[str, list[str]] = {}
        content = path.read_bytes()
        for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), start=1):
            act = _parse(line, path, number)
            who = act["annotator"]
            _apply(act, labels.setdefault(who, {}), skipped.setdefault(who, {}), history.setdefault(who, []))
        found += [label for own in labels.values() for label in own.values()]
    if not found:
        raise ValueError(f"no labels in {', '.join(map(str, listed))}: label some pairs first.")
    return found
