"""What a label is expected to tell, by hand, and what is chosen."""

import json
import math

import numpy as np
import pytest

from trl_ext.feedback.choose import (
    choose_pairs,
    difference_values,
    information_gain,
    make_candidates,
    member_differences,
    response_couples,
    text_difference,
)
from trl_ext.feedback.pairs import make_pair, unordered


def rows(prompts=10, responses=4):
    return [
        {"prompt": f"q{i}", "responses": [f"answer {i} {k}" for k in range(responses)], "topic": i % 2}
        for i in range(prompts)
    ]


def test_information_by_hand():
    # Members sure of opposite labels: one bit. All unsure: none. All sure of the same: none.
    logit = math.log(3)  # p = 3/4 and 1/4: H(1/2) - H(1/4) = log 2 - (2 log 2 - 3/4 log 3)
    gains = information_gain(np.array([[500, 0, 30, logit], [-500, 0, 30, -logit]], dtype=float))
    assert gains[:3] == pytest.approx([math.log(2), 0, 0], abs=1e-9)
    assert gains[3] == pytest.approx(0.75 * math.log(3) - math.log(2))


def test_information_is_of_the_pair_and_not_of_its_order():
    d = np.random.default_rng(0).normal(0, 3, (4, 50))
    assert information_gain(-d) == pytest.approx(information_gain(d))
    assert (information_gain(d) <= math.log(2)).all()


@pytest.mark.parametrize("bad", [np.zeros((1, 3)), np.zeros(3), np.array([[1.0], [np.nan]])])
def test_bad_differences(bad):
    with pytest.raises(ValueError, match="differences"):
        information_gain(bad)


def test_candidates_are_all_pairs_of_different_responses_and_none_twice():
    first = {"prompt": "q", "responses": ["x", "y", " x ", "", "z"], "scores": [1, 2, 3, 4, 5]}
    candidates, left_out = make_candidates([first, {"prompt": "q", "responses": ["y", "x"]}])
    assert [(c.first, c.second) for c in candidates] == [(0, 1), (0, 4), (1, 4)]
    assert left_out == 1
    taken = {unordered(make_pair({"prompt": "q", "answer_a": "y", "answer_b": "x"}))}
    assert [(c.first, c.second) for c in make_candidates([first], taken)[0]] == [(0, 4), (1, 4)]


def test_the_best_of_each_prompt_are_taken_and_a_share_is_random():
    candidates, _ = make_candidates(rows(50))
    values = np.random.default_rng(1).random(len(candidates))
    chosen = choose_pairs(candidates, 20, values, random_share=0.25)
    assert [c.chosen_by for c in chosen].count("random") == 5
    assert len({c.pair.prompt for c in chosen}) == 20
    assert len({unordered(c.pair) for c in chosen}) == 20
    random_prompts = {c.pair.prompt for c in chosen if c.chosen_by == "random"}
    best = {}
    for candidate, value in zip(candidates, values, strict=True):
        if candidate.pair.prompt not in random_prompts:
            best[candidate.pair.prompt] = max(best.get(candidate.pair.prompt, 0), value)
    expected = sorted(best.values(), reverse=True)[:15]
    assert sorted((c.value for c in chosen if c.chosen_by == "information"), reverse=True) == expected


def test_the_random_share_does_not_look_at_the_values():
    candidates, _ = make_candidates(rows(300))
    values = np.array([float(c.first == 0 and c.second == 1) for c in candidates])
    chosen = choose_pairs(candidates, 300, values, random_share=0.5)
    drawn = [c for c in chosen if c.chosen_by == "random"]
    first = sum(c.pair.a.endswith(" 0") and c.pair.b.endswith(" 1") for c in drawn)
    assert first / len(drawn) == pytest.approx(1 / 6, abs=0.09)


def test_no_more_of_a_prompt_than_allowed():
    candidates, _ = make_candidates(rows(3))
    values = difference_values(candidates)
    assert len(choose_pairs(candidates, 100, values, method="different")) == 3
    chosen = choose_pairs(candidates, 100, values, method="different", per_prompt=2)
    counts = [sum(c.pair.prompt == f"q{i}" for c in chosen) for i in range(3)]
    assert counts == [2, 2, 2]
    everything = choose_pairs(candidates, 100, None, method="random", per_prompt=6)
    assert {c.pair.id for c in everything} == {c.pair.id for c in candidates}


def test_the_seed_decides():
    candidates, _ = make_candidates(rows(30))
    draws = [[c.pair.id for c in choose_pairs(candidates, 9, None, method="random", seed=s)] for s in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_a_choice_is_a_line_of_pairs():
    candidates, _ = make_candidates(rows(1, 2))
    (choice,) = choose_pairs(candidates, 1, np.array([0.5]), random_share=0)
    assert json.loads(json.dumps(choice.row())) == {
        "prompt": "q0", "answer_a": "answer 0 0", "answer_b": "answer 0 1", "topic": 0, "chosen_by": "information",
        "value": 0.5,
    }  # fmt: skip


def test_difference_is_of_words():
    assert text_difference("The cat sat", "the CAT sat") == 0
    assert text_difference("a b c", "c d") == pytest.approx(1 - 1 / 4)


def test_scores_become_differences_and_every_response_is_scored():
    candidates, _ = make_candidates(rows(1, 3))
    scores = [{(0, 0): 1.0, (0, 1): 3.0, (0, 2): 0.0}, {(0, 0): 1.0, (0, 1): 1.5}]
    differences = member_differences(candidates, scores)
    assert differences[0] == pytest.approx([-2, 1, 3])
    assert np.isnan(differences[1]).tolist() == [False, True, True]
    assert response_couples(["x", "y", "x", "z"]) == [(0, 1), (3, 0)]
    assert response_couples(["x", "x"]) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "best"}, "best"),
        ({"count": 0}, "count=0"),
        ({"random_share": 1.5}, "random_share=1.5"),
        ({"values": np.zeros(2)}, "for 60 candidates"),
        ({"values": None}, "for 60 candidates"),
        ({"method": "random"}, "for 60 candidates"),
    ],
)
def test_bad_settings_are_named(options, message):
    candidates, _ = make_candidates(rows())
    settings = {"count": 5, "values": np.zeros(60)} | options
    with pytest.raises(ValueError, match=message):
        choose_pairs(candidates, settings.pop("count"), settings.pop("values"), **settings)


def test_rows_without_pairs_are_named():
    with pytest.raises(ValueError, match="row 0: responses='x'"):
        make_candidates([{"prompt": "q", "responses": "x"}])
    with pytest.raises(ValueError, match="no pair to choose from"):
        make_candidates([{"prompt": "q", "responses": ["x", "x"]}])
