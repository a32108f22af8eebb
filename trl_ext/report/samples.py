"""What a policy wrote, in `samples.jsonl`: held-out prompts at each evaluation, some completions of the training."""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

from trl_ext.report.lines import Line, as_json, strict

EVALUATED = 1000  # of an evaluation, the first so many are kept
MOMENTS, AT_A_MOMENT = 50, 4  # of the training, completions at so many moments


def keyed(rows: Sequence[Line], most: int = EVALUATED) -> list[Line]:
    """The first rows of one evaluation, with a `key` each, by which a prompt is found again in the next one.

    It is a digest of the prompt; of prompts that are alike each has a number.
    """
    seen: Counter[str] = Counter()
    found = []
    for row in rows[:most]:
        digest = hashlib.sha256(as_json(row["prompt"]).encode()).hexdigest()[:12]
        found.append({"key": f"{digest}#{seen[digest]}", **row})
        seen[digest] += 1
    return found


def is_moment(step: int, steps: int, stride: int) -> bool:
    """Whether completions of the training are kept at this step: at the first, and about `MOMENTS` times in all.

    Args:
        step: Optimizer steps so far.
        steps: Of the run.
        stride: Steps between two rollouts.
    """
    every = max(steps // MOMENTS, 1)
    return step == 0 or step // every != (step - stride) // every


def some_of(count: int, seed: int, step: int) -> list[int]:
    """Indices of the completions of a rollout batch that are kept, drawn with a seed."""
    return sorted(random.Random(f"samples-{seed}-{step}").sample(range(count), min(AT_A_MOMENT, count)))


def latest_of(lines: Sequence[Line]) -> dict[int, dict[str, Line]]:
    """step -> key -> sample of the evaluations; of two at one step the later one counts."""
    found: dict[int, dict[str, Line]] = {}
    for line in lines:
        if line.get("kind") == "evaluation" and isinstance(line.get("step"), int) and "key" in line:
            found.setdefault(line["step"], {})[line["key"]] = line
    return dict(sorted(found.items()))


def text_of(content: Any) -> str:
    """A prompt or a completion as a text: of a conversation each message behind its role."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(message, dict) and "role" in message for message in content):
        parts = [(str(message["role"]), message.get("content")) for message in content]
        written = [(role, part if isinstance(part, str) else json.dumps(strict(part))) for role, part in parts]
        if len(written) == 1 and written[0][0] == "assistant":
            return written[0][1]
        return "\n\n".join(f"{role}: {part}" for role, part in written)
    return json.dumps(strict(content), ensure_ascii=False)


def pair_shares(texts: Sequence[str]) -> list[tuple[float, int]]:
    """What each text adds to the variety of all of them, so that distinct-2 is a ratio of sums over texts.

        a_i = sum over the pairs of neighbouring words of text i of 1 / how often the pair stands in all texts
        distinct-2 = different pairs / pairs = sum_i a_i / sum_i pairs_i

    Source: Li et al. 2016 (arXiv 1510.03055) for distinct-2.

    Returns:
        (a_i, pairs_i) of each text.
    """
    pairs = [list(zip(text.split(), text.split()[1:], strict=False)) for text in texts]
    counts = Counter(pair for own in pairs for pair in own)
    return [(sum(1 / counts[pair] for pair in own), len(own)) for own in pairs]


def distinct_2(texts: Sequence[str]) -> float:
    """Different pairs of words / pairs of words, over all texts together; see `pair_shares`."""
    shares = pair_shares(texts)
    return sum(share for share, _ in shares) / max(sum(count for _, count in shares), 1)
