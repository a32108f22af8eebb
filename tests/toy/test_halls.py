"""Halls told in words: what is right, what is paid and where, and that the environment says what the walk says."""

import random
from types import SimpleNamespace

import pytest

from trl_ext.scoring import RewardSources, placed_by_functions
from trl_ext.text import TextEncoder
from trl_ext.toy.halls import (
    DOORS,
    HALLS,
    HARD,
    HOUSES,
    SELDOM,
    SURE,
    build_halls,
    build_tokenizer,
    demonstration,
    habits,
    in_turns,
    right_doors,
    solved,
    step_rewards,
)
from trl_ext.toy.words import build_model

PROMPT = "house red :"
DOORS_OF_RED = right_doors("red")
RIGHT = " " + " ".join(f"hall {hall} take {door} ." for hall, door in enumerate(DOORS_OF_RED)) + " out"


def wrong_at(hall: int) -> str:
    """Right up to a hall, then lost: north or south through the cellars."""
    words = RIGHT.split()
    words[5 * hall + 3] = next(door for door in DOORS if door != DOORS_OF_RED[hall])
    words[5 * (hall + 1) : -1 : 5] = ["cellar"] * (HALLS - hall - 1)
    return " " + " ".join([*words[:-1], "lost"])


def test_what_gets_out():
    cheat = wrong_at(3).replace("cellar", "hall").replace("lost", "out")
    assert solved([PROMPT] * 4, [RIGHT, wrong_at(3), cheat, ""]) == [1.0, 0.0, 0.0, 0.0]
    assert solved(["house blue :"], [RIGHT]) == [0.0]


def test_right_doors_are_paid_where_they_are_named_up_to_the_first_wrong_one():
    (paid,) = step_rewards([PROMPT], [wrong_at(2)])
    assert [wrong_at(2)[start:end] for start, end, _ in paid["characters"]] == DOORS_OF_RED[:2]
    assert step_rewards([PROMPT], [""]) == [{"characters": []}]
    encoder = TextEncoder(build_tokenizer())
    ids = encoder.tokenizer(RIGHT)["input_ids"] + [encoder.tokenizer.eos_token_id]
    text = encoder.tokenizer.decode(ids, skip_special_tokens=True)
    sources = RewardSources(step_rewards)
    assert sources.functions[0](prompts=[PROMPT], completions=[text], completion_ids=[ids]) == [pytest.approx(1.0)]
    placed = placed_by_functions(encoder, [ids], sources.take_placed(), [1.0])[0]
    assert placed.nonzero().flatten().tolist() == [5 * hall + 3 for hall in range(HALLS)]


def test_a_walk_is_by_habit():
    """All habits together: 0.98^18 0.5^2 = 0.174 get out; the longest part of the others is spent in the cellars."""
    rng, tokenizer = random.Random(2), build_tokenizer()
    prompts = [f"house {house} :" for house in HOUSES] * 100
    texts = [demonstration(prompt, rng) for prompt in prompts]
    assert sum(solved(prompts, texts)) / len(texts) == pytest.approx(SURE ** (HALLS - HARD) * SELDOM**HARD, abs=0.05)
    assert {len(tokenizer(text)["input_ids"]) for text in texts} == {5 * HALLS + 1}
    assert all(
        text.endswith("out") == (reward == 1) for text, reward in zip(texts, solved(prompts, texts), strict=True)
    )
    assert tokenizer.unk_token_id not in tokenizer(prompts[0] + texts[0])["input_ids"]
    assert tokenizer.decode(tokenizer(texts[0])["input_ids"]) == texts[0].strip()
    for house in HOUSES:
        assert all(sum(habit.values()) == pytest.approx(1) for habit in habits(house))
        assert sum(len(habit) == 2 for habit in habits(house)) == HARD


def test_a_base_is_built_once(tmp_path):
    world = build_halls(tmp_path, steps=1)
    before = (world.base / "model.safetensors").stat().st_mtime_ns
    assert build_halls(tmp_path, steps=1).base == world.base
    assert (world.base / "model.safetensors").stat().st_mtime_ns == before
    world.write(tmp_path / "out")
    assert (tmp_path / "out" / "train.jsonl").read_text().splitlines()[0] == '{"prompt": "house red :"}'
    with pytest.raises(ValueError, match="at least 1"):
        build_halls(tmp_path, steps=0)


def test_in_turns_the_environment_says_where_one_is():
    """A base that knows nothing leaves the halls at its first word that is no right door."""
    tokenizer = build_tokenizer()
    trainer = SimpleNamespace(model=build_model(tokenizer, 0), processing_class=tokenizer, temperature=1.0)
    output = in_turns([PROMPT, "house blue :"], trainer)
    for house, ids, mask in zip(("red", "blue"), output["completion_ids"], output["env_mask"], strict=True):
        assert len(ids) == len(mask) <= 5 * HALLS + 2
        assert mask[:3] == [0, 0, 0]
        words = [tokenizer.decode([token]) for token in ids]
        answers = words[3::5]
        for hall in range(len(words) // 5):
            where = "hall" if answers[:hall] == right_doors(house)[:hall] else "cellar"
            assert words[5 * hall : 5 * hall + 3] == [where, str(hall), "take"]
    assert [len(ids) for ids in output["prompt_ids"]] == [3, 3]
