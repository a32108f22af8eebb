"""Data and reward functions by name: what is wrong is a sentence, before a model is loaded."""

import json
import re
import sys
from pathlib import Path

import pytest
from datasets import Dataset

from trl_ext.scripts import ppo_max, reward_model, rrhf
from trl_ext.scripts.arguments import PromptArguments
from trl_ext.scripts.inputs import (
    first_prompts,
    hold_out,
    load_preference_splits,
    load_prompts,
    load_reward_function,
)

REWARD = "def length(completions, **kwargs):\n    return [float(len(c)) for c in completions]\n"
PAIRS = [{"prompt": f"p{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(20)]


def write(path: Path, rows) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


# ---------------------------------------------------------------------- reward functions


@pytest.mark.parametrize("name", ["torch", "json", "common", "trl_ext"])
def test_a_reward_file_replaces_no_module(tmp_path: Path, name: str) -> None:
    before = sys.modules.get(name)
    (tmp_path / f"{name}.py").write_text(REWARD)
    function = load_reward_function(f"{tmp_path / name}.py:length")
    assert function(completions=["ab"]) == [2.0]
    assert sys.modules.get(name) is before
    assert sys.modules[function.__module__].length is function  # can be pickled, and looked up


def test_two_files_of_one_name_are_two_modules(tmp_path: Path) -> None:
    for folder, value in (("a", 1.0), ("b", 2.0)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "r.py").write_text(f"def f(completions, **kwargs):\n    return [{value}]\n")
    functions = [load_reward_function(f"{tmp_path / folder / 'r.py'}:f") for folder in ("a", "b")]
    assert [f(completions=["x"]) for f in functions] == [[1.0], [2.0]]


def test_a_file_without_a_function_is_told_what_it_has(tmp_path: Path) -> None:
    path = tmp_path / "ok.py"
    path.write_text(REWARD)
    with pytest.raises(ValueError, match=r"ok\.py: name the function too, .*it has length"):
        load_reward_function(str(path))
    with pytest.raises(ValueError, match="has no function 'other', only length"):
        load_reward_function(f"{path}:other")
    path = tmp_path / "broken.py"
    path.write_text("import no_such_module_at_all\n")
    with pytest.raises(ValueError, match="cannot be imported: ModuleNotFoundError"):
        load_reward_function(f"{path}:f")
    assert load_reward_function("someone/model") == "someone/model"


# ---------------------------------------------------------------------- prompts


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompts": "a"}], "no column 'prompt', only ['prompts']. Rename 'prompts'"),
        ([{"question": "a", "completions": "b"}], "Rename 'question'"),
        ([{"prompt": ""}], "row 0 has an empty prompt"),
        ([{"prompt": 3}], "row 0: the prompt is 3, a int"),
        ([{"prompt": {"role": "user"}}], "row 0: the prompt is {'role': 'user'}"),
        ([{"prompt": ["a", "b"]}], "message 0 of the prompt is 'a'"),
        ([{"prompt": [{"content": "a"}]}], "needs a role"),
        ([{"prompt": [{"role": "user"}]}], "needs a role"),
        ([{"prompt": "a"}, {"prompt": [{"role": "user", "content": "b"}]}], "mixes texts and conversations"),
    ],
)
@pytest.mark.parametrize("recipe", [ppo_max, rrhf])
def test_rows_that_are_no_prompts_are_named_before_any_model_is_looked_for(
    recipe, rows, message: str, tmp_path: Path
) -> None:
    (tmp_path / "r.py").write_text(REWARD)
    data = write(tmp_path / "prompts.jsonl", rows)
    flags = ["--model_name_or_path=no/such-model", f"--dataset_name={data}", f"--output_dir={tmp_path / 'out'}"]
    with pytest.raises(ValueError, match=re.escape(message)):
        recipe.main([*flags, f"--reward_funcs={tmp_path / 'r.py'}:length"])


@pytest.mark.parametrize("recipe", [ppo_max, rrhf])
@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--dataset_test_split=test", "no split 'test'"),
        ("--eval_prompts=0", "--eval_prompts 0"),
        ("--reward_weights 1 2", "--reward_weights has 2 numbers"),
    ],
)
def test_flags_about_the_data_are_checked_before_any_model_is_looked_for(
    recipe, flag: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "r.py").write_text(REWARD)
    data = write(tmp_path / "prompts.jsonl", [{"prompt": "a"}])
    flags = ["--model_name_or_path=no/such-model", f"--dataset_name={data}", f"--output_dir={tmp_path / 'out'}"]
    with pytest.raises(ValueError, match=re.escape(message)):
        recipe.main([*flags, f"--reward_funcs={tmp_path / 'r.py'}:length", *flag.split()])


