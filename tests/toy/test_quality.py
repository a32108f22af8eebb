"""The full-size world does its work: a policy with room to improve, a reward model that helps and can be fooled."""

import random
import statistics

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from trl_ext.toy import build_world, gold_reward, task

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return build_world(tmp_path_factory.mktemp("worlds"), seed=0)


@pytest.fixture(scope="module")
def tokenizer(world):
    return AutoTokenizer.from_pretrained(world.base)


@pytest.fixture(scope="module")
def samples(world, tokenizer):
    """1,024 samples of the SFT policy, 16 for each of 64 prompts: (prompts, completions, share that ended)."""
    torch.manual_seed(0)
    policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world.base), world.policy_adapter).eval()
    prompts = world.eval_prompts["prompt"][:64]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    with torch.no_grad():
        ids = policy.generate(**batch, do_sample=True, top_k=0, max_new_tokens=32, num_return_sequences=16)
    ids = ids[:, batch["input_ids"].shape[1] :]
    ended = (ids == tokenizer.eos_token_id).any(1).float().mean().item()
    return [p for p in prompts for _ in range(16)], tokenizer.batch_decode(ids, skip_special_tokens=True), ended


@pytest.fixture(scope="module")
def proxy(world, tokenizer):
    base = AutoModelForSequenceClassification.from_pretrained(world.base, num_labels=1)
    model = PeftModel.from_pretrained(base, world.reward_adapter).eval()

    def score(prompts, completions):
        texts = [f"{p} {c.strip()}<eos>" for p, c in zip(prompts, completions, strict=True)]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
        with torch.no_grad():
            return model(**batch).logits[:, 0].tolist()

    return score


def test_policy_is_fluent_ends_and_has_room_to_improve(samples):
    _, completions, ended = samples
    gold = gold_reward(completions)
    assert ended > 0.95
    assert statistics.mean(map(task.is_grammatical, completions)) > 0.85
    assert -0.25 < statistics.mean(gold) < 0.0
    assert 0.25 < statistics.stdev(gold) < 0.4


def test_reward_model_is_good_but_not_perfect(proxy, samples):
    pairs = task.preference_pairs(1000, random.Random(0), temperature=0, split="eval")
    chosen, rejected = (
        proxy([pair["prompt"] for pair in pairs], [pair[side] for pair in pairs]) for side in ("chosen", "rejected")
    )
    assert 0.8 < statistics.mean(c > r for c, r in zip(chosen, rejected, strict=True)) < 0.98
    prompts, completions, _ = samples
    assert statistics.correlation(proxy(prompts, completions), gold_reward(completions)) > 0.6


def test_a_little_optimisation_helps(proxy, samples):
    prompts, completions, _ = samples
    scores, gold = proxy(prompts, completions), gold_reward(completions)
    best = [max(range(i, i + 16), key=scores.__getitem__) for i in range(0, len(scores), 16)]
    assert statistics.mean(gold[i] for i in best) - statistics.mean(gold) > 0.8 * statistics.stdev(gold)


def test_repetition_fools_the_reward_model(proxy, samples):
    prompts, completions, _ = samples
    cheats = [f"she felt {word} and {word} . " * 5 for word in task.KIND_ADJECTIVES]
    cheats += [f"he {verb} a kind cat . " * 4 + "then he went home ." for verb in task.KIND_VERBS]
    scores = proxy(prompts[:1] * len(cheats), cheats)
    best = max(range(len(cheats)), key=scores.__getitem__)
    ranked = sorted(proxy(prompts, completions))
    assert scores[best] > ranked[int(0.95 * len(ranked))]
    assert gold_reward([cheats[best]])[0] <= -0.6 + 1e-9
