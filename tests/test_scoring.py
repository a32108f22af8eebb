"""Responses to numbers: what reward sources may return, classifiers, and the reward role on real chat templates."""

import asyncio
import functools
import math

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)
from trl import RewardConfig, RewardTrainer

from tests import chat
from tests.ppo import tiny
from trl_ext import SharedBaseModel
from trl_ext.scoring import ClassifierReward, ResponseScorer, RewardSources, checked_reward, combine, role_scores
from trl_ext.text import TextEncoder

NAN, INF = math.nan, math.inf
CALL = {"prompts": ["a", "b"], "completions": ["x", "y"], "completion_ids": [[6, 1], [7, 1]]}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny.build(tmp_path_factory.mktemp("world"))


def returning(value):
    def reward(prompts, completions, **kwargs):
        return value

    return reward


# ---------------------------------------------------------------------- what a function may return


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0], "'reward' returned 1 rewards for 2 completions"),
        ([1.0, NAN], "'reward' returned nan for sample 1, completion 'y'"),
        ([-INF, 1.0], "'reward' returned -inf for sample 0"),
        ([1.0, "good"], "'reward' returned 'good' for sample 1"),
        ([1.0, [2.0]], r"'reward' returned \[2.0\] for sample 1"),
        (None, "'reward' returned None, a NoneType: return a list"),
        (0.5, "'reward' returned 0.5, a float: return a list"),
        ({"x": 1.0, "y": 2.0}, "a dict: return a list"),
        ("ab", "a str: return a list"),
        (torch.tensor(1.0), "'reward' returned 1.0, a float"),
    ],
)
def test_anything_but_one_number_for_each_completion_is_refused(value, message):
    with pytest.raises(ValueError, match=message):
        RewardSources(returning(value))(**CALL)


def test_rewards_may_be_a_tensor_an_array_or_a_generator():
    for value in (torch.tensor([1.0, 2.0]), torch.tensor([1, 2]).numpy(), (float(i) for i in (1, 2)), (1, True)):
        assert checked_reward(returning(value))(**CALL)[0] == 1


def test_none_does_not_apply_and_nan_is_an_error():
    scores = RewardSources([returning([1.0, None]), returning([None, 4.0])])(**CALL)
    assert scores.isnan().tolist() == [[False, True], [True, False]]
    with pytest.raises(ValueError, match="returned nan"):
        RewardSources(returning([NAN, 1.0]))(**CALL)


def narrow(completions):
    return [1.0] * len(completions)


def with_an_error_of_its_own(completions, **kwargs):
    raise TypeError("my own")


def test_a_function_that_cannot_take_what_it_is_given_is_told_how_to_be_defined():
    with pytest.raises(TypeError, match=r"'narrow' cannot be called.*Define it as def narrow\(prompts, completions, "):
        RewardSources(narrow)(**CALL)
    with pytest.raises(TypeError, match=r"^my own$"):
        RewardSources(with_an_error_of_its_own)(**CALL)


def test_async_functions_run_at_the_same_time_inside_a_running_loop_too():
    running = []

    def slow(name):
        async def reward(completions, **kwargs):
            running.append(name)
            while len(running) < 2:  # waits for the other: one after the other would never end
                await asyncio.sleep(0.001)
            return [float(len(running))] * len(completions)

        return reward

    async def notebook():
        return RewardSources([slow("a"), returning([5.0, 6.0]), slow("b")])(**CALL)

    assert asyncio.run(asyncio.wait_for(notebook(), 20)).tolist() == [[2.0, 5.0, 2.0], [2.0, 6.0, 2.0]]


class Judge:
    async def __call__(self, completions, **kwargs):
        return [1.0] * len(completions)


def test_names_are_unique_and_say_whose_they_are():
    by_weight = functools.partial(returning([1.0, 2.0]), weight=2), functools.partial(returning([3.0, 4.0]), weight=3)
    sources = RewardSources([*by_weight, Judge(), returning([0.0, 0.0])])
    assert sources.names == ["reward", "reward_2", "Judge", "reward_3"]
    assert [function.__name__ for function in sources.functions] == sources.names
    assert sources(**CALL).tolist() == [[1.0, 3.0, 1.0, 0.0], [2.0, 4.0, 1.0, 0.0]]


