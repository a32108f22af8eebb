"""What a bad input must give: an error of ours that names what is wrong and what to do, and never a bare traceback."""

import re
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

PACKAGE = str(Path(__file__).resolve().parents[2] / "trl_ext")
KINDS = (ValueError, TypeError, FileNotFoundError, RuntimeError)
REMEDY = re.compile(
    r"\b(give|set|drop|use|lower|raise|rename|remove|save|name|choose|must|needs?|mend|make|return|define|correct|add|"
    r"leave|delete|take|train|see|did you mean|expects|instead|it has|it brings|sample|install|as utf-8)\b",
    re.IGNORECASE,
)


def problem_of(error: BaseException, names: Iterable[str] = (), remedy: bool = True) -> str | None:
    """Why an error is not clear; None: it is."""
    text = str(error)
    if not isinstance(error, KINDS) or type(error).__name__ in ("JSONDecodeError", "UnicodeDecodeError"):
        return f"{type(error).__name__} is no kind of error for a user: {text}"
    if not traceback.extract_tb(error.__traceback__)[-1].filename.startswith(PACKAGE):
        return f"raised by a library: {type(error).__name__}: {text}"
    missing = [name for name in names if name not in text]
    if missing:
        return f"does not name {missing}: {text}"
    if isinstance(error, TypeError) and not re.search(r"[.:] ", text):
        return f"no sentence: {text}"
    if remedy and not isinstance(error, FileNotFoundError) and not REMEDY.search(text):
        return f"does not say what to do: {text}"
    return None


def refused(call: Callable[[], Any], *names: str) -> None:
    """Fail unless a call is refused with a clear error that names these."""
    with pytest.raises(BaseException) as found:
        call()
    problem = problem_of(found.value, names)
    if problem is not None:
        pytest.fail(problem)
