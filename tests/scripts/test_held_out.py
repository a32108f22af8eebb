"""What is held out by its prompt is in none of the rows that a run trains on."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset

from trl_ext.scripts import held_out, rlhf, rlhf_data

ENCODER = SimpleNamespace(prompt_lengths=lambda prompts: [len(str(prompt)) for prompt in prompts])


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_prompt_is_the_same_as_a_text_and_as_a_message() -> None:
    assert held_out.prompt_key("why ?") == held_out.prompt_key(said(" why ?\n"))
    assert held_out.prompt_key("why ?") != held_out.prompt_key([{"role": "system", "content": "."}, *said("why ?")])


def test_all_pairs_of_a_prompt_are_on_one_side_and_the_seed_says_which() -> None:
    rows = Dataset.from_list([{"prompt": f"p{i % 12}", "n": i} for i in range(60)])
    parts = [held_out.split_by_prompt(rows, 6, seed, print) for seed in (0, 0, 5)]
    for train, test in parts:
        assert set(train["prompt"]).isdisjoint(test["prompt"])
        assert (len(train), len(test)) == (55, 5)
        assert sorted([*train["n"], *test["n"]]) == list(range(60))
    assert parts[0][1]["n"][:] == parts[1][1]["n"][:] != parts[2][1]["n"][:]


def test_rows_of_one_prompt_are_split_by_row_and_that_is_said() -> None:
    told: list[str] = []
    train, test = held_out.split_by_prompt(Dataset.from_dict({"prompt": ["p"] * 10}), 2, 0, told.append)
    assert (len(train), len(test)) == (8, 2)
    assert "same prompt" in told[0]


@pytest.mark.parametrize("named", [False, True])
def test_no_held_out_prompt_is_in_anything_that_the_policy_is_trained_on(tmp_path: Path, named) -> None:
    pairs = [
        {"prompt": said(f"q{i % 40}"), **{name: [{"role": "assistant", "content": f"{name} {i}"}] for name in
         ("chosen", "rejected")}}
        for i in range(200)
    ]  # fmt: skip
    told: list[str] = []
    flags = [f"--preferences={write(tmp_path / 'pairs.jsonl', pairs)}", "--model_name_or_path=m", "--use_cpu"]
    demonstrations = [{"prompt": f"q{i}", "completion": " yes"} for i in range(40)]
    flags += [f"--sft_dataset={write(tmp_path / 'sft.jsonl', demonstrations)}", f"--output_dir={tmp_path}"]
    if named:
        flags += [f"--prompts={write(tmp_path / 'all.jsonl', [{'prompt': f'q{i}'} for i in range(40)])}"]
        flags += [f"--prompts_test={write(tmp_path / 'test.jsonl', [{'prompt': said(f'q{i}')} for i in range(4)])}"]
    recipe, training, *_ = rlhf.parse(flags)
    tell = lambda *words, **_: told.append(str(words[0]))  # noqa: E731
    told_by, preferences, test_pairs, prompts, judged = rlhf_data.own_data(recipe, training, ENCODER, tell)
    keys = [{held_out.prompt_key(prompt) for prompt in rows["prompt"]} for rows in (judged, prompts, told_by)]
    assert len(keys[0]) == 4
    assert keys[0].isdisjoint(keys[1] | keys[2])
    assert (len(prompts), len(told_by)) == (36, 36)
    assert "4 demonstrations left out: their prompts are held out to judge on." in told
    if named:
        assert "4 prompts left out of the training: they are held out to judge on." in told
        assert not [line for line in told if "trained on too" in line]
    else:
        assert (len(preferences), len(test_pairs)) == (180, 20)


def test_demonstrations_in_messages_are_compared_turn_by_turn_and_texts_are_not() -> None:
    talk = [*said("a"), {"role": "assistant", "content": "b"}, *said("c"), {"role": "assistant", "content": "d"}]
    rows, told = Dataset.from_dict({"messages": [talk, talk[2:]]}), []
    assert len(held_out.demonstrations_apart(rows, Dataset.from_dict({"prompt": ["a"]}), told.append)) == 1
    assert len(held_out.demonstrations_apart(rows, Dataset.from_dict({"prompt": [talk[:3]]}), told.append)) == 1
    texts = Dataset.from_dict({"text": ["a b"]})
    assert held_out.demonstrations_apart(texts, Dataset.from_dict({"prompt": ["a"]}), told.append) is texts
    assert "is not known" in told[-1]


def test_nothing_is_left_to_train_on() -> None:
    rows = Dataset.from_dict({"prompt": ["a", "b"]})
    with pytest.raises(ValueError, match="all 2 prompts to train on are among those held out"):
        held_out.prompts_apart(rows, rows, print)
    with pytest.raises(ValueError, match="all 2 demonstrations answer prompts that are held out"):
        held_out.demonstrations_apart(rows.add_column("completion", ["c", "d"]), rows, print)


def test_pairs_of_a_test_set_that_has_training_prompts() -> None:
    """As `trl-ext pipeline` and `trl-ext rlhf` make their prompts."""
    train, test = Dataset.from_dict({"prompt": ["a", "a", "b", "c"]}), Dataset.from_dict({"prompt": ["b", "b", "d"]})
    prompts, judged = held_out.prompts_of_both(train, test, ENCODER, 9, print)
    assert (prompts["prompt"][:], judged["prompt"][:]) == (["a", "c"], ["b", "d"])


def test_prompts_that_are_all_too_long_are_an_error() -> None:
    rows = Dataset.from_dict({"prompt": ["long ."] * 2})
    assert len(held_out.prompts_of(rows, ENCODER, 20, print)) == 1
    with pytest.raises(ValueError, match="--max_prompt_length 3"):
        held_out.prompts_of(rows, ENCODER, 3, print)
