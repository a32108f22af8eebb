"""Which pairs to label next: by what a label would tell about the reward model, by how they differ, or at random."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trl_ext.data.rows import RowError, is_list, shorten
from trl_ext.feedback.pairs import Pair, make_pair, unordered

Array = NDArray[np.float64]
METHODS = ("information", "random", "different")


@dataclass(frozen=True)
class Candidate:
    """A pair that may be chosen.

    Attributes:
        prompt: Index of its prompt.
        pair: The pair.
        first, second: Which of the prompt's responses its answers are.
    """

    prompt: int
    pair: Pair
    first: int
    second: int


@dataclass(frozen=True)
class Choice:
    """A chosen pair.

    Attributes:
        pair: The pair.
        chosen_by: "random" for the share that stands for all pairs, else the method.
        value: Information in nats, or difference from 0 to 1; None at random.
    """

    pair: Pair
    chosen_by: str
    value: float | None

    def row(self) -> dict[str, Any]:
        """As a line of a file of pairs."""
        own = {
            "prompt": self.pair.prompt,
            "answer_a": self.pair.a,
            "answer_b": self.pair.b,
            "chosen_by": self.chosen_by,
        }
        value = {} if self.value is None else {"value": round(self.value, 6)}
        return {**self.pair.columns, **own, **value}


def entropy(p: Array) -> Array:
    """Entropy of coins that fall heads with probability p, in nats, elementwise."""
    q = np.clip(p, 1e-12, 1 - 1e-12)
    return -(q * np.log(q) + (1 - q) * np.log1p(-q))


def information_gain(differences: Array) -> Array:
    """What a label of each pair is expected to tell about which member of a reward ensemble is right, in nats.

        p_m = sigmoid(s_m(a) - s_m(b))        gain = H(1/M sum_m p_m) - 1/M sum_m H(p_m)

    H is the entropy of a label, and p_m the Bradley-Terry probability of member m. The gain is high where members are
    sure and disagree; where each of them is unsure, a label is noise and the gain is low.

    Source: Houlsby et al. 2011, "Bayesian Active Learning for Classification and Preference Learning" (arXiv
    1112.5745), equation 2 (BALD), with the members as a sample of the posterior, as in Gleave and Irving 2022,
    "Uncertainty Estimation for Language Reward Models" (arXiv 2203.07472).

    Args:
        differences: s_m(a) - s_m(b) of raw scores, (M, N), of at least two members.

    Returns:
        (N,), from 0 to log 2.

    Raises:
        ValueError: Fewer than two members, or a difference that is not finite.
    """
    if differences.ndim != 2 or len(differences) < 2:
        raise ValueError(
            f"differences must be (M, N) of at least two reward models, got {differences.shape}: one model does not "
            "disagree with itself."
        )
    if not np.isfinite(differences).all():
        raise ValueError("differences hold values that are not finite: a reward model has diverged.")
    p = 1 / (1 + np.exp(-np.clip(differences, -500, 500)))
    return np.maximum(0.0, entropy(p.mean(0)) - entropy(p).mean(0))


def text_difference(a: str, b: str) -> float:
    """How much two answers differ, from 0 to 1: one minus the share of words that both have, of all words in either.

    1 - |A & B| / |A | B|        (Jaccard distance of the sets of words)
    """
    one, other = set(a.lower().split()), set(b.lower().split())
    return 1 - len(one & other) / len(one | other) if one | other else 0.0


def make_candidates(
    rows: Iterable[Mapping[str, Any]], taken: Collection[frozenset[str]] = ()
) -> tuple[list[Candidate], int]:
    """All pairs of different responses to each prompt.

    Args:
        rows: With `prompt` and `responses`, as `sample_responses` writes them; other columns go with each pair, but not
            those that hold one entry for each response.
        taken: Pairs that are not candidates any more, see `pairs.unordered`.

    Returns:
        The candidates, and how many pairs were left out because they are taken.

    Raises:
        ValueError: A row that is no prompt with responses, with its number; no pair at all.
    """
    found, left_out = [], 0
    seen = set(taken)
    for number, row in enumerate(rows):
        responses: Any = row.get("responses")
        if not is_list(responses) or not all(isinstance(text, str) for text in responses):
            raise ValueError(f"row {number}: responses={shorten(responses)} must be a list of texts.")
        columns = {k: v for k, v in row.items() if k not in ("prompt", "responses", "scores", "sources", "truncated")}
        for i, j in combinations(_different(responses), 2):
            record = {**columns, "prompt": row.get("prompt"), "answer_a": responses[i], "answer_b": responses[j]}
            try:
                pair = make_pair(record)
            except RowError as error:
                raise ValueError(f"row {number}: {error}. Mend or remove the line.") from error
            key = unordered(pair)
            if key in seen:
                left_out += 1
            else:
                seen.add(key)
                found.append(Candidate(number, pair, i, j))
    if not found:
        raise ValueError(
            f"there is no pair to choose from ({left_out} are taken already): give prompts with at least two different "
            "responses."
        )
    return found, left_out


def _different(responses: Sequence[str]) -> list[int]:
    """Indices of responses that are not empty and not equal to an earlier one, whitespace around them aside."""
    first: dict[str, int] = {}
    for i, text in enumerate(responses):
        if text.strip():
            first.setdefault(text.strip(), i)
    return list(first.values())


def choose_pairs(
    candidates: Sequence[Candidate],
    count: int,
    values: Array | None,
    *,
    method: str = "information",
    random_share: float = 0.2,
    per_prompt: int = 1,
    seed: int = 0,
) -> list[Choice]:
    """Pairs to label next.

    First the random share is drawn: a prompt at random, then one of its pairs at random. It stands for all pairs, so a
    reward model's accuracy on it is honest; hold it out of training. Then those with the highest value are taken, at
    most `per_prompt` of a prompt, the random ones counted. The result is shuffled: annotators see no order.

    Args:
        candidates: Of `make_candidates`.
        count: How many; fewer where there are not enough.
        values: Of each candidate, (N,): information or difference. None for the method "random".
        method: One of `METHODS`; says what the values are.
        random_share: Share of `count` that is drawn at random.
        per_prompt: Pairs of one prompt at most.
        seed: Of the draws.

    Raises:
        ValueError: A setting out of its range, or not one value for each candidate.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown: use one of {', '.join(METHODS)}.")
    if count < 1 or per_prompt < 1:
        raise ValueError(f"count={count} and per_prompt={per_prompt} must be at least 1.")
    if not 0 <= random_share <= 1:
        raise ValueError(f"random_share={random_share} must be between 0 and 1.")
    if (values is None) != (method == "random") or (values is not None and values.shape != (len(candidates),)):
        got = None if values is None else values.shape
        raise ValueError(f"method={method!r} with values {got} for {len(candidates)} candidates: give one for each.")
    rng = np.random.default_rng(seed)
    count = min(count, _room(candidates, per_prompt))
    drawn = count if values is None else round(random_share * count)
    used: dict[int, int] = {}
    chosen = [Choice(candidates[i].pair, "random", None) for i in _draw(candidates, drawn, per_prompt, used, rng)]
    taken = {choice.pair.id for choice in chosen}
    if values is not None:
        order = np.lexsort((rng.permutation(len(candidates)), -values))  # equal values in random order
        for i in order.tolist():
            candidate = candidates[i]
            if len(chosen) == count:
                break
            if candidate.pair.id not in taken and used.get(candidate.prompt, 0) < per_prompt:
                used[candidate.prompt] = used.get(candidate.prompt, 0) + 1
                chosen.append(Choice(candidate.pair, method, float(values[i])))
    return [chosen[i] for i in rng.permutation(len(chosen))]


