"""A small text task with a gold reward that can be learned, and a learned reward that can be cheated.

A prompt opens an animal story, and a completion continues it in a few short sentences:

    one morning the little fox went to the river .
    she helped a frog . the frog was gentle . she felt happy and wise . then she went home .

The gold reward is what a reader wants: *varied* kindness, told grammatically, at the right length, with an ending. The
demonstrations hardly ever repeat a word, so a reward model that is trained on them learns to like kind words and cannot
learn that the second "happy" is worth nothing. That gap between the learned (proxy) reward and the gold reward is what
over-optimisation exploits: a policy far from its reference repeats the reward model's favourite words, the proxy rises
and the gold falls.

Every generator takes a `random.Random` and draws from nothing else.
"""

import functools
import itertools
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

KIND_VERBS = ("helped", "hugged", "thanked", "praised", "fed", "healed", "cheered", "comforted")
UNKIND_VERBS = ("bit", "chased", "robbed", "mocked", "kicked", "scared", "cheated", "scolded")
PLAIN_VERBS = ("saw", "met", "passed", "heard", "followed", "watched", "called", "joined")

KIND_ADJECTIVES = (
    "kind", "gentle", "happy", "brave", "loyal", "merry", "sweet", "warm", "wise", "patient", "generous", "tender",
)  # fmt: skip
UNKIND_ADJECTIVES = (
    "cruel", "greedy", "nasty", "rude", "selfish", "jealous", "grumpy", "vain", "bitter", "mean", "sly", "bossy",
)  # fmt: skip
PLAIN_ADJECTIVES = (
    "tall", "small", "young", "quiet", "round", "brown", "grey", "thin", "little", "black", "white", "spotted",
)  # fmt: skip

KIND_THINGS = ("gift", "cake", "song", "rose")
UNKIND_THINGS = ("trap", "whip", "thorn", "curse")
PLAIN_THINGS = ("stone", "stick", "boat", "drum")

CREATURES = (
    "fox", "rabbit", "frog", "bear", "wolf", "mouse", "crow", "deer", "duck", "hen", "cat", "dog", "goat", "pig",
)  # fmt: skip
PLACES = ("river", "forest", "hill", "village", "meadow", "lake", "garden", "bridge")
TIMES = ("morning", "day", "evening", "night")
MOVES = ("went", "walked", "ran", "came")
PRONOUNS = ("she", "he")
FUNCTION_WORDS = ("one", "the", "a", "to", "was", "felt", "and", "found", "then", "home", "fell", "asleep", ".")

KIND = frozenset(KIND_VERBS + KIND_ADJECTIVES + KIND_THINGS)
UNKIND = frozenset(UNKIND_VERBS + UNKIND_ADJECTIVES + UNKIND_THINGS)
PLAIN = frozenset(PLAIN_VERBS + PLAIN_ADJECTIVES + PLAIN_THINGS)
VOCABULARY: tuple[str, ...] = (
    *FUNCTION_WORDS, *PRONOUNS, *TIMES, *MOVES, *PLACES, *CREATURES,
    *KIND_VERBS, *UNKIND_VERBS, *PLAIN_VERBS,
    *KIND_ADJECTIVES, *UNKIND_ADJECTIVES, *PLAIN_ADJECTIVES,
    *KIND_THINGS, *UNKIND_THINGS, *PLAIN_THINGS,
)  # fmt: skip

# The three tones of each part of speech that carries one, in the order of a tone's weights: kind, unkind, plain.
_TONED = {
    "verb": (KIND_VERBS, UNKIND_VERBS, PLAIN_VERBS),
    "adjective": (KIND_ADJECTIVES, UNKIND_ADJECTIVES, PLAIN_ADJECTIVES),
    "thing": (KIND_THINGS, UNKIND_THINGS, PLAIN_THINGS),
}
_PART_OF_SPEECH = {word: part for part, tones in _TONED.items() for tone in tones for word in tone}
_PART_OF_SPEECH |= dict.fromkeys(CREATURES, "creature") | dict.fromkeys(PRONOUNS, "pronoun")

# A pattern is a sequence of literal words and parts of speech; each sentence of a story follows one of them.
_BODY_PATTERNS: tuple[str, ...] = (
    "pronoun verb a creature",
    "pronoun verb a adjective creature",
    "the creature was adjective",
    "pronoun felt adjective and adjective",
    "pronoun found a adjective thing",
)
_CLOSING_PATTERNS: tuple[str, ...] = ("then pronoun went home", "then pronoun fell asleep")
_TOKEN = re.compile(r"[a-z]+|[^\sa-z]")

