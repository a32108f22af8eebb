"""What the label page shows and does, without the page: the next pair of an annotator, acts, progress."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path

from trl_ext.feedback.labels import LabelError, LabelFile, blind_left
from trl_ext.feedback.pairs import Pair, Prompt, as_messages, by_id

# What stands on the page -> verdict where the first answer stands on the left, and where it stands on the right
CHOICES = {
    "left_much": ("a_much", "b_much"),
    "left": ("a", "b"),
    "tie": ("tie", "tie"),
    "right": ("b", "a"),
    "right_much": ("b_much", "a_much"),
    "both_bad": ("both_bad", "both_bad"),
}
PAUSE = 300  # seconds between two labels that are a pause, which does not count for the rate
RATE_OVER = 20  # newest labels that the rate is taken of


@dataclass(frozen=True)
class View:
    """What an annotator sees.

    Attributes:
        annotator: Who.
        pair: Id of the pair; "" where none is left.
        conversation, left, right: Texts; "" where none is left.
        acts: How many acts the annotator's file holds, which `Desk.undo` asks for.
        done, skipped, total: Pairs.
        per_hour: Labels, at the pace of the newest ones; None before the third.
        message: What the annotator must know, or "".
    """

    annotator: str
    pair: str
    conversation: str
    left: str
    right: str
    acts: int
    done: int
    skipped: int
    total: int
    per_hour: float | None
    message: str = ""

    def progress(self) -> str:
        """One line: how far, and how fast."""
        parts = [f"{self.done} of {self.total} labelled"]
        if self.skipped:
            parts.append(f"{self.skipped} skipped")
        if self.per_hour is not None:
            parts.append(f"{self.per_hour:.0f} an hour")
        return " · ".join(parts)


class Desk:
    """Several annotators at one set of pairs. Everything is on disk before the next pair is given out.

    Args:
        pairs: In the order in which they are shown.
        folder: Of the annotators' files.
        seed: Of the sides on which answers stand.
        show_skipped: Show skipped pairs again at the end.
        annotators: Names that may label; empty: any.

    Raises:
        LabelError: A name that is none.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        folder: str | Path,
        seed: int = 0,
        show_skipped: bool = False,
        annotators: Sequence[str] = (),
    ):
        self.pairs = by_id(pairs)
        self.folder, self.seed, self.show_skipped, self.annotators = Path(folder), seed, show_skipped, tuple(annotators)
        self._files: dict[str, LabelFile] = {}
        self._lock = threading.Lock()

    def view(self, annotator: str, message: str = "") -> View:
        """The first pair without a label of this annotator.

        Raises:
            LabelError: A name that is none, or not among `annotators`.
            ValueError: The annotator's file cannot be read, or is of another set of pairs.
        """
        file = self._file(annotator)
        file.refresh()
        waiting = [pair for pair in self.pairs if pair not in file.labels and pair not in file.skipped]
        if not waiting and self.show_skipped:
            waiting = list(file.skipped)
        texts = ("", "", "", "")
        if waiting:
            pair = self.pairs[waiting[0]]
            answers = (pair.a, pair.b) if self._left(annotator, pair.id) == "a" else (pair.b, pair.a)
            texts = (pair.id, show_conversation(pair.prompt), *answers)
        elif not message:
            message = "Done: every pair has a label. Thank you."
            if file.skipped:
                message = (
                    f"Done, but for {len(file.skipped)} skipped pairs: start with --show_skipped true to see them."
                )
        return View(
            annotator, *texts, file.acts, len(file.labels), len(file.skipped), len(self.pairs), _rate(file), message
        )

    def act(self, annotator: str, pair: str, choice: str) -> View:
        """Write what was chosen for a pair, and give the next one.

        Args:
            annotator: Who.
            pair: Id of the pair that was on the page.
            choice: A key of `CHOICES`, or "skip".

        Raises:
            LabelError, ValueError: As `view`.
        """
        file = self._file(annotator)
        try:
            left = self._left(annotator, pair)
            if choice == "skip":
                file.skip(pair, left)
            elif choice in CHOICES:
                file.label(pair, CHOICES[choice][0 if left == "a" else 1], left)
            else:
                raise LabelError(f"choice={choice!r} is unknown: use one of {', '.join([*CHOICES, 'skip'])}.")
        except LabelError as error:
            return self.view(annotator, str(error))
        return self.view(annotator)

    def undo(self, annotator: str, seen: int) -> View:
        """Take back the newest act and show its pair again; nothing if another window has acted since.

        Raises:
            LabelError, ValueError: As `view`.
        """
        try:
            pair = self._file(annotator).undo(seen)
        except LabelError as error:
            return self.view(annotator, str(error))
        return self.view(annotator, "There is nothing to undo." if pair is None else "Undone.")

    def _left(self, annotator: str, pair: str) -> str:
        return blind_left(pair, annotator, self.seed)

    def _file(self, annotator: str) -> LabelFile:
        if self.annotators and annotator not in self.annotators:
            raise LabelError(f"annotator={annotator!r} is not among {', '.join(self.annotators)}.")
        with self._lock:
            if annotator not in self._files:
                file = LabelFile(self.folder, annotator, self.pairs)
                if file.torn:
                    print(f"{file.path}: a torn line of {file.torn} bytes, left by a kill, was cut off", flush=True)
                self._files[annotator] = file
            return self._files[annotator]


def show_conversation(prompt: Prompt) -> str:
    """A prompt as one text, a heading for each message; a plain text as it is."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message['role'].upper()}\n{message['content']}" for message in as_messages(prompt))


def _rate(file: LabelFile) -> float | None:
    times = sorted(datetime.fromisoformat(label.time) for label in file.labels.values())[-RATE_OVER:]
    gaps = [(b - a).total_seconds() for a, b in pairwise(times)]
    gaps = [gap for gap in gaps if gap <= PAUSE]
    return 3600 * len(gaps) / sum(gaps) if len(gaps) >= 2 and sum(gaps) > 0 else None