@pytest.mark.parametrize(
    ("sources", "weights", "error", "message"),
    [
        (None, None, ValueError, "nothing that scores"),
        ([], None, ValueError, "nothing that scores"),
        (returning([1.0]), [1.0, 2.0], ValueError, "reward_weights has 2 numbers for 1"),
        (returning([1.0]), [NAN], ValueError, r"reward_weights\[0\]=nan"),
        ([3], None, TypeError, "reward_funcs holds 3"),
    ],
)
def test_what_cannot_score_is_refused(sources, weights, error, message):
    with pytest.raises(error, match=message):
        RewardSources(sources, weights)


def test_combined_scores_by_hand():
    per_function = torch.tensor([[1.0, 10.0], [NAN, 20.0]])
    assert combine(per_function, torch.tensor([2.0, 0.5]), None, 1.0).tolist() == [7.0, 10.0]
    assert combine(per_function, torch.tensor([2.0, 0.5]), torch.tensor([1.0, -1.0]), 3.0).tolist() == [10.0, 7.0]
    with pytest.raises(ValueError, match=r"returned None for the samples \[1\]"):
        combine(torch.tensor([[1.0], [NAN]]), torch.ones(1), None, 1.0)


# ---------------------------------------------------------------------- classifiers


def test_a_classifier_is_a_reward_function_with_its_own_reading(world):
    reward = ClassifierReward(str(world / "classifier"), batch_size=2)
    model = AutoModelForSequenceClassification.from_pretrained(world / "classifier").eval()
    tokenizer = AutoTokenizer.from_pretrained(world / "classifier")
    prompts, completions = ["w1 w2", "w3", "w4 w5 w6"], [" w7", " w8 w9", " w1"]
    with torch.no_grad():
        texts = [p + c + "<eos>" for p, c in zip(prompts, completions, strict=True)]
        expected = [model(**tokenizer(t, return_tensors="pt")).logits[0, 0].item() for t in texts]
    assert reward.__name__ == "classifier"
    assert reward(prompts, completions) == pytest.approx(expected, abs=1e-6)
    sources = RewardSources([str(world / "classifier"), model], processing_classes=[None, tokenizer])
    assert sources.names == ["classifier", "classifier_2"]
    scores = sources(prompts=prompts, completions=completions, completion_ids=[[1]] * 3)
    torch.testing.assert_close(scores.float(), torch.tensor(expected)[:, None].expand(3, 2))


def test_nan_from_a_classifier_is_an_error(world):
    model = AutoModelForSequenceClassification.from_pretrained(world / "classifier")
    model.score.weight.data.fill_(NAN)
    with pytest.raises(ValueError, match="'classifier' returned nan for sample 0"):
        RewardSources(model)(**CALL)


def test_a_classifier_with_several_labels_is_refused(tmp_path):
    LlamaForSequenceClassification(tiny.tiny_config(num_labels=2)).save_pretrained(tmp_path)
    tiny.tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has 2 labels"):
        ClassifierReward(str(tmp_path))


# ---------------------------------------------------------------------- the reward role


