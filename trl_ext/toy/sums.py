"""A task where credit matters: a sum of many steps, told in words, with one reward at the end.

A prompt starts from a digit and names a step by each letter; a completion works them out, modulo 10:

    start 9 a add 3 b take 1 c add 2 :
    a 9 add 3 makes 2 . b 2 take 1 makes 1 . c 1 add 2 makes 3 . answer 3

With 14 steps a completion has 101 tokens, and the model that was pretrained on careless demonstrations, of which every
eighth step or so goes wrong, is right at the end in about one of five. Where it went wrong only arithmetic tells: a
critic on this base learns nothing of it (docs/critic.md). In `trl_ext.toy.halls` the text says it.

`solved` pays 1 for the right answer, at the end. `step_rewards` pays each right step where it is written. With
`in_turns` as the trainer's `rollout_func` an environment tells the steps, and the policy writes their results alone.

    python -m trl_ext.toy.sums runs/sums

builds the base and the prompts in a few minutes on two CPU cores, and `trl-ext ppo-max --config sums` trains on them.
"""

import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from trl_ext.toy.words import WordsWorld, build_base, take_turns, word_tokenizer

STEPS, LARGEST = 14, 3  # of a sum; number that is added or taken
MISTAKES = 0.12  # share of the demonstrations' steps that go wrong
LETTERS = "abcdefghijklmn"
OPERATIONS = {"add": 1, "take": -1}
WORDS = (*"0123456789", *LETTERS, *OPERATIONS, "start", "makes", "answer", ".", ":")
TRAIN_PROMPTS, EVAL_PROMPTS = 4096, 256
PRETRAINING_STEPS = 800


# ---------------------------------------------------------------------- the task


def make_prompt(rng: random.Random, steps: int = STEPS) -> str:
    """A prompt of so many steps."""
    told = (f"{letter} {rng.choice(list(OPERATIONS))} {rng.randint(1, LARGEST)}" for letter in LETTERS[:steps])
    return f"start {rng.randrange(10)} {' '.join(told)} :"


def read_prompt(prompt: str) -> tuple[int, list[tuple[str, str, int]]]:
    """Where a sum starts, and its steps: letter, operation, number."""
    words = prompt.split()
    told = words[2:-1]
    return int(words[1]), [(told[i], told[i + 1], int(told[i + 2])) for i in range(0, len(told), 3)]


def _result(total: int, operation: str, number: int) -> int:
    return (total + OPERATIONS[operation] * number) % 10


def right_answer(prompt: str) -> int:
    """The last digit of the sum."""
    total, steps = read_prompt(prompt)
    for _, operation, number in steps:
        total = _result(total, operation, number)
    return total


def demonstration(prompt: str, rng: random.Random, mistakes: float = MISTAKES) -> str:
    """A completion of which each step goes wrong with this chance; those after it go on from what was written."""
    total, steps = read_prompt(prompt)
    told = []
    for letter, operation, number in steps:
        made = _result(total, operation, number)
        if rng.random() < mistakes:
            made = (made + rng.randrange(1, 10)) % 10
        told.append(f"{letter} {total} {operation} {number} makes {made} .")
        total = made
    return f" {' '.join(told)} answer {total}"


# ---------------------------------------------------------------------- rewards


def solved(prompts: Sequence[str], completions: Sequence[str], **kwargs: Any) -> list[float]:
    """1 for a completion that ends with the right answer, else 0."""
    pairs = zip(prompts, completions, strict=True)
    return [float(completion.split()[-2:] == ["answer", str(right_answer(prompt))]) for prompt, completion in pairs]


def step_rewards(prompts: Sequence[str], completions: Sequence[str], **kwargs: Any) -> list[dict[str, Any]]:
    """For each right step an equal share of 1, paid where its result is written.

    A step is right if it is the prompt's, goes on from the result before it, and computes what it says. All steps right
    and the answer copied is the right answer.
    """
    return [{"characters": _right_steps(p, c)} for p, c in zip(prompts, completions, strict=True)]


def _right_steps(prompt: str, completion: str) -> list[tuple[int, int, float]]:
    total, steps = read_prompt(prompt)
    spans, place = [], 0
    for (letter, operation, number), told in zip(steps, completion.split(" ."), strict=False):
        words = told.split()
        start, end = place + len(told) - len(told.lstrip()), place + len(told)
        if words == [letter, str(total), operation, str(number), "makes", str(_result(total, operation, number))]:
            spans.append((start, end, 1 / len(steps)))
        if not words or not words[-1].isdigit():
            break  # from here on it is no sum
        total = int(words[-1])
        place = end + len(" .")
    return spans


# ---------------------------------------------------------------------- in several turns


def in_turns(prompts: Sequence[str], trainer: Any) -> dict[str, Any]:
    """A `rollout_func`: the environment tells each step, and the policy writes its result, two tokens a turn.

    The text is that of `demonstration`, so that the base and the rewards are the same. "answer 3 <eos>" is all the
    policy's.

    Args:
        prompts: of as many steps each.
        trainer: with `model`, `processing_class` and `temperature`.

    Returns:
        `prompt_ids`, `completion_ids`, `logprobs` (None) and `env_mask`, a list for each prompt.
    """
    return take_turns(prompts, trainer, _told, turns=len(read_prompt(prompts[0])[1]), last=3)


def _told(prompt: str, answers: list[str]) -> str:
    """The next step, which goes on from the last answer that is a digit."""
    start, steps = read_prompt(prompt)
    letter, operation, number = steps[len(answers)]
    total = next((answer for answer in reversed(answers) if answer.isdigit()), str(start))
    return f"{letter} {total} {operation} {number} makes"


# ---------------------------------------------------------------------- the model


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word of the task."""
    return word_tokenizer(WORDS)


def build_sums(output_dir: str | os.PathLike[str], seed: int = 0, *, steps: int = PRETRAINING_STEPS) -> WordsWorld:
    """Build the base and the prompts under `output_dir`, or load them if they are there; no prompt is in both sets.

    Args:
        output_dir: folder; created if missing.
        seed: of the weights, the demonstrations and the prompts.
        steps: of the pretraining; few are for tests.

    Raises:
        ValueError: fewer than one step.
    """
    rng = random.Random(f"sums-{seed}")

    def sample() -> tuple[str, str]:
        prompt = make_prompt(rng)
        return prompt, demonstration(prompt, rng)

    base = build_base(output_dir, __file__, WORDS, sample, seed, steps)
    rng = random.Random(f"prompts-{seed}")
    prompts = list(dict.fromkeys(make_prompt(rng) for _ in range(TRAIN_PROMPTS + EVAL_PROMPTS)))
    train, test = prompts[EVAL_PROMPTS:], prompts[:EVAL_PROMPTS]
    return WordsWorld(base, Dataset.from_dict({"prompt": train}), Dataset.from_dict({"prompt": test}))


def main(arguments: list[str]) -> None:
    """Write `base/`, `train.jsonl` and `test.jsonl` into a folder."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise SystemExit("usage: python -m trl_ext.toy.sums FOLDER")
    folder = Path(arguments[0])
    build_sums(folder).write(folder)
    print(f"base and prompts: {folder.resolve()}\ntrain with         trl-ext ppo-max --config sums")


if __name__ == "__main__":
    main(sys.argv[1:])