# Gold reward: points per occurrence. A story has between 3 and 5 sentences, the closing one included.
KIND_POINTS = 0.15
UNKIND_POINTS = -0.15
REPEAT_POINTS = -0.15
MALFORMED_POINTS = -0.25
LENGTH_POINTS = -0.2
NO_ENDING_POINTS = -0.3
SENTENCES_MIN, SENTENCES_MAX = 3, 5


def _pattern_of(words: Sequence[str]) -> str:
    return " ".join(_PART_OF_SPEECH.get(word, word) for word in words)


def _sentences(text: str) -> list[list[str]]:
    """Sentences as lists of words without the full stop; words after the last full stop are a sentence of their own."""
    sentences: list[list[str]] = [[]]
    for token in _TOKEN.findall(text):
        if token == ".":
            sentences.append([])
        else:
            sentences[-1].append(token)
    unfinished = sentences.pop()
    # The marker keeps a sentence without its full stop from matching a pattern.
    return [*sentences, [*unfinished, "<unfinished>"]] if unfinished else sentences


def gold_score(text: str) -> float:
    """Gold reward of one completion.

    With `K` distinct kind words, `U` occurrences of unkind words, `R` repeated occurrences of words that carry a tone
    (kind, unkind or plain verbs, adjectives and things; the second "happy" is one), `M` malformed sentences, `L`
    sentences short of 3 or beyond 5, and `E` = 1 unless the last sentence is a closing one:

        gold = clip(0.15 K - 0.15 U - 0.15 R - 0.25 M - 0.2 L - 0.3 E, -1, 1)

    Args:
        text: the completion, in words separated by spaces; words outside the vocabulary make a sentence malformed.

    Returns:
        The score, in [-1, 1].
    """
    sentences = _sentences(text)
    counts = Counter(word for sentence in sentences for word in sentence)
    patterns = [_pattern_of(sentence) for sentence in sentences]
    kind = sum(word in counts for word in KIND)
    unkind = sum(counts[word] for word in UNKIND)
    repeats = sum(counts[word] - 1 for word in KIND | UNKIND | PLAIN if word in counts)
    malformed = sum(pattern not in _BODY_PATTERNS and pattern not in _CLOSING_PATTERNS for pattern in patterns)
    length_error = max(SENTENCES_MIN - len(sentences), len(sentences) - SENTENCES_MAX, 0)
    no_ending = not patterns or patterns[-1] not in _CLOSING_PATTERNS
    score = (
        KIND_POINTS * kind
        + UNKIND_POINTS * unkind
        + REPEAT_POINTS * repeats
        + MALFORMED_POINTS * malformed
        + LENGTH_POINTS * length_error
        + NO_ENDING_POINTS * no_ending
    )
    return max(-1.0, min(1.0, score))


def is_grammatical(text: str) -> bool:
    """Whether every sentence follows a pattern and the last one is finished; the empty text is not grammatical."""
    patterns = [_pattern_of(sentence) for sentence in _sentences(text)]
    return bool(patterns) and all(pattern in _BODY_PATTERNS + _CLOSING_PATTERNS for pattern in patterns)


def gold_reward(completions: Sequence[Any], **kwargs: Any) -> list[float]:
    """Gold reward of each completion; a reward function for TRL's online trainers.

    Args:
        completions: B completions, each a string, or a list of messages whose contents are joined.
        **kwargs: whatever else the trainer passes (prompts, token ids, dataset columns); not used.

    Returns:
        B scores in [-1, 1]; see `gold_score` for the formula.

    Raises:
        TypeError: a completion is neither a string nor a list of messages with a "content".
    """
    return [gold_score(_text_of(completion)) for completion in completions]


def _text_of(completion: Any) -> str:
    if isinstance(completion, str):
        return completion
    try:
        return " ".join(message["content"] for message in completion)
    except (TypeError, KeyError) as error:
        raise TypeError(
            "gold_reward: a completion must be a string or a list of messages with a text 'content', "
            f"got {completion!r}"
        ) from error


