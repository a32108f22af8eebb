"""Rewards of parts of a completion: what a reward function may return beside one number, and which token is paid.

    2.5                                       the whole completion
    [0.0, 0.0, 1.0]                           one number for each token of `completion_ids`, the end token included
    {"tokens": [(0, 7, 1.0)]}                 spans of tokens, half-open: from the first number up to the second
    {"characters": [(0, 17, 1.0)]}            spans of characters of the completion's text, half-open

A span, such as a step or a turn, is paid on its last token: nothing of it is left to be chosen then. A dictionary may
have both kinds of spans, which may overlap, and "score", a number for the whole completion. What belongs to the whole
is paid on the last token.

All of it has a sum: the score of the completion wherever one number is wanted, in logs, in RRHF, in an evaluation.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

ROLE_PAYS = ("end", "sentence", "token")  # where the reward role's score is paid
FORMS = (
    "return for each completion a finite number, None where the reward does not apply, a list with a number for each "
    'of its tokens, or a dictionary with "tokens" or "characters", lists of (start, end, number), and "score"'
)
# A sentence ends with a mark, quotes and brackets behind it, before a blank or the end; or with its line.
SENTENCE_END = re.compile(r"[.!?\u2026]+[\"\u2019\u201d')\]]*(?=\s|$)|[\u3002\uff01\uff1f]+|\n+")


@dataclass(frozen=True)
class PlacedReward:
    """What a function gave to parts of one completion.

    Attributes:
        tokens: (number of the token that is paid, reward).
        characters: (number of characters up to the end of the span, reward).
        score: Of the whole.
    """

    tokens: tuple[tuple[int, float], ...] = ()
    characters: tuple[tuple[int, float], ...] = ()
    score: float = 0.0

    @property
    def total(self) -> float:
        """The sum of all of it."""
        return math.fsum([self.score, *(reward for _, reward in (*self.tokens, *self.characters))])


def read_reward(value: Any, tokens: int | None, characters: int) -> "float | PlacedReward":
    """What a function returned for one completion, checked.

    Args:
        value: Anything but None.
        tokens: Of the completion, the end token included; None where that is not known.
        characters: Of its text.

    Raises:
        ValueError: It is no reward, with the reason.
    """
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return _read_spans(value, tokens, characters)
    if isinstance(value, list | tuple):
        if tokens is None:
            raise ValueError("a number for each token needs completion_ids, which this caller does not give")
        if len(value) != tokens:
            raise ValueError(f"{len(value)} numbers for its {tokens} tokens")
        rewards = [_finite(number, f"the number of token {i}") for i, number in enumerate(value)]
        return PlacedReward(tokens=tuple((i, reward) for i, reward in enumerate(rewards) if reward))
    return _finite(value, "the reward")


def _finite(value: Any, what: str) -> float:
    try:
        if not isinstance(value, str | bytes) and math.isfinite(value):
            return value if isinstance(value, Real) else float(value)  # type: ignore[return-value]
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"{what} is {value!r}")


def _read_spans(value: dict[str, Any], tokens: int | None, characters: int) -> PlacedReward:
    unknown = sorted(map(str, set(value) - {"tokens", "characters", "score"}))
    if unknown or not value:
        raise ValueError(f"a dictionary with the keys {unknown}")
    if "tokens" in value and tokens is None:
        raise ValueError("spans of tokens need completion_ids, which this caller does not give")
    ends: dict[str, list[tuple[int, float]]] = {}
    for unit, length in (("tokens", tokens or 0), ("characters", characters)):
        ends[unit] = []
        for span in value.get(unit, ()):
            if not isinstance(span, list | tuple) or len(span) != 3:
                raise ValueError(f"{unit}: {span!r} is no (start, end, number)")
            start, end, reward = span
            whole = all(isinstance(place, int) and not isinstance(place, bool) for place in (start, end))
            if not whole or not 0 <= start < end <= length:
                raise ValueError(f"{unit}: the span {span!r} is not inside its {length} {unit}")
            ends[unit].append((end, _finite(reward, f"the number of the span {span!r} of {unit}")))
    paid = tuple((end - 1, reward) for end, reward in ends["tokens"])
    return PlacedReward(paid, tuple(ends["characters"]), _finite(value.get("score", 0.0), "the score"))


def sentence_ends(text: str) -> list[int]:
    """Number of characters up to the end of each sentence of a text."""
    return [match.end() for match in SENTENCE_END.finditer(text)]


def paying_tokens(decode: Callable[[Sequence[int]], str], ids: Sequence[int], ends: Sequence[int]) -> list[int]:
    """The token with which each of some places of a text has been written.

    The first token at which the decoded text agrees with the whole up to that place: a character may be written by
    several tokens, which decode to another one until the last of them is there.

    Args:
        decode: From token ids to text, without special tokens.
        ids: Of the completion.
        ends: Numbers of characters, each at least 1.

    Returns:
        Number of a token for each of `ends`.

    Raises:
        ValueError: A place that no beginning of the ids decodes to.
    """
    text, found = decode(ids), []
    for end in ends:
        low, high = 1, len(ids)
        while low < high:  # texts grow with the tokens: the first of at least `end` characters
            middle = (low + high) // 2
            low, high = (low, middle) if len(decode(ids[:middle])) >= end else (middle + 1, high)
        token = next((n for n in range(low, len(ids) + 1) if decode(ids[:n])[:end] == text[:end]), None)
        if token is None or len(text) < end:
            raise ValueError(
                f"no token ends at character {end} of the completion {text!r}: its text is not what its tokens decode "
                "to. Give spans of tokens instead."
            )
        found.append(token - 1)
    return found
