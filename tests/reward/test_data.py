"""Preference rows to tokens: where the response starts, what is dropped and why, and what a batch holds."""

from collections import Counter

import pytest
import torch
from datasets import Dataset

from tests.ppo import tiny
from trl_ext.reward.config import RewardModelConfig
from trl_ext.reward.data import PreferenceCollator, overlap, tokenize_preferences
from trl_ext.text import TextEncoder

PROMPT, GOOD, BAD = "w0 w1", " w2 w3 w4", " w5"


def user(*texts):
    """Messages in turn, the first by the user."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def said(text):
    return [{"role": "assistant", "content": text}]


def pair(**fields):
    return {"prompt": PROMPT, "chosen": GOOD, "rejected": BAD} | fields


def ranking(responses=("w2 w3", "w4", "w5"), scores=(1.0, 3.0, 2.0), **fields):
    return {"prompt": "w0 w1 ", "responses": list(responses), "scores": list(scores)} | fields


def tokenize(*rows, name="train_dataset", **options):
    args = RewardModelConfig("unused", report_to="none", use_cpu=True, disable_tqdm=True, **options)
    return tokenize_preferences(Dataset.from_list(list(rows)), TextEncoder(tiny.tiny_tokenizer()), args, name)


def texts(row):
    """(prompt, response) of each sequence, as words."""
    decode, start = tiny.tiny_tokenizer().decode, row["prompt_length"]
    return [(decode(ids[:start]), decode(ids[start:])) for ids in row["ids"]]


# ---------------------------------------------------------------------- tokens


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(pair(), id="a prompt"),
        pytest.param({"chosen": PROMPT + GOOD, "rejected": PROMPT + BAD}, id="prompt in both"),
        pytest.param(pair(chosen=GOOD + "<eos>"), id="an end is not doubled"),
    ],
)
def test_plain_responses_follow_the_prompt_and_end_with_eos(row):
    (found,), _ = tokenize(row)
    assert texts(found) == [("w0 w1", "w2 w3 w4 <eos>"), ("w0 w1", "w5 <eos>")]
    assert found["prompt_length"] == 2
    assert (found["chosen_ids"], found["rejected_ids"]) == tuple(found["ids"])
    assert (found["row"], found["ranks"]) == (0, [0, 1])


@pytest.mark.parametrize(
    "row",
    [
        pytest.param({"prompt": user("w0"), "chosen": said("w2"), "rejected": said("w5 w6")}, id="a prompt"),
        pytest.param({"chosen": user("w0", "w2"), "rejected": user("w0", "w5 w6")}, id="prompt in both"),
    ],
)
def test_a_response_in_a_conversation_follows_the_generation_prompt(row):
    (found,), _ = tokenize(row)
    assert texts(found) == [
        ("<user> w0 <end> <assistant>", "w2 <end>"),
        ("<user> w0 <end> <assistant>", "w5 w6 <end>"),
    ]


def test_a_ranking_is_sorted_best_first_and_ties_share_a_rank():
    (found,), report = tokenize(ranking(("w2", "w3", "w4", "w5"), (1, 4.5, 1, 2)))
    assert [response for _, response in texts(found)] == ["w3 <eos>", "w5 <eos>", "w2 <eos>", "w4 <eos>"]
    assert found["ranks"] == [0, 1, 2, 2]
    assert texts(found)[0][0] == "w0 w1"
    assert (found["chosen_ids"], found["rejected_ids"]) == (found["ids"][0], found["ids"][-1])
    assert report.format == "ranking"


def test_a_ranking_of_answers_in_a_conversation():
    (found,), _ = tokenize(ranking(prompt=user("w0", "w1", "w2")))
    prompt = "<user> w0 <end> <assistant> w1 <end> <user> w2 <end> <assistant>"
    assert texts(found) == [(prompt, f"{response} <end>") for response in ("w4", "w5", "w2 w3")]


def test_where_the_response_changes_the_last_token_of_the_prompt_the_response_starts_there():
    (found,), _ = tokenize({"prompt": "w0 w1", "chosen": "0 w2", "rejected": "1 w3"})
    assert found["prompt_length"] == 1
    assert texts(found)[0] == ("w0", "w10 w2 <eos>")


@pytest.mark.parametrize(
    ("options", "columns", "margin", "smoothing"),
    [
        ({}, {}, 0.0, 0.0),
        ({}, {"margin": 0.5}, 0.5, 0.0),
        ({"margin": 1.0}, {"margin": 0.5}, 1.5, 0.0),
        ({"margin_column": "strength_mean"}, {"margin": 0.5, "strength_mean": -2}, -2.0, 0.0),
        ({"label_smoothing": 0.1}, {"suspected": False}, 0.0, 0.1),
        ({"label_smoothing": 0.1, "label_smoothing_on": "suspected"}, {"suspected": False}, 0.0, 0.0),
        ({"label_smoothing": 0.1, "label_smoothing_on": "suspected"}, {"suspected": True}, 0.0, 0.1),
    ],
)
def test_margin_and_smoothing_of_a_row(options, columns, margin, smoothing):
    (found,), _ = tokenize(pair(**columns), **options)
    assert (found["margin"], found["label_smoothing"]) == (margin, smoothing)


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (pair(rejected=GOOD), "chosen equals rejected"),
        (pair(rejected=" w2  w3 w4"), "chosen equals rejected once tokenized"),
        (pair(chosen=" "), "empty response"),
        (pair(prompt=" "), "empty prompt"),
        (pair(prompt=None, chosen="w2 w3", rejected="w4 w5"), "empty prompt"),
        (pair(chosen=None), "missing field"),
        (pair(chosen=" w2" * 9), "longer than max_length=10 tokens"),
    ],
)
def test_bad_pairs_are_dropped_and_counted(bad, reason):
    found, report = tokenize(pair(), bad, pair(), max_length=10)
    assert found["row"][:] == [0, 2]
    assert report.dropped == Counter({reason: 1})
    assert (report.rows_read, report.rows_kept) == (3, 2)
    assert report.examples[reason][0] == 1


def test_a_strength_in_words_does_not_cost_the_pair():
    rows, report = tokenize(pair(strength="strong"), pair(strength="1.5"))
    assert (len(rows), report.rows_kept) == (2, 2)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"chosen": user("w0", "w2"), "rejected": user("w1", "w5")}, "prompts differ"),
        ({"chosen": user("w0", "w2", "w3"), "rejected": user("w0", "w2", "w4")}, "wrong role order"),
        ({"chosen": [*said("w0"), *said("w2")], "rejected": [*said("w0"), *said("w3")]}, "wrong role order"),
        ({"chosen": user("w0", "w2"), "rejected": user("w0", "w2")}, "chosen equals rejected"),
        ({"chosen": user("w0", ""), "rejected": user("w0", "w2")}, "empty response"),
        ({"chosen": said("w2"), "rejected": said("w3")}, "empty prompt"),
    ],
)
def test_bad_conversations_are_dropped_and_counted(bad, reason):
    good = {"chosen": user("w0", "w2"), "rejected": user("w0", "w5")}
    found, report = tokenize(bad, good)
    assert found["row"][:] == [1]
    assert report.dropped == Counter({reason: 1})


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (ranking(["w2"], [1.0]), "fewer than two responses"),
        (ranking(["w2", "w3"], [1.0]), "not one score for each response"),
        (ranking(["w2", "w3"], [1.0, 1.0]), "all scores of a ranking are equal"),
        (ranking(["w2", ""], [1.0, 2.0]), "empty response"),
        (ranking(["w2", "w2"], [1.0, 2.0]), "one response with two scores"),
        (ranking(["w2 w3", "w2  w3", "w4"]), "one response with two scores once tokenized"),
        (ranking(["w2", "w3"], [1.0, float("nan")]), "not finite"),
        (ranking(["w2", " w3" * 8], [1.0, 2.0]), "longer than max_length=10 tokens"),
    ],
)
def test_bad_rankings_are_dropped_and_counted(bad, reason):
    found, report = tokenize(bad, ranking(), max_length=10)
    assert found["row"][:] == [1]
    assert report.dropped == Counter({reason: 1})


def test_a_response_as_long_as_the_limit_stays_whole():
    (found,), report = tokenize(pair(), max_length=6)
    assert len(found["chosen_ids"]) == 6
    assert not report.dropped


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), "1.5", True])
def test_a_margin_that_is_no_number_is_an_error_that_names_the_row(value):
    rows = [pair(strength_mean=value)] if value is not None else [pair(strength_mean=1.0), pair(strength_mean=None)]
    with pytest.raises(ValueError, match=rf"row {len(rows) - 1} of train_dataset: strength_mean is .* finite number"):
        tokenize(*rows, margin_column="strength_mean")


@pytest.mark.parametrize(
    ("dataset", "options", "error", "match"),
    [
        (Dataset.from_dict({"text": ["w0"]}), {}, ValueError, r"columns \['text'\]: it needs `chosen` and `rejected`"),
        (Dataset.from_dict({"prompt": ["w0"], "responses": [["w1"]]}), {}, ValueError, "`responses` and `scores`"),
        (Dataset.from_dict({"chosen": [], "rejected": []}), {}, ValueError, "train_dataset has no rows"),
        ([pair()], {}, TypeError, "must be a datasets.Dataset, got list"),
        (Dataset.from_list([pair()]), {"margin_column": "m"}, ValueError, "margin_column='m' is no column"),
        (
            Dataset.from_list([pair()]),
            {"label_smoothing": 0.1, "label_smoothing_on": "suspected"},
            ValueError,
            "no column `suspected`",
        ),
        (Dataset.from_list([pair(chosen="")]), {}, ValueError, "(?s)no row of train_dataset.*empty response"),
    ],
)
def test_a_dataset_that_cannot_be_used_is_an_error(dataset, options, error, match):
    args = RewardModelConfig("unused", report_to="none", use_cpu=True, disable_tqdm=True, **options)
    with pytest.raises(error, match=match):
        tokenize_preferences(dataset, TextEncoder(tiny.tiny_tokenizer()), args, "train_dataset")


def test_only_training_rows_need_the_columns_that_the_options_read():
    options = {"margin_column": "m", "label_smoothing": 0.1, "label_smoothing_on": "suspected", "name": "eval_dataset"}
    (found,), _ = tokenize(pair(), **options)
    assert (found["margin"], found["label_smoothing"]) == (0.0, 0.0)


def test_overlap_counts_rows_that_share_a_whole_sequence():
    train, _ = tokenize(pair(), pair(prompt="w7"))
    test, _ = tokenize(pair(rejected=" w9"), pair(prompt="w8"), pair(chosen=BAD, rejected=" w9"))
    assert overlap(train, test) == 2  # the first by its chosen, the last by its chosen, the train's rejected
    assert overlap(test, test) == 3


# ---------------------------------------------------------------------- batches


@pytest.fixture
def rows():
    """A pair, three ranked responses, and four with a tie."""
    pairs, _ = tokenize(pair(margin=0.5), label_smoothing=0.1)
    rankings, _ = tokenize(ranking(), ranking(("w2", "w3", "w4", "w5"), (1, 2, 2, 3), prompt="w6 "))
    return [pairs[0], rankings[0], rankings[1]]


def test_a_batch_has_all_pairs_of_a_ranking_and_none_of_a_tie(rows):
    batch = PreferenceCollator(0)(rows)
    found = {}
    for w, loser, r in zip(batch["winners"].tolist(), batch["losers"].tolist(), batch["rows"].tolist(), strict=True):
        found.setdefault(r, []).append((w, loser))
    assert found == {
        0: [(0, 1)],
        1: [(2, 3), (2, 4), (3, 4)],
        2: [(5, 6), (5, 7), (5, 8), (6, 8), (7, 8)],  # not (6, 7), which have the same score
    }
    assert batch["best"].tolist() == [0, 2, 5]
    assert batch["worst"].tolist() == [1, 4, 8]
    assert batch["is_best"].nonzero().flatten().tolist() == [0, 2, 5]
    assert batch["prompts"].tolist() == [2, 2, 1]


def test_every_row_weighs_the_same_and_all_together_one(rows):
    batch = PreferenceCollator(0)(rows)
    assert batch["weights"].sum().item() == pytest.approx(1)
    per_row = torch.zeros(3).index_add(0, batch["rows"], batch["weights"])
    torch.testing.assert_close(per_row, torch.full((3,), 1 / 3))
    assert batch["margins"].tolist() == [0.5] + [0] * 8
    assert batch["label_smoothing"].tolist() == pytest.approx([0.1] + [0] * 8)


@pytest.mark.parametrize("share", [True, False])
def test_every_response_is_run_once(rows, share):
    """Nine responses in four to nine pairs: one sequence each, and with `share` one prompt for a row."""
    parts = PreferenceCollator(0, share)(rows)["parts"]
    numbers = torch.cat([part.sequences for part in parts])
    assert sorted(numbers.tolist()) == list(range(9))
    responses = sum(len(ids) - row["prompt_length"] for row in rows for ids in row["ids"])
    assert sum(len(part.targets) for part in parts) == responses
    prompts = sum(row["prompt_length"] * (1 if share else len(row["ids"])) for row in rows)
    assert sum(int(part.attention_mask.sum()) for part in parts) == responses + prompts
