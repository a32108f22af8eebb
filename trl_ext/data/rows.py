"""What a good preference and a good ranking look like: one row in, the same row checked, or a `RowError`.

Every converter in `sources` ends here, and a trainer may call these on its own rows.
"""

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

Row = Mapping[str, Any]
Record = dict[str, Any]
Messages = list[dict[str, str]]

STRENGTHS = ("strength", "margin", "soft_label")  # optional columns of a preference, one number a row
SOURCE = "source"  # optional column of a preference: where the row comes from, a text


class RowError(ValueError):
    """Why one row cannot be used.

    Attributes:
        reason: what is wrong, in words that do not depend on the row, so that rows can be counted by it.
        detail: where, and the value that is wrong.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


def shorten(value: Any, length: int = 60) -> str:
    """`repr(value)`, cut to `length` characters."""
    text = repr(value)
    return text if len(text) <= length else f"{text[: length - 3]}..."


def field(row: Row, *path: str) -> Any:
    """The value at `path`, for example field(row, "info", "post").

    Raises:
        RowError: there is none, or it is None.
    """
    value: Any = row
    for depth, name in enumerate(path):
        if not isinstance(value, Mapping) or value.get(name) is None:
            raise RowError("missing field", ".".join(path[: depth + 1]))
        value = value[name]
    return value


def text_field(row: Row, *path: str) -> str:
    """The text at `path`, without the whitespace around it. Raises a RowError if it is missing or no text."""
    value = field(row, *path)
    if not isinstance(value, str):
        raise RowError("not a text", f"{'.'.join(path)} is {shorten(value)}")
    return value.strip()


def is_list(value: Any) -> bool:
    """Whether `value` is a list or the like, and not a text."""
    return isinstance(value, Sequence) and not isinstance(value, str)


def list_field(row: Row, name: str) -> Sequence[Any]:
    """The list called `name`. Raises a RowError if it is missing or no list."""
    value = field(row, name)
    if not is_list(value):
        raise RowError("not a list", f"{name} is {shorten(value)}")
    return value


def number(value: Any, name: str) -> float:
    """A finite number as a float. Raises a RowError for anything else: a text, a bool, None, NaN, infinity."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise RowError("not a number", f"{name} is {shorten(value)}")
    if not math.isfinite(value):
        raise RowError("not finite", f"{name} is {value}")
    return float(value)


