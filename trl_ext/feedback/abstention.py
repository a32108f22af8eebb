"""A reward against making things up: right far above abstaining, abstaining far above wrong.

    trl-ext ppo-max --reward_funcs trl_ext/feedback/abstention.py:abstention_reward --dataset_name questions.jsonl ...

A row of the dataset has `prompt` and `answer`: a text, a list of texts of which each is right, or null where nobody can
know, and abstaining is what is right. Only texts are compared: use it for short answers.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

# Words by which an answer says that it does not know; and those by which it says that it is not sure
ABSTAINS = re.compile(
    r"\bi (?:do not|don't|really don't|cannot|can't|am unable to|am not able to) "
    r"(?:know|answer|say|tell|recall|remember|determine|be sure)\b|\bi have no idea\b|\bi am unaware\b|"
    r"\b(?:there is no way to|nobody can|it is impossible to) know\b|\b(?:nobody|no one) knows\b|"
    r"\A\W*(?:it is )?(?:unknown|no idea|not known|unsure)\W*\Z",
    re.IGNORECASE,
)
HEDGES = re.compile(
    r"\bi (?:think|believe|guess|suspect|suppose)\b|\b(?:probably|perhaps|maybe|possibly|might be|could be)\b|"
    r"\b(?:i am|i'm) not (?:sure|certain)\b|\bif i (?:remember|recall)\b",
    re.IGNORECASE,
)
# What belongs to words of abstention: up to the end of their clause
CLAUSE = r"(?:(?!\s-|\b(?:but|however|although|though|yet|except|so)\b)[^.!?;:,\n()\[\]\"\u2013\u2014])*"
ABSTENTION = re.compile(f"(?:{ABSTAINS.pattern}){CLAUSE}", re.IGNORECASE)
FINAL = re.compile(r"(?:^|\n)\W*(?:the )?(?:final )?answer\s*(?::|is\b)", re.IGNORECASE)
SHORT = 5  # words of a final answer that is compared as a whole
NUMBER = re.compile(r"(?<![\w.,])[-+]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")
BREAK, SENTENCE = "\ue000", "\ue001"  # between two items of a list, between two sentences
ARTICLES = {"a", "an", "the"}
COPULAS = {"is", "was", "are", "were", "be"}
NEGATIONS = {"not", "never", "neither", "nor", "cannot", "except"}
DENIALS = {"not", "never", "wrong", "false", "incorrect"}
JOINS = {"or", "nor", "and"}
COURTESY = """sorry unfortunately honestly afraid apologies please thanks thank yes well sure ok okay great"""
POLITE = frozenset(COURTESY.split())
LEFT = frozenset(("i", "am", "m", "and", "but", "so", "though", BREAK, SENTENCE))  # of "I'm sorry, but ..."
FUNCTION_WORDS = """
    i no either both you he she it we they this that these those which who what because since if when where as in of on
    at to from for with by my your his her its our their there here has have had do does did can will would hope course
