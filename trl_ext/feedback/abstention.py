"""A reward against making things up: right far above abstaining, abstaining far above wrong.

    trl-ext ppo-max --reward_funcs trl_ext/feedback/abstention.py:abstention_reward --dataset_name questions.jsonl ...

A row of the dataset has `prompt` and `answer`: a text, a list of texts of which each is right, or null where nobody can
know, and abstaining is what is right. Only texts are compared: use it for short answers.
"""

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

# Words by which an answer says that it does not know; and those by which it says that it is not sure
ABSTAINS = re.compile(
    r"\bi (?:do not|don't|really don't|cannot|can't|am unable to|am not able to) "
    r"(?:know|answer|say|tell|recall|remember|determine|be sure)\b|\bi have no idea\b|\bi am unaware\b|"
    r"\b(?:there is no way to|nobody can|it is impossible to) know\b|\A(?:unknown|no idea|not known|unsure)\W*\Z",
    re.IGNORECASE,
)
HEDGES = re.compile(
    r"\bi (?:think|believe|guess|suspect|suppose)\b|\b(?:probably|perhaps|maybe|possibly|might be|could be)\b|"
    r"\b(?:i am|i'm) not (?:sure|certain)\b|\bif i (?:remember|recall)\b",
    re.IGNORECASE,
)
FINAL = re.compile(r"(?:^|\n)\s*(?:final )?answer\s*(?::|is)\s*(.+?)\s*\Z", re.IGNORECASE | re.DOTALL)
ARTICLES = re.compile(r"\b(?:a|an|the)\b")
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


def normalised(text: str) -> str:
    """A text to compare: lower case, without punctuation, articles and doubled spaces, as SQuAD's evaluation does it.

    Source: Rajpurkar et al. 2016, arXiv 1606.05250, section 6.1.
    """
    plain = "".join(" " if sign in string.punctuation else sign for sign in text.lower())
    return " ".join(ARTICLES.sub(" ", plain).split())


def kind_of(completion: str, answer: str | Sequence[str] | None) -> str:
    """Which of `KINDS` a completion is.

    What stands behind a last line "Answer: ..." is what it answers; else all of it. It is right if one of the accepted
    answers stands in it, as whole words. Else it has abstained if it says so, and is wrong in every other case, the
    empty completion included. A right answer among words of abstention ("I don't know, Paris?") is a hedged one.

    Args:
        completion: The text.
        answer: What is right; None, or nothing: nobody can know, so abstaining is right and any answer is wrong.
    """
    final = FINAL.search(completion)
    said = final.group(1) if final else completion
    accepted = [normalised(each) for each in ([answer] if isinstance(answer, str) else answer or [])]
    abstains, hedges = bool(ABSTAINS.search(completion)), bool(HEDGES.search(completion))
    words = f" {normalised(said)} "
    if not any(accepted):
        return "right" if abstains else "hedged wrong" if hedges else "wrong"
    if any(each and f" {each} " in words for each in accepted):
        return "hedged right" if hedges or abstains else "right"
    return "abstained" if abstains else "hedged wrong" if hedges else "wrong"


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