def check_preference_row(row: Row) -> Record:
    """One preference in TRL's format, checked, with an explicit prompt.

    Args:
        row: `chosen` and `rejected`, both texts or both lists of messages, and perhaps `prompt`. Without a prompt, or
            where a text repeats the prompt of two conversations, the prompt is taken out of the two: all messages but
            the last; of two texts their common start, cut between two words. `strength`, `margin`, `soft_label` (the
            probability that the chosen answer is the better one) and `source` are optional.

    Returns:
        `prompt`, `chosen`, `rejected`, and of the optional ones those that the row has. Conversations stay
        conversations (`chosen` and `rejected` then hold one assistant message each), texts stay texts. Other fields of
        the row are left out.

    Raises:
        RowError: a field is missing or of the wrong kind; the roles are not [system], user, assistant, user, ...; a
            turn, prompt or response is empty; the two prompts differ; chosen equals rejected; a strength that is not a
            finite number; a soft label outside 0 to 1.
    """
    prompt, chosen, rejected = row.get("prompt"), field(row, "chosen"), field(row, "rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        record = _check_texts(prompt, chosen, rejected)
    elif is_list(chosen) and is_list(rejected):
        record = _check_conversations(prompt, chosen, rejected)
    else:
        raise RowError(
            "neither two texts nor two conversations",
            f"chosen is a {type(chosen).__name__}, rejected a {type(rejected).__name__}",
        )
    found: Record = record | {name: number(row[name], name) for name in STRENGTHS if name in row}
    if not 0 <= found.get("soft_label", 1.0) <= 1:
        raise RowError("soft_label is no probability", f"{found['soft_label']}")
    if SOURCE in row:
        found[SOURCE] = "" if row[SOURCE] is None else str(row[SOURCE])
    return found


def check_ranking_row(row: Row) -> Record:
    """One ranking, checked: `prompt` (a text or messages), `responses` (K texts), `scores` (K numbers, best highest).

    Equal scores are allowed; see `is_tie` for rows in which all of them are.

    Raises:
        RowError: a field is missing or of the wrong kind; fewer than two responses; not one score a response; a score
            that is not a finite number; an empty prompt or response; one response twice with different scores; the
            roles of the prompt are not [system], user, assistant, ..., user.
    """
    prompt, responses, scores = field(row, "prompt"), field(row, "responses"), field(row, "scores")
    if not is_list(responses) or not all(isinstance(response, str) for response in responses):
        raise RowError("responses are not a list of texts", shorten(responses))
    if len(responses) < 2:
        raise RowError("fewer than two responses", f"K = {len(responses)}, a ranking needs K >= 2")
    if not is_list(scores) or len(scores) != len(responses):
        raise RowError("not one score for each response", f"{len(responses)} responses, scores {shorten(scores)}")
    scores = [number(score, f"scores[{k}]") for k, score in enumerate(scores)]
    if not all(response.strip() for response in responses):
        raise RowError("empty response", f"response {[bool(r.strip()) for r in responses].index(False)}")
    score_of: dict[str, float] = {}
    for response, score in zip(responses, scores, strict=True):
        if score_of.setdefault(response.strip(), score) != score:
            raise RowError("one response with two scores", shorten(response))
    if is_list(prompt):
        prompt = _messages(prompt, "prompt")
        _check_order([*prompt, {"role": "assistant", "content": responses[0]}], "prompt")
    elif not isinstance(prompt, str):
        raise RowError("not a text", f"prompt is {shorten(prompt)}")
    elif not prompt.strip():
        raise RowError("empty prompt")
    return {"prompt": prompt, "responses": list(responses), "scores": scores}


def is_tie(ranking: Row) -> bool:
    """Whether all scores of a ranking are equal, so that it prefers nothing."""
    return len(set(ranking["scores"])) == 1


def _check_texts(prompt: Any, chosen: str, rejected: str) -> Record:
    if prompt is None:
        prompt = _common_start(chosen, rejected)
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    elif not isinstance(prompt, str):
        raise RowError("prompt and responses are of different kinds", "prompt is no text, chosen and rejected are")
    if not prompt.strip():
        raise RowError("empty prompt")
    _check_pair(chosen, rejected)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _common_start(chosen: str, rejected: str) -> str:
    """The longest common start that ends before a whitespace: no word is cut, and both rests keep theirs."""
    if chosen.strip() == rejected.strip():
        raise RowError("chosen equals rejected", shorten(chosen))
    pairs = enumerate(zip(chosen, rejected, strict=False))
    start = chosen[: next((i for i, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))]
    if start and not start[-1].isspace():
        start = start[: -len(start.rsplit(maxsplit=1)[-1])]
    return start.rstrip()


def _check_conversations(prompt: Any, chosen: Sequence[Any], rejected: Sequence[Any]) -> Record:
    chosen, rejected = _messages(chosen, "chosen"), _messages(rejected, "rejected")
    if prompt is not None and not isinstance(prompt, str):
        prompt = _messages(prompt, "prompt")
        for name, response in (("chosen", chosen), ("rejected", rejected)):
            if len(response) != 1:
                raise RowError("response is not one message", f"{name} has {len(response)} messages beside a prompt")
            _check_order(prompt + response, name)
    else:
        _check_order(chosen, "chosen")
        _check_order(rejected, "rejected")
        written, prompt = prompt, chosen[:-1]
        if prompt != rejected[:-1]:
            raise RowError("prompts differ", _first_difference(prompt, rejected[:-1]))
        if written is not None and written.strip() not in [message["content"].strip() for message in prompt]:
            raise RowError("prompts differ", f"prompt {shorten(written)} is no message of chosen")
        chosen, rejected = chosen[-1:], rejected[-1:]
    _check_pair(chosen[0]["content"], rejected[0]["content"])
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _messages(value: Any, name: str) -> Messages:
    if not is_list(value):
        raise RowError("prompt and responses are of different kinds", f"{name} is {shorten(value)}, not messages")
    messages = []
    for i, message in enumerate(value):
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise RowError("not a message with a text role and content", f"{name}[{i}] is {shorten(message)}")
        messages.append({"role": message["role"], "content": message["content"]})
    return messages


def _check_order(messages: Messages, name: str) -> None:
    """[system], then user and assistant in turn, an assistant last; nothing empty before the last."""
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    if len(turns) < 2 and all(message["role"] == "assistant" for message in turns):
        raise RowError("empty prompt", f"{name} has no user message")
    for i, message in enumerate(turns):
        expected = ("user", "assistant")[i % 2]
        if message["role"] != expected:
            raise RowError("wrong role order", f"turn {i + 1} of {name} is {message['role']}, expected {expected}")
    if turns[-1]["role"] != "assistant":
        raise RowError("wrong role order", f"{name} ends with a user, not with an assistant's response")
    for i, message in enumerate(messages[:-1]):
        if not message["content"].strip():
            raise RowError("empty turn", f"message {i + 1} of {name}, role {message['role']}")


def _check_pair(chosen: str, rejected: str) -> None:
    for name, response in (("chosen", chosen), ("rejected", rejected)):
        if not response.strip():
            raise RowError("empty response", name)
    if chosen.strip() == rejected.strip():
        raise RowError("chosen equals rejected", shorten(chosen))


def _first_difference(chosen: Messages, rejected: Messages) -> str:
    for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)):
        if a != b:
            return f"message {i + 1}: {shorten(a['content'], 30)} and {shorten(b['content'], 30)}"
    return f"{len(chosen)} messages before the response of chosen, {len(rejected)} of rejected"
