"""A task where credit matters: a way through many halls, told in words, with one reward at the end.

A house has 20 halls in a row. In each hall one of four doors leads on, always the same one; behind the others are the
cellars, from which no way leads back. A prompt names the house, a completion is the walk:

    house red :
    hall 0 take east . hall 1 take north . cellar 2 take west . cellar 3 take east . ... lost

A completion has 102 tokens. In most halls the model that was pretrained on a walker's habits takes the right door, in
two of each house as often a wrong one, the same every time: it gets out about once in eight walks. What it takes in
the cellars does not matter. So of 20 choices one decides, and the text tells behind which the value fell to 0: a critic
can read it. A method that gives all tokens of a completion the same advantage has to find it by averaging.

`solved` pays 1 for a walk that ends "out", by right doors alone, at the end. `step_rewards` pays each right door where
it is named. With `in_turns` as the trainer's `rollout_func` an environment says where one is, and the policy names
doors.

    python -m trl_ext.toy.halls runs/halls

builds the base and the prompts in a minute on a CPU core, and `trl-ext ppo-max --config halls` trains on them.
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

HALLS, HARD = 20, 2  # of a house; halls in which the habit is wrong
SURE, SELDOM = 0.98, 0.5  # how often the right door is taken: elsewhere, and there
HOUSES = ("red", "green", "blue", "white")
DOORS = ("north", "east", "south", "west")
WORDS = (*HOUSES, *DOORS, *map(str, range(HALLS)), "house", "hall", "cellar", "take", "out", "lost", ".", ":")
TRAIN_PROMPTS, EVAL_PROMPTS = 4096, 256
PRETRAINING_STEPS = 500


# ---------------------------------------------------------------------- the task


def right_doors(house: str) -> list[str]:
    """The door that leads on, for each hall of a house."""
    rng = random.Random(f"doors of {house}")
    return [rng.choice(DOORS) for _ in range(HALLS)]


def habits(house: str) -> list[dict[str, float]]:
    """How often the walker takes each door, for each hall of a house."""
    rng, out = random.Random(f"habits in {house}"), []
    hard = rng.sample(range(HALLS), HARD)
    for hall, right in enumerate(right_doors(house)):
        others = [door for door in DOORS if door != right]
        if hall in hard:
            out.append({right: SELDOM, rng.choice(others): 1 - SELDOM})
        else:
            out.append({right: SURE} | dict.fromkeys(others, (1 - SURE) / len(others)))
    return out


def demonstration(prompt: str, rng: random.Random) -> str:
    """A walk by habit; in the cellars any door is as good as another."""
    house = prompt.split()[1]
    right, taken = right_doors(house), list[str]()
    for hall, habit in enumerate(habits(house)):
        lost = taken != right[:hall]
        taken += [rng.choice(DOORS)] if lost else rng.choices(list(habit), list(habit.values()))
    return _walk(house, taken)


def _walk(house: str, doors: Sequence[str]) -> str:
    told = [f"{_place(house, doors[:hall])} take {door} ." for hall, door in enumerate(doors)]
    return f" {' '.join(told)} {'out' if list(doors) == right_doors(house) else 'lost'}"


def _place(house: str, doors: Sequence[str]) -> str:
    where = "hall" if list(doors) == right_doors(house)[: len(doors)] else "cellar"
    return f"{where} {len(doors)}"


# ---------------------------------------------------------------------- rewards


def solved(prompts: Sequence[str], completions: Sequence[str], **kwargs: Any) -> list[float]:
    """1 for the walk that takes the right doors alone and ends "out", else 0."""
    wanted = {house: _walk(house, right_doors(house)).split() for house in HOUSES}
    pairs = zip(prompts, completions, strict=True)
    return [float(completion.split() == wanted[prompt.split()[1]]) for prompt, completion in pairs]


def step_rewards(prompts: Sequence[str], completions: Sequence[str], **kwargs: Any) -> list[dict[str, Any]]:
    """For each right door, up to the first wrong one, an equal share of 1, paid where the door is named."""
    return [{"characters": _right_steps(p.split()[1], c)} for p, c in zip(prompts, completions, strict=True)]


def _right_steps(house: str, completion: str) -> list[tuple[int, int, float]]:
    spans, place = [], 0
    for hall, (door, told) in enumerate(zip(right_doors(house), completion.split(" ."), strict=False)):
        if told.split() != ["hall", str(hall), "take", door]:
            break
        end = place + len(told)
        spans.append((end - len(door), end, 1 / HALLS))
        place = end + len(" .")
    return spans


# ---------------------------------------------------------------------- in several turns


def in_turns(prompts: Sequence[str], trainer: Any) -> dict[str, Any]:
    """A `rollout_func`: the environment says where one is, and the policy names a door, two tokens a turn.

    The text is that of `demonstration`, so that the base and the rewards are the same. "out <eos>" is the policy's.

    Args:
        prompts: see the module.
        trainer: with `model`, `processing_class` and `temperature`.

    Returns:
        `prompt_ids`, `completion_ids`, `logprobs` (None) and `env_mask`, a list for each prompt.
    """
    say = lambda prompt, answers: f"{_place(prompt.split()[1], answers)} take"  # noqa: E731
    return take_turns(prompts, trainer, say, turns=HALLS, last=2)


# ---------------------------------------------------------------------- the model


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word of the task."""
    return word_tokenizer(WORDS)


def build_halls(output_dir: str | os.PathLike[str], seed: int = 0, *, steps: int = PRETRAINING_STEPS) -> WordsWorld:
    """Build the base and the prompts under `output_dir`, or load them if they are there.

    The houses are the same for every seed, and so are the four prompts: each is in both sets many times.

    Args:
        output_dir: folder; created if missing.
        seed: of the weights and the demonstrations.
        steps: of the pretraining; few are for tests.

    Raises:
        ValueError: fewer than one step.
    """
    rng = random.Random(f"halls-{seed}")

    def sample() -> tuple[str, str]:
        prompt = f"house {rng.choice(HOUSES)} :"
        return prompt, demonstration(prompt, rng)

    base = build_base(output_dir, __file__, WORDS, sample, seed, steps)
    prompts = [f"house {house} :" for house in HOUSES]
    train, test = (Dataset.from_dict({"prompt": prompts * (n // 4)}) for n in (TRAIN_PROMPTS, EVAL_PROMPTS))
    return WordsWorld(base, train, test)


def main(arguments: list[str]) -> None:
    """Write `base/`, `train.jsonl` and `test.jsonl` into a folder."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise SystemExit("usage: python -m trl_ext.toy.halls FOLDER")
    folder = Path(arguments[0])
    build_halls(folder).write(folder)
    print(f"base and prompts: {folder.resolve()}\ntrain with         trl-ext ppo-max --config halls")


if __name__ == "__main__":
    main(sys.argv[1:])