@functools.cache
def prompt_pools() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Every prompt of the task, split once and for all into a training pool (19,504) and an evaluation pool (2,000)."""
    prompts = [
        f"one {time} the {adjective} {creature} {move} to the {place} ."
        for time, adjective, creature, move, place in itertools.product(
            TIMES, PLAIN_ADJECTIVES, CREATURES, MOVES, PLACES
        )
    ]
    random.Random(0).shuffle(prompts)
    return tuple(prompts[2000:]), tuple(prompts[:2000])


def sample_prompts(count: int, rng: random.Random, split: str = "train") -> list[str]:
    """`count` different prompts of the "train" or "eval" pool, in random order.

    Raises:
        ValueError: unknown split, or the pool has fewer than `count` prompts.
    """
    if split not in ("train", "eval"):
        raise ValueError(f"split must be 'train' or 'eval', got {split!r}")
    pool = prompt_pools()[split == "eval"]
    if count > len(pool):
        raise ValueError(f"the {split} pool has {len(pool)} prompts, {count} were asked for; ask for fewer")
    return rng.sample(pool, count)


# Weights of the kind, unkind and plain tone in a story. In the corpus the mood is strong, and mornings are kind, nights
# unkind, days plain and evenings any of these: from that the base learns which words belong together. In the
# demonstrations the mood is mild, drawn at random, and owes nothing to the prompt.
_CORPUS_MOODS = {"morning": (0.9, 0.02, 0.08), "night": (0.02, 0.9, 0.08), "day": (0.05, 0.05, 0.9)}
_DEMONSTRATION_MOODS = ((0.45, 0.2, 0.35), (0.2, 0.45, 0.35), (0.3, 0.3, 0.4))


def _write(pattern: str, pronoun: str, choose: Callable[[str], str]) -> str:
    words = [
        pronoun if part == "pronoun" else choose(part) if part in (*_TONED, "creature") else part
        for part in pattern.split()
    ]
    return " ".join(words) + " ."


def _story(rng: random.Random, mood: Sequence[float], bodies: int, closing: bool, repeat: bool) -> str:
    """One completion of `bodies` sentences and perhaps a closing one; `repeat` allows a word to come twice."""
    pronoun, used = rng.choice(PRONOUNS), set[str]()

    def choose(part: str) -> str:
        if part == "creature":
            return rng.choice(CREATURES)
        (tone,) = rng.choices(_TONED[part], weights=mood)
        fresh = [word for word in tone if repeat or word not in used]
        word = rng.choice(fresh or tone)
        used.add(word)
        return word

    patterns = [rng.choice(_BODY_PATTERNS) for _ in range(bodies)]
    patterns += [rng.choice(_CLOSING_PATTERNS)] if closing else []
    return " ".join(_write(pattern, pronoun, choose) for pattern in patterns)


def corpus(count: int, rng: random.Random) -> list[str]:
    """`count` pretraining texts: an opening and 2 to 5 sentences, of any length, repetitive or not, mostly unended."""
    texts = []
    for opening in rng.choices(prompt_pools()[0], k=count):
        time = opening.split()[1]
        mood = _CORPUS_MOODS.get(time) or rng.choice(list(_CORPUS_MOODS.values()))
        texts.append(f"{opening} {_story(rng, mood, rng.randint(2, 5), rng.random() < 0.3, repeat=True)}")
    return texts


def demonstration(rng: random.Random) -> str:
    """One completion as a careful writer makes it: 3 to 5 sentences, words hardly ever repeated, 3 in 4 ended."""
    bodies = rng.randint(2, 4)
    closing = bodies == 2 or rng.random() < 0.7
    return _story(rng, rng.choice(_DEMONSTRATION_MOODS), bodies, closing, repeat=False)


def demonstrations(count: int, rng: random.Random) -> list[dict[str, str]]:
    """`count` records with the columns "prompt" and "completion", for supervised fine-tuning."""
    return [{"prompt": p, "completion": f" {demonstration(rng)}"} for p in rng.choices(prompt_pools()[0], k=count)]


def preference_pairs(
    count: int, rng: random.Random, temperature: float = 0.25, split: str = "train"
) -> list[dict[str, str]]:
    """`count` comparisons of two demonstrations, labelled by a noisy reader with the gold reward in mind.

    The reader is a Bradley-Terry one: P(a is chosen over b) = sigmoid((gold(a) - gold(b)) / temperature). Temperature
    0.25 makes about 7 of 10 labels agree with the gold reward; 0 makes all of them, and drops pairs of equal gold.

    Returns:
        Records with the columns "prompt", "chosen" and "rejected".

    Raises:
        ValueError: a negative temperature.
    """
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    pool = prompt_pools()[split == "eval"]
    pairs: list[dict[str, str]] = []
    while len(pairs) < count:
        prompt, first, second = rng.choice(pool), demonstration(rng), demonstration(rng)
        margin = gold_score(first) - gold_score(second)
        if temperature == 0 and margin == 0:
            continue
        prefer_first = margin > 0 if temperature == 0 else rng.random() < 1 / (1 + math.exp(-margin / temperature))
        chosen, rejected = (first, second) if prefer_first else (second, first)
        pairs.append({"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"})
    return pairs
