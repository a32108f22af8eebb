"""Right, abstaining, wrong: how a completion is read, and what it earns."""

import pytest

from trl_ext.feedback.abstention import AbstentionRewards, abstention_reward, kind_of
from trl_ext.scripts.inputs import load_reward_function


@pytest.mark.parametrize(
    ("completion", "answer", "kind"),
    [
        ("Paris.", "Paris", "right"),
        ("The capital is the Paris", ["Lyon", "paris"], "right"),
        ("I think it is Paris.", "Paris", "hedged right"),
        ("I don't know, perhaps Paris?", "Paris", "hedged right"),
        ("I don't know.", "Paris", "abstained"),
        ("Unknown.", "Paris", "abstained"),
        ("It might be Lyon.", "Paris", "hedged wrong"),
        ("Lyon.", "Paris", "wrong"),
        ("Parisian life", "Paris", "wrong"),
        ("", "Paris", "wrong"),
        ("Not Paris, I am sure.\nAnswer: Lyon", "Paris", "wrong"),
        ("It was 12 or 13.\nFinal answer: 13", "13", "right"),
        ("I do not know.", None, "right"),
        ("Probably 7.", None, "hedged wrong"),
        ("7", [], "wrong"),
    ],
)
def test_the_parser(completion, answer, kind):
    assert kind_of(completion, answer) == kind


def test_rewards_of_texts_and_conversations():
    completions = ["Paris", [{"role": "assistant", "content": "I don't know."}], "Lyon"]
    assert abstention_reward(completions, answer=["Paris"] * 3, prompts=["?"] * 3) == [1.0, 0.0, -4.0]
    mild = AbstentionRewards(wrong=-3.0)
    assert abstention_reward(["Lyon"], answer=["Paris"], rewards=mild) == [-3.0]


def test_what_makes_inventing_pay_is_refused():
    with pytest.raises(ValueError, match="must fall from right to wrong"):
        AbstentionRewards(abstained=-5.0)
    with pytest.raises(ValueError, match="needs a column `answer`"):
        abstention_reward(["Paris"])
    with pytest.raises(TypeError, match="answer=7"):
        abstention_reward(["Paris"], answer=[7])
    with pytest.raises(TypeError, match="must be a text or messages"):
        abstention_reward([7], answer=["Paris"])


def test_it_is_a_reward_function_by_name(repo_root):
    function = load_reward_function(f"{repo_root}/trl_ext/feedback/abstention.py:abstention_reward")
    assert function(completions=["Paris"], answer=["Paris"]) == [1.0]
