import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_ext.toy import build_model, build_tokenizer, task


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_special_tokens_are_four_distinct_ones(tokenizer):
    ids = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    assert ids == [0, 1, 2, 3]
    assert len(tokenizer) == len(task.VOCABULARY) + 4


def test_round_trip_is_exact(tokenizer):
    rng = random.Random(0)
    texts = [*task.corpus(100, rng), " ".join(task.VOCABULARY)]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text.split())
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([*ids, tokenizer.eos_token_id, 0, 0], skip_special_tokens=True) == text


def test_ids_of_prompt_and_completion_join_with_and_without_a_space(tokenizer):
    record = task.demonstrations(1, random.Random(0))[0]
    prompt, completion = record["prompt"], record["completion"]
    ids = tokenizer(prompt)["input_ids"] + tokenizer(completion)["input_ids"] + [tokenizer.eos_token_id]
    assert tokenizer(prompt + completion + "<eos>")["input_ids"] == ids
    assert tokenizer(prompt + completion.strip() + "<eos>")["input_ids"] == ids


def test_unknown_words_become_unk_and_padding_is_on_the_left(tokenizer):
    assert tokenizer("the zebra .")["input_ids"][1] == tokenizer.unk_token_id
    batch = tokenizer(["the fox", "the fox was kind ."], padding=True)
    assert batch["attention_mask"][0] == [0, 0, 0, 1, 1]


def test_model_is_a_tiny_float32_llama_that_knows_its_special_tokens(tokenizer):
    model = build_model(tokenizer, seed=0)
    for config in (model.config, model.generation_config):
        assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert sum(parameter.numel() for parameter in model.parameters()) < 200_000
    logits = model(input_ids=torch.tensor([[4, 5, 6]])).logits
    assert logits.shape == (1, 3, len(tokenizer))


def test_weights_depend_on_the_seed_and_leave_the_global_state(tokenizer):
    torch.manual_seed(1)
    first = build_model(tokenizer, seed=5)
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after)
    again, other = build_model(tokenizer, seed=5), build_model(tokenizer, seed=6)
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])
    assert not torch.equal(first.model.embed_tokens.weight, other.model.embed_tokens.weight)


def test_saved_folder_loads_with_the_auto_classes(tokenizer, tmp_path):
    model = build_model(tokenizer, seed=0)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = task.corpus(1, random.Random(0))[0]
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert (loaded.padding_side, loaded.pad_token_id, loaded.eos_token_id) == ("left", 0, 2)
    ids = torch.tensor([[4, 5, 6]])
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model.eval()(ids).logits)