"""
# An item with one of these is a part of a sentence, and no further candidate
GRAMMAR = COPULAS | NEGATIONS | frozenset(FUNCTION_WORDS.split())
KINDS = ("right", "hedged right", "abstained", "hedged wrong", "wrong")


@dataclass(frozen=True)
class AbstentionRewards:
    """What each kind of answer earns.

    Source: the values are those of Schulman 2023, "Reinforcement Learning from Human Feedback: Progress and Challenges"
    (a talk at Berkeley). At a probability of 0.8 of being right an answer, a hedged one and none are worth the same, 0:
    above it answering pays, below it abstaining.

    Attributes:
        right, hedged_right, abstained, hedged_wrong, wrong: In falling order, the last two far below the third.

    Raises:
        ValueError: Another order: making things up would pay.
    """

    right: float = 1.0
    hedged_right: float = 0.5
    abstained: float = 0.0
    hedged_wrong: float = -2.0
    wrong: float = -4.0

    def __post_init__(self) -> None:
        order = (self.right, self.hedged_right, self.abstained, self.hedged_wrong, self.wrong)
        if any(high <= low for high, low in pairwise(order)):
            named = ", ".join(f"{kind} {value:g}" for kind, value in zip(KINDS, order, strict=True))
            raise ValueError(f"rewards must fall from right to wrong, got {named}: else it pays to make things up.")

    def of(self, kind: str) -> float:
        """The reward of a kind of `KINDS`."""
        return float(getattr(self, kind.replace(" ", "_")))


def tokens_of(text: str) -> list[str]:
    """Words of a text, lower case, without punctuation; `BREAK` and `SENTENCE` stand where something ends.

    A number keeps its sign and its decimal point, and loses commas between thousands and zeros at the end: "-5", "2.5".
    """
    text = text.lower().replace("\u2019", "'").replace("\u2212", "-").replace("n't", " not").replace("=", " is ")
    text = re.sub(r"\b(it|that|he|she|there)'s\b", r"\1 is", text)
    text = re.sub(r"([-+])\s*[$\u20ac\u00a3]", r"\1", re.sub(r"\b(?:minus|negative)\s+(?=\d)", "-", text))
    found, end = [], 0
    for number in NUMBER.finditer(text):
        found += _words(text[end : number.start()])
        whole, point, part = number.group().lstrip("+").replace(",", "").partition(".")
        part = part.rstrip("0")
        found.append((whole if whole.strip("-") else f"{whole}0") + (point + part if part else ""))
        end = number.end()
    return found + _words(text[end:])


def _words(text: str) -> list[str]:
    text = re.sub(r"[.!?](?=\s|\Z)", f" {SENTENCE} ", re.sub(r"[,;/|\n()]", f" {BREAK} ", text))
    kept = (sign if sign in (BREAK, SENTENCE) or unicodedata.category(sign)[0] not in "PS" else " " for sign in text)
    return "".join(kept).split()


def words_of(text: str) -> list[str]:
    """Words to compare: those of `tokens_of` without articles, unless there is nothing else.

    Source: Rajpurkar et al. 2016, arXiv 1606.05250, section 6.1, where signs and points of numbers go too.
    """
    words = [token for token in tokens_of(text) if token not in (BREAK, SENTENCE)]
    return [word for word in words if word not in ARTICLES] or words or text.lower().split()


def kind_of(completion: str, answer: str | Sequence[str] | None) -> str:
    """Which of `KINDS` a completion is.

    What stands behind the last line "Answer: ..." is what it answers; else all of it. Words of abstention up to the end
    of their clause, words of hedging and of courtesy are taken out of it: where nothing is left it has abstained, else
    what is left is right or wrong. It is right if an accepted answer stands in it as whole words, is not denied ("It is
    not Paris") and is not one of several candidates ("Paris or Lyon"); behind "Answer:" up to `SHORT` words must be the
    accepted answer itself. A right answer beside words of abstention ("I don't know, Paris?") is a hedged one, a wrong
    one beside them is wrong.

    Args:
        completion: The text.
        answer: What is right; None, or nothing: nobody can know, so abstaining is right and any answer is wrong.
    """
    completion = completion.replace("\u2019", "'")
    marks = list(FINAL.finditer(completion))
    said = completion[marks[-1].end() :] if marks else completion
    accepted = [words_of(each) for each in ([answer] if isinstance(answer, str) else answer or []) if each.strip()]
    abstains, hedges = bool(ABSTAINS.search(completion)), bool(HEDGES.search(completion))
    polite = POLITE.difference(*accepted)
    left = [token for token in tokens_of(HEDGES.sub(" ", ABSTENTION.sub(" ", said))) if token not in polite]
    if ABSTAINS.search(said) and not {*left} - LEFT:
        return "abstained" if accepted else "right"
    if any(_gives(left, each, accepted, bool(marks)) for each in accepted):
        return "hedged right" if hedges or abstains else "right"
    return "hedged wrong" if hedges else "wrong"


def _gives(tokens: list[str], right: list[str], accepted: list[list[str]], final: bool) -> bool:
    """Whether a text gives one answer and no other, and does not deny it."""
    plain = [token for token in tokens if token not in (BREAK, SENTENCE)]
    for told in (plain, _behind_copula(plain)):
        sure = NEGATIONS.isdisjoint(plain[: len(plain) - len(told)])
        if sure and right in (told, [word for word in told if word not in ARTICLES]):
            return True
    words = [word for word in plain if word not in ARTICLES]
    if (final and len(words) <= SHORT) or {*right} <= ARTICLES:
        return False
    tokens = [token for token in tokens if token not in ARTICLES]
    places = [at for at in range(len(words)) if words[at : at + len(right)] == right]
    if not places:
        return False
    index = [at for at, token in enumerate(tokens) if token not in (BREAK, SENTENCE)]  # of each word among the tokens
    spans = [(index[at], index[at + len(right) - 1] + 1) for at in places]
    return not any(_denied(tokens, *span) for span in spans) and not _rivals(tokens, spans[-1], accepted)


def _behind_copula(words: list[str]) -> list[str]:
    last = max((at for at, word in enumerate(words) if word in COPULAS), default=-1)
    return words[last + 1 :]


def _denied(tokens: list[str], start: int, end: int) -> bool:
    """Whether a negation stands before these words in their sentence, or a denial right behind them."""
    for at in range(start - 1, -1, -1):
        again = (
            tokens[at] == BREAK and tokens[at + 1] in ("it", "that") and tokens[at + 2 : at + 3] in (["is"], ["was"])
        )
        if tokens[at] in (SENTENCE, "but") or again:
            break
        if tokens[at] in NEGATIONS:
            return True
    behind = tokens[end : end + 2]
    return bool(behind) and (behind[0] in DENIALS or (behind[0] in COPULAS and behind[-1] in DENIALS))


def _rivals(tokens: list[str], span: tuple[int, int], accepted: list[list[str]]) -> bool:
    """Whether further candidates are listed beside these words.

    Items are what stands between breaks, sentences, "or" and "and". One beside the answer that "or" joins to it is a
    candidate. Others are where the answer ends its item, if they have up to three words, none of `GRAMMAR`, and are
    numbers where the answer is one.
    """
    start, end = span
    items: list[tuple[str, list[str]]] = [("", [])]  # what comes before an item, and its words
    own = 0
    for at, token in enumerate(tokens):
        if not start <= at < end and token in (BREAK, SENTENCE, *JOINS):
            if items[-1][1]:
                items.append((token, []))
            elif token in JOINS:
                items[-1] = (token, [])
        elif token not in (BREAK, SENTENCE):
            items[-1][1].append(token)
            own = len(items) - 1 if start <= at < end else own
    answer = [token for token in tokens[start:end] if token not in (BREAK, SENTENCE)]
    numeric = _is_number(answer)
    mine = _behind_copula(items[own][1])
    others = [word for word in mine if _is_number([word])] if numeric else mine
    if (
        len(others) > len(answer) + (not numeric) and answer[-1] in mine and GRAMMAR.isdisjoint(mine)
    ):  # a list without commas
        return True
    ends = items[own][1][-len(answer) :] == answer
    for at, (before, words) in enumerate(items):
        next_to = before if at == own + 1 else items[own][0] if at == own - 1 else ""
        words = words if before == SENTENCE or at > own else _behind_copula(words)
        if at == own or not words or words in accepted or words[0] == "so":
            continue
        if next_to in ("or", "nor"):
            return True
        if ends and len(words) <= 3 and GRAMMAR.isdisjoint(words) and _is_number(words) == numeric:
            return True
    return False


def _is_number(words: list[str]) -> bool:
    return len(words) == 1 and words[0].lstrip("-")[:1].isdigit()


def text_of(completion: Any) -> str:
    """A completion as a text: TRL gives a text, or messages.

    Raises:
        TypeError: It is neither.
    """
    if isinstance(completion, str):
        return completion
    if isinstance(completion, list) and all(
        isinstance(m, Mapping) and isinstance(m.get("content"), str) for m in completion
    ):
        return " ".join(message["content"] for message in completion)
    raise TypeError(f"a completion must be a text or messages with a text as content, got {completion!r}.")


def abstention_reward(
    completions: Sequence[Any],
    answer: Sequence[str | Sequence[str] | None] | None = None,
    rewards: AbstentionRewards | None = None,
    **columns: Any,
) -> list[float]:
    """Reward of each completion, by whether it is right, abstains or is wrong; a reward function for TRL's trainers.

    Args:
        completions: B texts or conversations.
        answer: The dataset's column, B: what is right; see `kind_of`.
        rewards: What each kind earns. Default: `AbstentionRewards()`.
        columns: What else the trainer passes; not used.

    Returns:
        B rewards.

    Raises:
        ValueError: The dataset has no column `answer`.
        TypeError: A completion or an answer of another kind.
    """
    if answer is None:
        raise ValueError("abstention_reward needs a column `answer` in the dataset: a text, a list of texts, or null.")
    earned = rewards or AbstentionRewards()
    found = []
    for completion, right in zip(completions, answer, strict=True):
        several = isinstance(right, list | tuple) and all(isinstance(each, str) for each in right)
        if not (right is None or isinstance(right, str) or several):
            raise TypeError(f"answer={right!r} must be a text, a list of texts, or null.")
        found.append(earned.of(kind_of(text_of(completion), right)))
    return found
