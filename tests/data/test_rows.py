"""What a preference and a ranking must look like, and the reason given for each that does not."""

import math

import pytest

from trl_ext.data import RowError, check_preference_row, check_ranking_row


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


ASK = [user("Why is the sky blue?")]
PAIR = {"prompt": ASK, "chosen": [assistant("It scatters.")], "rejected": [assistant("It is paint.")]}
RANKING = {"prompt": ASK, "responses": ["a", "b", "c"], "scores": [1, 3.0, 2]}


def test_a_good_conversation_stays_as_it_is():
    assert check_preference_row(PAIR) == PAIR


def test_other_fields_are_left_out_and_strengths_become_floats():
    row = PAIR | {"strength": 2, "margin": -0.5, "soft_label": 1, "source": "somewhere", "reader": "anna"}
    kept = {"strength": 2.0, "margin": -0.5, "soft_label": 1.0, "source": "somewhere"}
    assert check_preference_row(row) == PAIR | kept
    assert isinstance(check_preference_row(row)["strength"], float)


def test_the_row_given_is_not_changed():
    row = {"chosen": ASK + PAIR["chosen"], "rejected": ASK + PAIR["rejected"]}
    before = repr(row)
    check_preference_row(row)
    assert repr(row) == before


@pytest.mark.parametrize(
    "prompt",
    [
        [user("a")],
        [system("be brief"), user("a")],
        [user("a"), assistant("b"), user("c")],
        [system("be brief"), user("a"), assistant("b"), user("c")],
    ],
)
def test_an_implicit_prompt_is_all_but_the_last_message(prompt):
    row = {"chosen": [*prompt, assistant("yes")], "rejected": [*prompt, assistant("no")]}
    expected = {"prompt": prompt, "chosen": [assistant("yes")], "rejected": [assistant("no")]}
    assert check_preference_row(row) == expected
    assert check_preference_row(row | {"prompt": None}) == expected
    # UltraFeedback binarized repeats the question as a text beside the two conversations.
    assert check_preference_row(row | {"prompt": "a"}) == expected


def test_texts_stay_texts_with_all_their_whitespace():
    row = {"prompt": "Q: sky?\nA:", "chosen": " blue \n", "rejected": " green"}
    assert check_preference_row(row) == row


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("Q: sky? blue", "Q: sky? green", "Q: sky?"),
        ("Q: sky? blue", "Q: sky? black", "Q: sky?"),  # a word is not cut, although both begin with "bl"
        ("Q: sky?\n\nblue", "Q: sky?\n\ngreen", "Q: sky?"),
        ("Q: sky? yes", "Q: sky? yes indeed", "Q: sky?"),  # nor does the shorter response vanish
    ],
)
def test_the_implicit_prompt_of_texts_is_their_common_start(chosen, rejected, prompt):
    record = check_preference_row({"chosen": chosen, "rejected": rejected})
    assert record["prompt"] == prompt
    assert record["prompt"] + record["chosen"] == chosen
    assert record["prompt"] + record["rejected"] == rejected


BAD_PAIRS = {
    "chosen equals rejected": PAIR | {"rejected": [assistant(" It scatters.\n")]},
    "chosen equals rejected, texts": {"prompt": "a", "chosen": "b", "rejected": "b "},
    "chosen equals rejected, implicit texts": {"chosen": "a b", "rejected": "a b"},
    "empty response": PAIR | {"rejected": [assistant(" \n")]},
    "empty response, texts": {"prompt": "a", "chosen": "", "rejected": "b"},
    "empty turn": PAIR | {"prompt": [user("a"), assistant(" "), user("c")]},
    "empty turn, system": PAIR | {"prompt": [system(""), user("a")]},
    "empty prompt": PAIR | {"prompt": []},
    "empty prompt, only a system": PAIR | {"prompt": [system("be brief")]},
    "empty prompt, implicit": {"chosen": PAIR["chosen"], "rejected": PAIR["rejected"]},
    "empty prompt, texts": {"prompt": " ", "chosen": "a", "rejected": "b"},
    "empty prompt, nothing in common": {"chosen": "a b", "rejected": "c d"},
    "prompts differ": {"chosen": [user("a"), assistant("x")], "rejected": [user("b"), assistant("y")]},
    "prompts differ, length": {
        "chosen": [user("a"), assistant("x")],
        "rejected": [user("a"), assistant("x"), user("b"), assistant("y")],
    },
    "prompts differ, written one": {
        "prompt": "b",
        "chosen": [user("a"), assistant("x")],
        "rejected": [user("a"), assistant("y")],
    },
    "wrong role order, user twice": PAIR | {"prompt": [user("a"), user("b")]},
    "wrong role order, assistant first": PAIR | {"prompt": [assistant("a"), user("b")]},
    "wrong role order, system late": PAIR | {"prompt": [user("a"), system("b")]},
    "wrong role order, prompt ends in assistant": PAIR | {"prompt": [user("a"), assistant("b")]},
    "wrong role order, response by the user": PAIR | {"chosen": [user("b")]},
    "wrong role order, tool": PAIR | {"prompt": [user("a"), {"role": "tool", "content": "4"}]},
    "wrong role order, ends with a user": {"chosen": ASK, "rejected": ASK},
    "response is not one message": PAIR | {"chosen": [assistant("a"), assistant("b")]},
    "response is not one message, none": PAIR | {"rejected": []},
    "missing field": {"prompt": ASK, "chosen": PAIR["chosen"]},
    "missing field, None": PAIR | {"chosen": None},
    "neither two texts nor two conversations": PAIR | {"chosen": "It scatters."},
    "prompt and responses are of different kinds": {"prompt": ASK, "chosen": "a", "rejected": "b"},
    "prompt and responses are of different kinds, number": PAIR | {"prompt": 3},
    "not a message with a text role and content": PAIR | {"chosen": [{"role": "assistant", "content": None}]},
    "not a message with a text role and content, text": PAIR | {"prompt": ["a"]},
    "not a number": PAIR | {"strength": "strong"},
    "not a number, numeral": PAIR | {"strength": "3"},
    "not a number, bool": PAIR | {"margin": True},
    "not a number, None": PAIR | {"margin": None},
    "not finite": PAIR | {"strength": math.nan},
    "not finite, infinite": PAIR | {"margin": math.inf},
}