def test_the_evaluation_needs_a_prompt() -> None:
    dataset = Dataset.from_dict({"prompt": ["a", "b"]})
    assert len(first_prompts(dataset, 5)) == 2
    with pytest.raises(ValueError, match="at least 1"):
        first_prompts(dataset, 0)


def test_a_tenth_of_the_prompts_is_held_out_whatever_their_order_and_with_all_their_rows() -> None:
    prompts = [f"prompt {i % 50}" for i in range(100)]
    train, test = hold_out(Dataset.from_dict({"prompt": prompts, "n": list(range(100))}))
    assert not set(train["prompt"]) & set(test["prompt"])
    assert (len(train), len(test), len(set(test["prompt"]))) == (90, 10, 5)
    again = hold_out(Dataset.from_dict({"prompt": sorted(prompts)}))[1]
    assert set(again["prompt"]) == set(test["prompt"])
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    assert len(hold_out(Dataset.from_dict({"prompt": chats}))[1]) == 10


def test_a_run_is_evaluated_on_prompts_that_it_does_not_train_on_or_says_so(tmp_path: Path) -> None:
    said: list[str] = []

    def load(**flags):
        said.clear()
        return load_prompts(PromptArguments(**flags), said.append)

    many = write(tmp_path / "many.jsonl", [{"prompt": f"p{i}"} for i in range(40)])
    train, test = load(dataset_name=many)
    assert (len(train), len(test)) == (36, 4)
    assert said == ["Evaluation: 4 rows held out, by a hash of the prompt; 36 are trained on."]

    few = write(tmp_path / "few.jsonl", [{"prompt": f"p{i}"} for i in range(9)])
    train, test = load(dataset_name=few)
    assert len(train) == len(test) == 9
    assert said == [f"Evaluation: on prompts that are trained on too; {few} has too few to hold some out."]

    others = write(tmp_path / "others.jsonl", [{"prompt": f"p{i}"} for i in range(30, 50)])
    train, test = load(dataset_name=many, dataset_test_name=others)
    assert (len(train), len(test)) == (40, 20)
    assert said == [f"Evaluation: 10 of the 20 prompts of {others} are trained on too."]

    assert len(load(dataset_name=many, dataset_test_split="train")[1]) == 40
    assert said == [f"Evaluation: 40 of the 40 prompts of {many} are trained on too."]


# ---------------------------------------------------------------------- preferences


def preferences(**flags):
    arguments = [f"--{name}={value}" for name, value in flags.items()]
    return reward_model.parse(["--model_name_or_path=m", "--output_dir=x", *arguments])[0]


def test_one_file_is_not_read_twice_as_training_and_as_test_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", PAIRS)
    with pytest.raises(ValueError, match="no split 'test'"):
        load_preference_splits(preferences(dataset_name=path, dataset_test_split="test"), 0)
    with pytest.raises(ValueError, match="every training row is in the test set"):
        load_preference_splits(preferences(dataset_name=path, dataset_test_name=path), 0)
    train, test = load_preference_splits(preferences(dataset_name=path), 0)
    assert (len(train), len(test)) == (18, 2)


def test_a_trainer_keeps_rows_whose_strength_is_a_word(tmp_path: Path) -> None:
    from trl_ext import RewardModelConfig
    from trl_ext.reward.data import tokenize_preferences
    from trl_ext.text import TextEncoder
    from trl_ext.toy import build_tokenizer

    rows = [
        {"prompt": "one day", "chosen": " she fell", "rejected": " he fell", "strength": word}
        for word in ("clear", "slight")
    ]
    settings = RewardModelConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    kept, report = tokenize_preferences(Dataset.from_list(rows), TextEncoder(build_tokenizer()), settings, "rows")
    assert (len(kept), report.rows_kept) == (2, 2)


def test_test_rows_may_be_in_a_file_of_their_own(tmp_path: Path) -> None:
    train_path, test_path = write(tmp_path / "a.jsonl", PAIRS[:15]), write(tmp_path / "b.jsonl", PAIRS[15:])
    train, test = load_preference_splits(preferences(dataset_name=train_path, dataset_test_name=test_path), 0)
    assert (len(train), len(test)) == (15, 5)
