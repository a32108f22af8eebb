"""Rewards of parts of a completion: forms, checks, and which token is paid."""

import math

import pytest

from tests.ppo import tiny
from trl_ext.scoring import RewardSources, placed_by_functions
from trl_ext.text import TextEncoder
from trl_ext.token_rewards import PlacedReward, paying_tokens, read_reward, sentence_ends

NAN = math.nan
CALL = {"prompts": ["a", "b"], "completions": ["w1 w2 w3", "w4"], "completion_ids": [[7, 8, 9, 1], [10, 1]]}


def test_forms_by_hand():
    assert read_reward(2.5, 4, 8) == 2.5
    assert read_reward([0.0, 1.0, 0.0, -0.5], 4, 8) == PlacedReward(tokens=((1, 1.0), (3, -0.5)))
    spans = read_reward({"tokens": [(0, 2, 1.0)], "characters": [(0, 5, 2.0), (3, 8, 3)], "score": 0.5}, 4, 8)
    assert spans == PlacedReward(((1, 1.0),), ((5, 2.0), (8, 3)), 0.5)  # each on the last token of its span
    assert spans.total == 6.5


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0, 2.0], "2 numbers for its 4 tokens"),
        ([1.0, 2.0, NAN, 0.0], "the number of token 2 is nan"),
        ([1.0, 2.0, None, 0.0], "the number of token 2 is None"),
        ({}, "a dictionary with the keys"),
        ({"words": [(0, 1, 1.0)]}, r"keys \['words'\]"),
        ({"tokens": [(0, 5, 1.0)]}, r"tokens: the span \(0, 5, 1.0\) is not inside its 4 tokens"),
        ({"tokens": [(2, 2, 1.0)]}, "is not inside"),
        ({"tokens": [(-1, 2, 1.0)]}, "is not inside"),
        ({"characters": [(0, 9, 1.0)]}, "is not inside its 8 characters"),
        ({"characters": [(0, 2.0, 1.0)]}, "is not inside"),
        ({"characters": [(0, 2, NAN)]}, "the number of the span"),
        ({"characters": [3]}, "3 is no"),
        ({"score": math.inf}, "the score is inf"),
    ],
)
def test_what_is_no_reward_is_refused_by_function_and_sample(value, message):
    def reward(prompts, completions, **kwargs):
        return [value, 0.0]

    with pytest.raises(ValueError, match=message) as error:
        RewardSources(reward).functions[0](**CALL)
    assert "reward function 'reward' returned" in str(error.value)
    assert "sample 0, completion 'w1 w2 w3'" in str(error.value)


def test_one_number_is_the_sum_of_the_parts_and_the_parts_are_taken_once():
    def parts(prompts, completions, **kwargs):
        return [[0.0, 1.0, 0.5, 0.0], None]

    def number(prompts, completions, **kwargs):
        return [1.0, 2.0]

    sources = RewardSources([parts, number])
    assert [function(**CALL) for function in sources.functions] == [[1.5, None], [1.0, 2.0]]
    assert sources.take_placed() == [[PlacedReward(tokens=((1, 1.0), (2, 0.5))), None], None]
    assert sources.take_placed() == [None, None]
    assert sources(**CALL).nan_to_num(-1).tolist() == [[1.5, 1.0], [-1.0, 2.0]]


def test_parts_land_on_their_tokens_weighted():
    """Words are tokens here: w1 ends at character 2, w2 at 5; the end token has no character."""
    encoder = TextEncoder(tiny.tiny_tokenizer())
    placed = [[PlacedReward(characters=((2, 1.0), (5, 2.0))), None], [None, PlacedReward(tokens=((1, 3.0),))]]
    paid = placed_by_functions(encoder, CALL["completion_ids"], placed, [0.5, 2.0])
    assert paid.tolist() == [[0.5, 1.0, 0.0, 0.0], [0.0, 6.0, 0.0, 0.0]]
    assert placed_by_functions(encoder, CALL["completion_ids"], [None, None], [0.5, 2.0]) is None


def test_a_character_of_several_tokens_is_paid_on_the_last_of_them():
    """As bytes make the tokens: the two of an e with an accent decode to a mark of their own until both are there."""
    word = "né é".encode()

    def decode(ids):
        return bytes(ids).decode(errors="replace")

    assert list(word) == [110, 195, 169, 32, 195, 169]
    assert paying_tokens(decode, list(word), [1, 2, 3, 4]) == [0, 2, 3, 5]
    with pytest.raises(ValueError, match="no token ends at character 5"):
        paying_tokens(decode, list(word), [5])


def test_sentences():
    text = 'He said "go." Then 3.5 left!\nDone'
    assert [text[:end][-4:] for end in sentence_ends(text)] == ['go."', "eft!", "ft!\n"]
    assert sentence_ends("no end") == []