@pytest.fixture
def chatml(tmp_path):
    """A base, and a tokenizer with ChatML that fits its vocabulary."""
    tokenizer = chat.tokenizer_of(chat.CHATML, "<|im_end|>")
    torch.manual_seed(0)
    config = tiny.tiny_config(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    config.vocab_size, config.max_position_embeddings = len(tokenizer), 128
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base", tokenizer


def reward_adapter(base, folder, tokenizer, rows):
    """A reward model by `trl.RewardTrainer`, two steps of it."""
    args = RewardConfig(
        str(folder), max_steps=2, learning_rate=1e-2, use_cpu=True, bf16=False, report_to="none", save_strategy="no",
        gradient_checkpointing=False, disable_tqdm=True, per_device_train_batch_size=2, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = RewardTrainer(
        str(base), args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        peft_config=tiny.lora("SEQ_CLS"),
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    return trainer.model.eval()


@pytest.mark.parametrize("pad", ["<pad>", "<|im_end|>"], ids=["own pad", "pad is eos"])
def test_a_sampled_answer_scores_as_the_conversation_did_in_training(chatml, tmp_path, pad):
    base, tokenizer = chatml
    tokenizer.pad_token = pad
    user = [{"role": "user", "content": "Hi"}]
    answers = ["Yes", "No, never."]
    turns = [[{"role": "assistant", "content": answer}] for answer in answers]
    rows = [{"prompt": user, "chosen": a, "rejected": b} for a, b in (turns, turns[::-1])]
    trained = reward_adapter(base, tmp_path / "rm", tokenizer, rows)
    expected = []
    for answer in answers:
        messages = [*user, {"role": "assistant", "content": answer}]
        ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            expected.append(trained(**ids).logits[0, 0].item())

    model = SharedBaseModel.from_pretrained(str(base), reward_adapter=tmp_path / "rm", with_critic=False).eval()
    encoder = TextEncoder(tokenizer)
    prompt_ids = encoder.prompt_ids(user)
    ids = [[*tokenizer(a, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for a in answers]
    scores, uncertainty = role_scores(model, encoder, [user] * 2, [prompt_ids] * 2, ids)
    assert uncertainty is None
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)

    class Row:
        prompt, columns = user, {}

    Row.prompt_ids = prompt_ids
    assert ResponseScorer(model, tokenizer)([(Row, i) for i in ids]) == pytest.approx(expected, abs=1e-5)
    written = [encoder.response_ids(user, a) for a in answers]  # responses of a dataset: one form, not two
    assert ResponseScorer(model, tokenizer)([(Row, i) for i in written]) == pytest.approx(expected, abs=1e-5)


def test_a_score_that_is_not_finite_and_a_sequence_without_positions_are_errors(world):
    model = tiny.four_roles(world)
    encoder = TextEncoder(tiny.tiny_tokenizer())
    with pytest.raises(ValueError, match="exceed the model's 64 positions"):
        role_scores(model, encoder, ["w1"], [[7]], [[8] * 70])
    model.heads["reward"].weight.data.fill_(NAN)
    with pytest.raises(ValueError, match=r"score of the samples \[0\] is not finite"):
        role_scores(model, encoder, ["w1"], [[7]], [[8, 1]])


def test_an_end_token_of_the_generation_config_ends_a_response_for_the_scorer(world):
    model = tiny.four_roles(world)  # its generation config names <eos>, 1, and <end>, 5
    assert ResponseScorer(model, tiny.tiny_tokenizer()).encoder.end_ids == [1, 5]


def test_an_encoder_without_an_end_token_reads_texts_as_they_are(tmp_path):
    config = BertConfig(vocab_size=18, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    config.num_labels = 1
    torch.manual_seed(0)
    BertForSequenceClassification(config).eval().save_pretrained(tmp_path)
    tokenizer = tiny.tiny_tokenizer(eos_token=None, cls_token="<user>", sep_token="<end>")
    tokenizer.save_pretrained(tmp_path)
    reward = ClassifierReward(str(tmp_path))
    with torch.no_grad():
        inputs = tokenizer("w1 w2 w3", return_tensors="pt")
        expected = reward.model(**inputs).logits[0, 0].item()
    assert reward(["w1 w2"], [" w3"]) == pytest.approx([expected], abs=1e-6)
    assert RewardSources(str(tmp_path), load_options={"dtype": torch.bfloat16}).functions


def test_a_reward_adapter_by_its_folder_is_a_classifier_too(world):
    reward = ClassifierReward(str(world / "reward"), tiny.tiny_tokenizer())
    model = tiny.four_roles(world)
    encoder = TextEncoder(tiny.tiny_tokenizer())
    ids = encoder.rendered_ids("w1 w2", " w3")
    expected = model.score(torch.tensor([ids]), torch.ones(1, len(ids)).long()).item()
    assert reward(["w1 w2"], [" w3"]) == pytest.approx([expected], abs=1e-5)
