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
        # an answer that is an article
        ("A", "A", "right"),
        ("The answer is A.", "A", "right"),
        ("It is a dog.", "A", "wrong"),
        ("B", "A", "wrong"),
        ("I don't know.", "A", "abstained"),
        # guessing behind an abstention
        ("I don't know, Paris", "Paris", "hedged right"),
        ("I don't know, Lyon", "Paris", "wrong"),
        ("I don\u2019t know \u2014 Lyon", "Paris", "wrong"),
        ("I don't know, maybe Lyon", "Paris", "hedged wrong"),
        ("I don't know.\nAnswer: Lyon", "Paris", "wrong"),
        ("I don't know, but it is 42", None, "wrong"),
        ("I'm sorry, I don't know who painted it.", "Monet", "abstained"),
        ("Answer: unknown", "Paris", "abstained"),
        # numbers
        ("5", "-5", "wrong"),
        ("-5", "5", "wrong"),
        ("It is \u22125.", "-5", "right"),
        ("3.14", "3", "wrong"),
        ("3", "3.14", "wrong"),
        ("About 1,234.50 dollars", "1234.5", "right"),
        ("It ended in 1945, on 2-9-1945.", "1945", "right"),
        ("1939-1945", "1945", "wrong"),
        ("July 4, 1776", "1776", "right"),
        # several candidates
        ("Paris or Lyon", "Paris", "wrong"),
        ("The capital is Lyon or Paris.", "Paris", "wrong"),
        ("Lyon, Paris, Rome", "Paris", "wrong"),
        ("Lyon\nParis\nRome", "Paris", "wrong"),
        ("Lyon Paris Rome Berlin", "Paris", "wrong"),
        ("12, 13", "13", "wrong"),
        ("Answer: 12 or 13", "13", "wrong"),
        ("Paris or Lutetia", ["Paris", "Lutetia"], "right"),
        ("Bonnie and Clyde", "Bonnie and Clyde", "right"),
        ("Paris, the largest city of France.", "Paris", "right"),
        ("Yes, Paris.", "Paris", "right"),
        ("Paris. It is beautiful.", "Paris", "right"),
        ("Photosynthesis is how plants make food, using light, water and air.", "photosynthesis", "right"),
        ("Yes.", "yes", "right"),
        ("No, it's Paris.", "Paris", "right"),
        ("2 + 3 = 5", "5", "right"),
        # denied
        ("It is not Paris.", "Paris", "wrong"),
        ("It isn't Paris.", "Paris", "wrong"),
        ("Paris is wrong.", "Paris", "wrong"),
        ("Not Lyon but Paris.", "Paris", "right"),
        ("It is not Lyon, it is Paris.", "Paris", "right"),
        ("It is Paris, not the town of Lyon.", "Paris", "right"),
        # the last one counts, and as a whole
        ("Answer: Paris\nNo.\nAnswer: Lyon", "Paris", "wrong"),
        ("Answer: Lyon\nNo.\nAnswer: Paris", "Paris", "right"),
        ("Answer: Paris Hilton", "Paris", "wrong"),
        ("Answer: It is Paris.", "Paris", "right"),
        ("Answer:", "Paris", "wrong"),
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
