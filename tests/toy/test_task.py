import random
import statistics
from collections import Counter

import pytest

from trl_ext.toy import gold_reward, task
from trl_ext.toy.task import gold_score, is_grammatical

TONED = task.KIND | task.UNKIND | task.PLAIN

# (completion, gold worked out by hand, why)
HAND_NUMBERS = [
    ("she saw a fox . the cat was tall . then she went home .", 0.0, "nothing to praise, nothing to blame"),
    ("she helped a fox . the cat was kind . then she went home .", 0.30, "two kind words"),
    ("he bit a fox . the cat was tall . then he fell asleep .", -0.15, "an unkind word"),
    ("she felt kind and wise . he bit a cat . then he fell asleep .", 0.15, "two kind words, an unkind one"),
    ("the fox was kind . the cat was kind . then she went home .", 0.0, "0.15 - 0.15: a kind word, said twice"),
    ("the fox was mean . the cat was mean . then she went home .", -0.45, "two unkind occurrences and a repeat"),
    ("the fox was tall . the fox was tall . then she went home .", -0.15, "a plain repeat; a creature may return"),
    ("she saw a fox . the cat was tall . she met a kind hen .", -0.15, "0.15 - 0.3: no ending"),
    ("she saw a fox . the cat tall was . then she went home .", -0.25, "a malformed sentence"),
    ("she saw a fox . the cat was sad . then she went home .", -0.25, "a word outside the vocabulary"),
    ("then she went home .", -0.4, "two sentences short of three"),
    ("she saw a fox . he met a cat . the hen was tall . he fed a pig . the dog was wise . then he went home .",
     0.10, "0.30 - 0.2: six sentences"),
    ("she saw a fox . the cat was tall . then she went", -0.55, "unfinished: malformed and no ending"),
    ("", -0.9, "three sentences short and no ending"),
    ("she felt happy and happy . " * 5, -1.0, "0.15 - 9 * 0.15 - 0.3, bounded below"),
    ("she felt kind and wise . she felt warm and sweet . he felt brave and loyal . she hugged a merry fox . "
     "then she went home .", 1.0, "0.15 * 8, bounded above"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "gold", "why"), HAND_NUMBERS, ids=[why for *_, why in HAND_NUMBERS])
def test_gold_score_by_hand(text, gold, why):
    assert gold_score(text) == pytest.approx(gold, abs=1e-12)


def test_gold_reward_takes_strings_and_conversations_and_ignores_other_columns():
    text, gold, _ = HAND_NUMBERS[1]
    conversation = [{"role": "assistant", "content": text}]
    rewards = gold_reward([text, ""], prompts=["p", "q"], completion_ids=[[1], [2]], trainer_state=None)
    assert rewards == pytest.approx([gold, -0.9])
    assert gold_reward(completions=[conversation]) == pytest.approx([gold])
    assert gold_reward([]) == []


@pytest.mark.parametrize("completion", [None, 3, [{"role": "assistant"}], ["text"]])
def test_gold_reward_refuses_what_is_no_text(completion):
    with pytest.raises(TypeError, match="content"):
        gold_reward([completion])


def test_spacing_does_not_matter():
    assert gold_score(" she helped a fox .the cat was kind.then she went home.\n") == pytest.approx(0.3)


def test_vocabulary_has_no_word_twice_and_tones_do_not_overlap():
    assert len(set(task.VOCABULARY)) == len(task.VOCABULARY) == 117
    assert not task.KIND & task.UNKIND
    assert not (task.KIND | task.UNKIND) & task.PLAIN


def test_every_generated_word_is_in_the_vocabulary_and_lengths_are_bounded():
    rng = random.Random(0)
    words = set(task.VOCABULARY)
    for text in task.corpus(300, rng):
        assert set(text.split()) <= words
        assert is_grammatical(text.split(" . ", 1)[1])
    for record in task.demonstrations(300, rng):
        assert set((record["prompt"] + record["completion"]).split()) <= words
        assert len(record["prompt"].split()) == 10
        assert len(record["completion"].split()) <= 31  # 32 with the end token
        assert is_grammatical(record["completion"])


def test_demonstrations_leave_room_to_improve_and_do_not_repeat():
    rng = random.Random(0)
    texts = [task.demonstration(rng) for _ in range(2000)]
    gold = gold_reward(texts)
    assert -0.2 < statistics.mean(gold) < 0.1
    assert 0.2 < statistics.stdev(gold) < 0.4
    repeats = [any(n > 1 for w, n in Counter(text.split()).items() if w in TONED) for text in texts]
    assert statistics.mean(repeats) < 0.01
    assert 0.6 < statistics.mean(text.split(" . ")[-1].startswith("then") for text in texts) < 0.9


def test_preference_labels_are_noisy_and_clean_at_temperature_zero():
    def agreement(pairs):
        margins = [gold_score(pair["chosen"]) - gold_score(pair["rejected"]) for pair in pairs]
        return statistics.mean(margin > 0 for margin in margins if margin)

    assert agreement(task.preference_pairs(500, random.Random(0), temperature=0)) == 1.0
    assert 0.62 < agreement(task.preference_pairs(1500, random.Random(0))) < 0.78
    assert 0.45 < agreement(task.preference_pairs(1500, random.Random(0), temperature=1e6)) < 0.55
    with pytest.raises(ValueError, match="temperature"):
        task.preference_pairs(1, random.Random(0), temperature=-1)


def test_prompts_are_distinct_and_the_two_pools_are_disjoint():
    train, evaluation = task.prompt_pools()
    assert (len(train), len(evaluation)) == (19504, 2000)
    assert not set(train) & set(evaluation)
    prompts = task.sample_prompts(500, random.Random(0), "eval")
    assert len(set(prompts)) == 500
    assert set(prompts) <= set(evaluation)
    with pytest.raises(ValueError, match="split"):
        task.sample_prompts(1, random.Random(0), "test")
    with pytest.raises(ValueError, match="2000 prompts"):
        task.sample_prompts(2001, random.Random(0), "eval")


@pytest.mark.parametrize("generator", [task.corpus, task.demonstrations, task.preference_pairs, task.sample_prompts])
def test_generators_depend_on_their_seed_and_on_nothing_else(generator):
    random.seed(1)
    first = generator(20, random.Random(7))
    random.seed(2)
    assert generator(20, random.Random(7)) == first
    assert generator(20, random.Random(8)) != first
