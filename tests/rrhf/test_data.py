"""From rows to tokens: what the tokens are, what is an error, what is counted."""

import logging

import pytest
import torch
from datasets import Dataset, IterableDataset

from tests import chat
from tests.ppo.tiny import tiny_tokenizer
from tests.rrhf.ranked import chats, ranked, ranked_rows
from trl_ext.rrhf.data import collate, encode_dataset, to_batch
from trl_ext.text import TextEncoder


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def encode(rows, tokenizer, **options):
    dataset = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
    return encode_dataset(dataset, "train_dataset", TextEncoder(tokenizer), **({"max_length": 32} | options))


def row(**changes):
    return {"prompt": "w1 w2", "responses": ["w3", "w4 w5"], "scores": [0.0, 1.0]} | changes


def ids(tokenizer, text):
    return tokenizer(text)["input_ids"]


def test_plain_rows_are_prompt_then_response_then_eos(tokenizer):
    (encoded,), counts = encode([row()], tokenizer)
    assert encoded["prompt_ids"] == ids(tokenizer, "w1 w2")
    assert encoded["response_ids"] == [ids(tokenizer, "w3 <eos>"), ids(tokenizer, "w4 w5 <eos>")]
    assert encoded["scores"] == [0.0, 1.0]
    assert counts.report("x") == ""


def test_an_eos_that_is_there_is_not_doubled(tokenizer):
    (encoded,), _ = encode([row(responses=["w3 <eos>", "w4"])], tokenizer)
    assert encoded["response_ids"][0] == ids(tokenizer, "w3 <eos>")


@pytest.mark.parametrize("messages", [True, False])
def test_conversations_end_as_the_template_ends_a_turn(tokenizer, messages):
    responses = ["w3", "w4 w5"]
    if messages:
        responses = [[{"role": "assistant", "content": text}] for text in responses]
    prompt = [{"role": "user", "content": "w1 w2"}]
    (encoded,), _ = encode([row(prompt=prompt, responses=responses)], tokenizer)
    assert encoded["prompt_ids"] == ids(tokenizer, "<user> w1 w2 <end> <assistant>")
    assert encoded["response_ids"] == [ids(tokenizer, "w3 <end>"), ids(tokenizer, "w4 w5 <end>")]


def test_a_token_across_the_border_is_not_made():
    """The tokenizer merges a and b: the response must still follow the tokens that the prompt has alone."""

    class Merging:
        eos_token_id = pad_token_id = 0

        def __call__(self, text, add_special_tokens=True):
            ids = [1] if add_special_tokens else []  # bos
            while text:
                ids.append({"ab": 9}.get(text[:2], ord(text[0])))
                text = text[2:] if text[:2] == "ab" else text[1:]
            return {"input_ids": ids}

    encoder = TextEncoder(Merging())
    assert encoder.prompt_ids("xa") == [1, ord("x"), ord("a")]
    assert encoder.response_ids("xa", "bc") == [ord("b"), ord("c"), 0]
    assert encoder.response_ids("xa", "cab") == [ord("c"), 9, 0]


def test_a_template_that_rewrites_the_prompt_is_refused(tokenizer):
    class Rewriting:
        chat_template, eos_token_id, pad_token_id = "x", 0, 0

        def apply_chat_template(self, messages, tokenize, add_generation_prompt=False):
            return f"{len(messages)} messages"

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [1]}

    prompt = [{"role": "user", "content": "w1"}]
    with pytest.raises(ValueError, match="train_dataset row 3: the chat template renders"):
        TextEncoder(Rewriting()).response_ids(prompt, "w2", where="train_dataset row 3")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row(prompt=" "), "row 1 has an empty prompt"),
        (row(responses=["w3"], scores=[1.0]), r"row 1 has 1 response\(s\): a ranking needs at least 2"),
        (row(responses=[], scores=[]), r"row 1 has 0 response\(s\)"),
        (row(scores=[1.0]), "row 1 has 2 responses and 1 scores"),
        (row(scores=[1.0, float("nan")]), "row 1 has the score nan"),
        (row(scores=[1.0, float("inf")]), "row 1 has the score inf"),
        (row(scores=[1.0, None]), "row 1 has the score None"),
        (row(responses=["", " "]), "row 1 has only empty responses"),
        (row(prompt="w1 " * 32), "row 1: a prompt of 32 tokens leaves 0 of max_length=32"),
    ],
)
def test_a_bad_row_is_named(tokenizer, bad, message):
    with pytest.raises(ValueError, match=message):
        encode([row(), bad], tokenizer)