def _room(candidates: Sequence[Candidate], per_prompt: int) -> int:
    counts: dict[int, int] = {}
    for candidate in candidates:
        counts[candidate.prompt] = counts.get(candidate.prompt, 0) + 1
    return sum(min(n, per_prompt) for n in counts.values())


def _draw(
    candidates: Sequence[Candidate], count: int, per_prompt: int, used: dict[int, int], rng: np.random.Generator
) -> list[int]:
    """Indices of candidates: prompts in random order, one pair of each, then a second of each, ..."""
    of_prompt: dict[int, list[int]] = {}
    for i, candidate in enumerate(candidates):
        of_prompt.setdefault(candidate.prompt, []).append(i)
    pools = {prompt: rng.permutation(indices).tolist() for prompt, indices in of_prompt.items()}
    drawn: list[int] = []
    for turn in range(per_prompt):
        for prompt in rng.permutation(list(pools)).tolist():
            if len(drawn) < count and turn < len(pools[prompt]):
                drawn.append(pools[prompt][turn])
                used[prompt] = used.get(prompt, 0) + 1
    return drawn


def difference_values(candidates: Sequence[Candidate]) -> Array:
    """`text_difference` of each candidate, (N,)."""
    return np.array([text_difference(c.pair.a, c.pair.b) for c in candidates])


def member_differences(candidates: Sequence[Candidate], scores: Sequence[Mapping[tuple[int, int], float]]) -> Array:
    """Score of the first answer minus that of the second, (M, N); NaN where a response has no score.

    Args:
        candidates: N.
        scores: Of each of M members: (prompt, response) -> raw score.
    """
    rows = [
        [member.get((c.prompt, c.first), math.nan) - member.get((c.prompt, c.second), math.nan) for c in candidates]
        for member in scores
    ]
    return np.array(rows, dtype=np.float64)


def response_couples(responses: Sequence[str]) -> list[tuple[int, int]]:
    """Couples of indices in which each response to be scored stands at least once: a reward model scores pairs."""
    indices = _different(responses)
    couples = list(zip(indices[::2], indices[1::2], strict=False))
    if len(indices) % 2 and len(indices) > 1:
        couples.append((indices[-1], indices[0]))
    return couples
