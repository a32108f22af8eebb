"""`trl-ext evaluate` and `trl-ext compare`: what they take from a run, what they refuse, what they write."""

import json
import shutil
from pathlib import Path

import pytest

from tests.ppo import tiny
from tests.report.made import write_run
from trl_ext.report.lines import as_json
from trl_ext.scripts import compare
from trl_ext.scripts import evaluate_policy as evaluate
from trl_ext.scripts.evaluating import fill_from_run, is_run
from trl_ext.scripts.inputs import hold_out
from trl_ext.scripts.running import options_of


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return tiny.build(tmp_path_factory.mktemp("world"))


@pytest.fixture
def run(world: Path, tmp_path: Path) -> Path:
    """A folder as a run leaves it: the tuned policy, its reference and its reward model, with prompts of its own."""
    folder = tmp_path / "run"
    shutil.copytree(world / "policy", folder)
    for name, role in (("reference", "policy"), ("reward", "reward")):
        shutil.copytree(world / role, folder / name)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    options = {"model_name_or_path": str(world / "base"), "dataset_name": str(prompts), "dtype": "float32"}
    info = {"format": 1, "method": "PPO-Max", "options": options, "configuration": {"max_completion_length": 6}}
    (folder / "run.json").write_text(as_json(info))
    return folder


PROMPTS = [f"{'abcdefghij'[i % 10]} {'klmnopqrst'[i // 10]}" for i in range(100)]


def parsed(*flags: str):
    return evaluate.parse(list(flags))


def test_what_is_not_given_is_taken_from_the_run(run: Path) -> None:
    recipe, model_args, given = parsed("--policy_adapter", str(run))
    fill_from_run(recipe, model_args, given, str(run))
    assert model_args.model_name_or_path.endswith("base")
    assert recipe.dataset_name.endswith("prompts.jsonl")
    assert recipe.max_new_tokens == 6
    assert recipe.reference_adapter == str(run / "reference")
    assert recipe.reward_adapter == [str(run / "reward")]
    recipe, model_args, given = parsed("--policy_adapter", str(run), "--max_new_tokens=3", "--dataset_name=other")
    fill_from_run(recipe, model_args, given, str(run))
    assert (recipe.max_new_tokens, recipe.dataset_name) == (3, "other")


def test_files_of_reward_functions_are_run_only_where_a_flag_names_them(run: Path) -> None:
    info = json.loads((run / "run.json").read_text())
    info["options"]["reward_funcs"] = ["evil.py:reward"]
    (run / "run.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match=r"evil\.py:reward, which are run only where a flag names them"):
        fill_from_run(*parsed("--policy_adapter", str(run)), str(run))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--policy_adapter is missing"),
        (["--policy_adapter=x", "--lora_r=4"], "--lora_r: nothing is trained here"),
        (["--policy_adapter=x", "--eval_prompts=0"], "--eval_prompts 0: give at least 1"),
        (["--policy_adapter=x", "--chat_template_kwargs=[1]"], "give a JSON object"),
        (["--policy_adapter=x", "--chat_template_kwargs={"], "no JSON"),
        (["--policy_adapter=x", "--ensemble=best"], "--ensemble best: use one of mean"),
        (["--policy_adapter=x", "--learning_rate=1"], "--learning_rate=1: no such option"),
    ],
)
def test_what_cannot_be_honoured_is_refused(flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate.parse(flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["a"], "name at least two policies"),
        (["a", "a"], "a is named twice"),
        ([], "name at least two policies"),
    ],
)
def test_a_comparison_is_of_several(flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare.parse(flags)
    assert compare.parse(["a", "b", "--seed=1"])[0].policies == ["a", "b"]
    assert compare.names_of(["x/a", "y/a", "b", "reference"]) == ["x/a", "y/a", "b", "reference"]


def test_a_configuration_of_a_training_may_be_given_for_its_base(run: Path) -> None:
    _, model_args, _ = parsed("--policy_adapter", str(run), "--config", "qlora_8b")
    assert model_args.load_in_4bit


def test_an_evaluation_is_of_the_prompts_that_were_held_out_and_the_same_twice(
    run: Path, tmp_path: Path, capsys
) -> None:
    from datasets import Dataset

    figures = []
    for name in ("first", "second"):
        out = tmp_path / name
        evaluate.main(["--policy_adapter", str(run), "--output_dir", str(out)])
        assert {path.name for path in out.iterdir()} == {
            "evaluation.json", "evaluation.html", "evaluation.png", "samples.jsonl",
        }  # fmt: skip
        figures.append(json.loads((out / "evaluation.json").read_text()))
    lines = [json.loads(line) for line in (tmp_path / "first" / "samples.jsonl").read_text().split("\n")[:-1]]
    held_out = hold_out(Dataset.from_dict({"prompt": PROMPTS}))[1]["prompt"]
    assert [line["prompt"] for line in lines] == [*held_out, *held_out]
    assert (tmp_path / "second" / "samples.jsonl").read_text() == (tmp_path / "first" / "samples.jsonl").read_text()
    assert figures[0]["policies"] == figures[1]["policies"]
    # the tuned policy of this folder is its reference
    assert figures[0]["policies"]["run"]["KL from the reference, nats"]["mean"] == pytest.approx(0, abs=1e-5)
    assert figures[0]["changes"]["run from reference"]["reward"]["change"] == pytest.approx(0, abs=1e-5)
    assert figures[0]["policies"]["run"]["length, tokens"]["mean"] <= 6
    assert "10 held-out prompts" in capsys.readouterr().out


def test_finished_runs_are_compared_without_a_model(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(compare, "make_setting", None)
    runs = [str(write_run(tmp_path / name, prompts=12, seed=i)) for i, name in enumerate("ab")]
    compare.main([*runs, "--output_dir", str(tmp_path / "out")])
    record = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert list(record["policies"]) == ["reference", "a", "b"]
    assert "b from a" in record["changes"]
    assert "Difference from a, on the same prompts" in capsys.readouterr().out


def test_runs_from_different_starts_need_a_reference(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    compare.check_same_start([str(run), str(other)], str(run / "reference"))
    (other / "reference" / "adapter_model.safetensors").write_bytes(b"other")
    with pytest.raises(ValueError, match=r"other started from another policy than .*--reference_adapter"):
        compare.check_same_start([str(run), str(other)], str(run / "reference"))


def test_options_name_files_by_their_whole_path(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.py").write_text("")
    (tmp_path / "p.jsonl").write_text("")
    recipe, _, _ = parsed("--policy_adapter=x", "--reward_funcs", "r.py:f", "a/b", "--dataset_name=p.jsonl")
    found = options_of(recipe)
    assert found["reward_funcs"] == [f"{tmp_path / 'r.py'}:f", "a/b"]
    assert found["dataset_name"] == str(tmp_path / "p.jsonl")
    assert found["policy_adapter"] == "x"
    assert not is_run(str(tmp_path))