def test_a_bad_dataset_is_named(tokenizer):
    with pytest.raises(TypeError, match=r"Dataset\.from_list"):
        encode_dataset([row()], "train_dataset", TextEncoder(tokenizer), max_length=8)
    stream = IterableDataset.from_generator(lambda: iter([row()]))
    with pytest.raises(TypeError, match="IterableDataset"):
        encode_dataset(stream, "train_dataset", TextEncoder(tokenizer), max_length=8)
    with pytest.raises(ValueError, match=r"train_dataset has no column scores, only \['prompt', 'responses'\]"):
        encode([{"prompt": "w1", "responses": ["w2", "w3"]}], tokenizer)
    with pytest.raises(ValueError, match="train_dataset is empty"):
        encode(ranked().select([]), tokenizer)


def test_what_is_odd_is_counted_and_logged_once(tokenizer, caplog):
    rows = [
        row(),
        row(scores=[1.0, 1.0]),
        row(responses=["w3", "", "w4"], scores=[0.0, 9.0, 1.0]),
        row(responses=["w3 " * 40, "w4"]),
        row(responses=["w3", " "]),
    ]
    with caplog.at_level(logging.WARNING, logger="trl_ext.rrhf.data"):
        encoded, counts = encode(rows, tokenizer)
    assert counts.counts == {"responses_cut": 1, "responses_empty": 2, "rows_without_a_pair": 2}
    assert counts.examples == {"responses_cut": [3], "responses_empty": [2, 4], "rows_without_a_pair": [1, 4]}
    assert len(caplog.records) == 1
    assert "train_dataset, 5 rows" in caplog.text
    assert "2 empty response(s) were left out (first in rows 2, 4)" in caplog.text
    assert encoded[2]["scores"] == [0.0, 1.0]
    assert len(encoded[3]["response_ids"][0]) == 30  # max_length less the prompt, and no eos: it has not ended
    assert encoded[3]["response_ids"][0][-1] != tokenizer.eos_token_id
    assert encoded.column_names == ["prompt", "prompt_ids", "response_ids", "scores"]


def test_online_rows_need_no_responses_but_room(tokenizer):
    rows = [{"prompt": "w1", "label": 3}] * 2
    encoded, _ = encode(rows, tokenizer, needs_responses=False, min_room=4)
    assert encoded[1] == {
        "prompt": "w1",
        "label": 3,
        "prompt_ids": ids(tokenizer, "w1"),
        "response_ids": [],
        "scores": [],
    }
    some = [row(responses=[], scores=[]), row()]
    assert encode(some, tokenizer, needs_responses=False)[0]["scores"][:] == [[], [0.0, 1.0]]
    with pytest.raises(ValueError, match="leaves 31 of max_length=32 for a response, which needs 32"):
        encode(rows, tokenizer, needs_responses=False, min_room=32)


def test_other_columns_travel_with_the_row(tokenizer):
    encoded, _ = encode([row(source="web"), row(source="book")], tokenizer)
    rows = collate([encoded[0], encoded[1]])["rows"]
    assert [r.columns for r in rows] == [{"source": "web"}, {"source": "book"}]
    assert rows[1].prompt == "w1 w2"


@pytest.mark.parametrize("make", [ranked, chats])
@pytest.mark.parametrize("share", [True, False])
def test_a_batch_holds_every_response_with_its_reward_and_prompt(tokenizer, make, share):
    encoded, _ = encode(make(5), tokenizer)
    rows = collate(list(encoded))["rows"]
    batch = to_batch(rows, 0, share=share, max_columns=None)
    assert batch.group.tolist() == [i for i, r in enumerate(ranked_rows(5)) for _ in r["scores"]]
    torch.testing.assert_close(batch.rewards, torch.tensor([s for r in ranked_rows(5) for s in r["scores"]]))
    owners = torch.cat([part.owners for part in batch.parts])
    lengths = [len(ids) for r in rows for ids in r.response_ids]
    assert owners.bincount().tolist() == lengths


def test_no_response_is_trained_behind_its_end_token():
    tokenizer = chat.tokenizer_of(chat.CHATML, "<|im_end|>")
    user = [{"role": "user", "content": "Hi"}]
    (encoded,), _ = encode([row(prompt=user, responses=["Yes", "No."])], tokenizer, max_length=99)
    assert [tokenizer.decode(ids) for ids in encoded["response_ids"]] == ["Yes<|im_end|>", "No.<|im_end|>"]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"responses": "w2"}, "responses='w2' .* must both be lists"),  # each letter was a response
        ({"scores": 1.0}, "scores=1.0 must both be lists"),
        ({"responses": [1, 2]}, "row 0, a response: the prompt is 1"),
        ({"scores": [True, False]}, "the score True: give finite numbers"),
    ],
)
def test_responses_and_scores_are_lists_of_texts_and_numbers(tokenizer, bad, message):
    with pytest.raises(ValueError, match=message):
        encode([{"prompt": "w1", "responses": [" w2", " w3"], "scores": [1.0, 2.0]} | bad], tokenizer)
