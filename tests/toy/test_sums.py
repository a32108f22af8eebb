"""Sums told in words: what is right, what is paid and where, and that the text is what its tokens say."""

import random

import pytest

from trl_ext.scoring import RewardSources, placed_by_functions
from trl_ext.text import TextEncoder
from trl_ext.toy.sums import (
    MISTAKES,
    STEPS,
    build_sums,
    build_tokenizer,
    demonstration,
    make_prompt,
    right_answer,
    solved,
    step_rewards,
)

PROMPT = "start 3 a add 4 b take 9 c add 1 :"
RIGHT = " a 3 add 4 makes 7 . b 7 take 9 makes 8 . c 8 add 1 makes 9 . answer 9"


def test_by_hand():
    """3 + 4 = 7, 7 - 9 = -2 = 8, 8 + 1 = 9, modulo 10."""
    assert right_answer(PROMPT) == 9
    assert demonstration(PROMPT, random.Random(0), mistakes=0.0) == RIGHT
    assert solved([PROMPT] * 3, [RIGHT, RIGHT.replace("answer 9", "answer 8"), ""]) == [1.0, 0.0, 0.0]


def test_a_wrong_step_is_not_paid_and_those_that_go_on_from_it_are():
    wrong = " a 3 add 4 makes 6 . b 6 take 9 makes 7 . c 7 add 1 makes 8 . answer 8"
    (paid,) = step_rewards([PROMPT], [wrong])
    assert [wrong[start:end] for start, end, _ in paid["characters"]] == ["b 6 take 9 makes 7", "c 7 add 1 makes 8"]
    assert [number for *_, number in paid["characters"]] == [1 / 3, 1 / 3]
    assert solved([PROMPT], [wrong]) == [0.0]


@pytest.mark.parametrize("text", ["", " . . .", " a 3 add 4 makes", " b 3 add 4 makes 7 .", " 7 7 7"])
def test_what_is_no_sum_is_paid_nothing(text):
    assert step_rewards([PROMPT], [text]) == [{"characters": []}]


def test_steps_are_paid_on_their_results():
    encoder = TextEncoder(build_tokenizer())
    ids = encoder.tokenizer(RIGHT)["input_ids"] + [encoder.tokenizer.eos_token_id]
    text = encoder.tokenizer.decode(ids, skip_special_tokens=True)
    sources = RewardSources(step_rewards)
    assert sources.functions[0](prompts=[PROMPT], completions=[text], completion_ids=[ids]) == [pytest.approx(1.0)]
    paid = placed_by_functions(encoder, [ids], sources.take_placed(), [1.0])[0]
    assert paid.nonzero().flatten().tolist() == [5, 12, 19]
    assert encoder.tokenizer.decode([ids[i] for i in (5, 12, 19)]) == "7 8 9"


def test_a_completion_is_long_and_mostly_goes_wrong_somewhere():
    rng, tokenizer = random.Random(1), build_tokenizer()
    prompts = [make_prompt(rng) for _ in range(400)]
    texts = [demonstration(prompt, rng) for prompt in prompts]
    assert len(tokenizer(texts[0])["input_ids"]) + 1 == 7 * STEPS + 3
    whole = sum(len(paid["characters"]) == STEPS for paid in step_rewards(prompts, texts)) / len(prompts)
    assert whole == pytest.approx((1 - MISTAKES) ** STEPS, abs=0.06)
    assert tokenizer.decode(tokenizer(texts[0])["input_ids"]) == texts[0].strip()
    assert tokenizer.unk_token_id not in tokenizer(prompts[0] + texts[0])["input_ids"]


def test_a_base_is_built_once(tmp_path):
    world = build_sums(tmp_path, steps=1)
    before = (world.base / "model.safetensors").stat().st_mtime_ns
    again = build_sums(tmp_path, steps=1)
    assert again.base == world.base
    assert (again.base / "model.safetensors").stat().st_mtime_ns == before
    assert not set(world.train_prompts["prompt"]) & set(world.eval_prompts["prompt"])
    with pytest.raises(ValueError, match="at least 1"):
        build_sums(tmp_path, steps=0)
