"""Sums told in words: what is right, what is paid and where, and that the text is what its tokens say."""

import random
from types import SimpleNamespace

import pytest

from trl_ext.scoring import RewardSources, placed_by_functions
from trl_ext.text import TextEncoder
from trl_ext.toy.sums import (
    MISTAKES,
    STEPS,
    build_sums,
    build_tokenizer,
    demonstration,
    in_turns,
    make_prompt,
    right_answer,
    solved,
    step_rewards,
)
from trl_ext.toy.words import build_model

PROMPT = "start 9 a add 3 b take 1 c add 2 :"
RIGHT = " a 9 add 3 makes 2 . b 2 take 1 makes 1 . c 1 add 2 makes 3 . answer 3"


def test_by_hand():
    """9 + 3 = 12 = 2, 2 - 1 = 1, 1 + 2 = 3, modulo 10."""
    assert right_answer(PROMPT) == 3
    assert demonstration(PROMPT, random.Random(0), mistakes=0.0) == RIGHT
    assert solved([PROMPT] * 3, [RIGHT, RIGHT.replace("answer 3", "answer 8"), ""]) == [1.0, 0.0, 0.0]


def test_a_wrong_step_is_not_paid_and_those_that_go_on_from_it_are():
    wrong = " a 9 add 3 makes 6 . b 6 take 1 makes 5 . c 5 add 2 makes 7 . answer 7"
    (paid,) = step_rewards([PROMPT], [wrong])
    assert [wrong[start:end] for start, end, _ in paid["characters"]] == ["b 6 take 1 makes 5", "c 5 add 2 makes 7"]
    assert [number for *_, number in paid["characters"]] == [1 / 3, 1 / 3]
    assert solved([PROMPT], [wrong]) == [0.0]


@pytest.mark.parametrize("text", ["", " . . .", " a 9 add 3 makes", " b 9 add 3 makes 2 .", " 7 7 7"])
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
    assert encoder.tokenizer.decode([ids[i] for i in (5, 12, 19)]) == "2 1 3"


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


def test_in_turns_the_environment_tells_the_steps():
    tokenizer = build_tokenizer()
    trainer = SimpleNamespace(model=build_model(tokenizer, 0), processing_class=tokenizer, temperature=1.0)
    prompts = [PROMPT, PROMPT.replace("start 9", "start 5")]
    output = in_turns(prompts, trainer)
    for prompt, ids, mask in zip(prompts, output["completion_ids"], output["env_mask"], strict=True):
        assert len(ids) == len(mask) <= 7 * 3 + 3
        told = tokenizer.decode([token for token, own in zip(ids, mask, strict=True) if not own])
        assert told.startswith(f"a {prompt.split()[1]} add 3 makes")
        assert mask[:7] == [0] * 5 + [1] * min(2, len(mask) - 5)
    assert output["logprobs"] is None
    assert [len(ids) for ids in output["prompt_ids"]] == [12, 12]