@pytest.mark.parametrize("case", BAD_PAIRS)
def test_a_bad_preference_is_refused_with_its_reason(case):
    with pytest.raises(RowError) as caught:
        check_preference_row(BAD_PAIRS[case])
    assert caught.value.reason == case.partition(",")[0]


def test_an_error_says_where_and_what():
    with pytest.raises(RowError, match="wrong role order: turn 2 of chosen is user, expected assistant"):
        check_preference_row(BAD_PAIRS["wrong role order, user twice"])
    with pytest.raises(RowError, match="not a number: strength is 'strong'"):
        check_preference_row(BAD_PAIRS["not a number"])
    with pytest.raises(RowError, match="prompts differ: message 1: 'a' and 'b'"):
        check_preference_row(BAD_PAIRS["prompts differ"])


def test_a_good_ranking_stays_as_it_is():
    assert check_ranking_row(RANKING) == RANKING
    assert check_ranking_row(RANKING | {"prompt": "Why?", "models": 3}) == RANKING | {"prompt": "Why?"}


def test_equal_scores_and_equal_responses_of_equal_score_are_no_error():
    row = RANKING | {"responses": ["a", "a", "b"], "scores": [1, 1, 1]}
    assert check_ranking_row(row)["scores"] == [1, 1, 1]


BAD_RANKINGS = {
    "fewer than two responses": RANKING | {"responses": ["a"], "scores": [1]},
    "fewer than two responses, none": RANKING | {"responses": [], "scores": []},
    "responses are not a list of texts": RANKING | {"responses": "abc"},
    "responses are not a list of texts, messages": RANKING | {"responses": [PAIR["chosen"], PAIR["rejected"], ASK]},
    "not one score for each response": RANKING | {"scores": [1, 2]},
    "not one score for each response, one number": RANKING | {"scores": 3},
    "not a number": RANKING | {"scores": [1, "good", 2]},
    "not a number, None": RANKING | {"scores": [1, None, 2]},
    "not finite": RANKING | {"scores": [1, math.nan, 2]},
    "empty response": RANKING | {"responses": ["a", " ", "c"]},
    "one response with two scores": RANKING | {"responses": ["a", "a ", "c"]},
    "empty prompt": RANKING | {"prompt": ""},
    "empty prompt, no messages": RANKING | {"prompt": []},
    "wrong role order": RANKING | {"prompt": [user("a"), assistant("b")]},
    "not a text": RANKING | {"prompt": 3},
    "missing field": {"prompt": ASK, "responses": ["a", "b"]},
}


@pytest.mark.parametrize("case", BAD_RANKINGS)
def test_a_bad_ranking_is_refused_with_its_reason(case):
    with pytest.raises(RowError) as caught:
        check_ranking_row(BAD_RANKINGS[case])
    assert caught.value.reason == case.partition(",")[0]


def test_a_ranking_of_one_says_how_many_it_needs():
    with pytest.raises(RowError, match=r"fewer than two responses: K = 1, a ranking needs K >= 2"):
        check_ranking_row(BAD_RANKINGS["fewer than two responses"])
