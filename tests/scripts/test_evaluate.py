"""`trl-ext evaluate` and `trl-ext compare`: what they take from a run, what they refuse, what they write."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset
from safetensors.torch import load_file, save_file

from tests.ppo import tiny
from tests.report.made import write_run
from trl_ext import scoring
from trl_ext.report.lines import as_json
from trl_ext.run_identity import data_facts
from trl_ext.scripts import compare
from trl_ext.scripts import evaluate_policy as evaluate
from trl_ext.scripts.evaluating import fill_from_run, is_run, make_setting
from trl_ext.scripts.finished_runs import in_world
from trl_ext.scripts.inputs import hold_out
from trl_ext.scripts.prompts_to_answer import choose_prompts, seen_in_training
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
    names = compare.names_of(["x/a", "y/a", "b", "reference"])
    assert names == ["x/a", "y/a", "b", str(Path("reference").resolve())], "another name than the reference has"


def test_a_configuration_of_a_training_may_be_given_for_its_base(run: Path) -> None:
    _, model_args, _ = parsed("--policy_adapter", str(run), "--config", "qlora_8b")
    assert model_args.load_in_4bit


def test_an_evaluation_is_of_the_prompts_that_were_held_out_and_the_same_twice(
    run: Path, tmp_path: Path, capsys
) -> None:
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
    printed = capsys.readouterr().out
    assert f"prompts.jsonl that {run} held out of its training, by a hash.\n" in printed
    assert "10 prompts; below" in printed
    assert figures[0]["answered"].startswith("Prompts: those of ")


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


def test_a_run_without_a_reference_started_from_the_base(run: Path, tmp_path: Path) -> None:
    fresh = tmp_path / "fresh"
    shutil.copytree(run, fresh)
    shutil.rmtree(fresh / "reference")
    with pytest.raises(ValueError, match=r"fresh started from another policy than .*run"):
        compare.check_same_start([str(run), str(fresh)], str(run / "reference"))
    with pytest.raises(ValueError, match=r"run started from another policy than .*fresh"):
        compare.check_same_start([str(fresh), str(run)], None)
    compare.check_same_start([str(fresh), "me/on-the-hub"], None)


def changed(run: Path, name: str, **options) -> str:
    """The same run beside it, with other options."""
    folder = run.parent / name
    shutil.copytree(run, folder)
    info = json.loads((run / "run.json").read_text())
    info["options"] |= options
    (folder / "run.json").write_text(json.dumps(info))
    return str(folder)


def write_prompts(path: Path, *texts: str) -> str:
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return str(path)


def test_a_policy_that_was_trained_on_the_prompts_is_refused(run: Path, tmp_path: Path) -> None:
    test = write_prompts(tmp_path / "test.jsonl", "new")
    recipe, model_args, given = parsed("--policy_adapter", str(run))
    fill_from_run(recipe, model_args, given, str(run))
    held_out = hold_out(Dataset.from_dict({"prompt": PROMPTS}))[1]["prompt"][:]
    same, gone = changed(run, "same"), changed(run, "gone", dataset_name=str(tmp_path / "gone.jsonl"))
    nameless = changed(run, "w", dataset_name=None)
    notes = seen_in_training([str(run), same, gone, "me/hub", nameless], recipe, held_out)
    assert [note.split(": ")[1].split()[0] for note in notes] == [str(tmp_path / "gone.jsonl"), "it", "its"]
    greedy = changed(run, "greedy", dataset_test_name=test)
    with pytest.raises(ValueError, match=r"greedy was trained on 10 of the 10 prompts"):
        seen_in_training([str(run), greedy], recipe, held_out)
    recipe.dataset_test_name = str(tmp_path / "prompts.jsonl")
    with pytest.raises(ValueError, match=r"run was trained on 90 of the 100 prompts"):
        seen_in_training([str(run), greedy], recipe, PROMPTS)
    # alone it is beside nobody who was not
    assert seen_in_training([greedy], recipe, PROMPTS) == [f"{greedy} was trained on 100 of the 100 prompts."]


def chosen(adapter: str, *flags: str):
    """What an evaluation answers, what it says of that, and what it knows of the training."""
    recipe, model_args, given = parsed("--policy_adapter", adapter, *flags)
    known = fill_from_run(recipe, model_args, given, adapter)
    found = choose_prompts(recipe, known, adapter, Path("base"))
    prompts = found.prompts["prompt"][:]
    return prompts, found.said, seen_in_training([adapter], recipe, prompts)


def test_an_evaluation_takes_the_prompts_of_the_run_s_own_split_and_says_so(run: Path, tmp_path: Path) -> None:
    data = str(tmp_path / "prompts.jsonl")
    held_out = hold_out(Dataset.from_dict({"prompt": PROMPTS}))[1]["prompt"][:]
    by_hash = (held_out, f"Prompts: those of {data} that {run} held out of its training, by a hash.", [])
    assert chosen(str(run)) == chosen(str(run), f"--dataset_name={data}") == by_hash

    test = write_prompts(tmp_path / "test.jsonl", "new", "newer", PROMPTS[0])
    own = changed(run, "own", dataset_test_name=test)
    trained = [f"{own} was trained on 1 of the 3 prompts."]
    tested = (["new", "newer", PROMPTS[0]], f"Prompts: {test}, on which {own} was evaluated.", trained)
    assert chosen(own) == chosen(own, f"--dataset_name={data}") == tested

    few = write_prompts(tmp_path / "few.jsonl", "a", "b")
    few_run = changed(run, "few", dataset_name=few)
    said = f"Prompts: all of {few}, which has too few to hold some out."
    assert chosen(few_run) == (["a", "b"], said, [f"{few_run} was trained on 2 of the 2 prompts."])


def test_prompts_of_other_data_are_not_called_held_out(run: Path, tmp_path: Path, monkeypatch) -> None:
    other = write_prompts(tmp_path / "other.jsonl", *(f"other {i}" for i in range(30)))
    assert chosen(str(run), f"--dataset_test_name={other}")[1:] == (f"Prompts: {other}.", [])
    monkeypatch.chdir(tmp_path)
    prompts, said, notes = chosen("me/hub", "--dataset_name=other.jsonl")
    assert len(prompts) == 3
    assert (
        said == f"Prompts: a tenth of those of {other}, drawn by a hash. --dataset_test_name {other} takes all of them."
    )
    assert notes == ["Whether me/hub was trained on these prompts is not known: it is of no run."]
    assert len(chosen("me/hub", f"--dataset_test_name={other}")[0]) == 30


def test_what_a_run_has_written_down_is_answered_where_its_data_is_not_named_or_has_changed(
    run: Path, tmp_path: Path
) -> None:
    nameless = changed(run, "nameless", dataset_name=None)
    with pytest.raises(ValueError, match=r"--dataset_test_name is missing: .*nameless names none and has written"):
        chosen(nameless)
    held_out = hold_out(Dataset.from_dict({"prompt": PROMPTS}))[1]["prompt"][:]
    lines = [{"kind": "evaluation", "step": 4, "key": str(i), "prompt": text} for i, text in enumerate(held_out)]
    for folder in (Path(nameless), run):
        (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prompts, said, notes = chosen(nameless)
    assert (prompts, said) == (held_out, f"Prompts: those that {nameless} was evaluated on, as it has them.")
    assert notes == [f"Whether {nameless} was trained on these prompts is not known: its run names no prompts."]

    assert chosen(str(run))[1].endswith("held out of its training, by a hash.")
    write_prompts(tmp_path / "prompts.jsonl", *PROMPTS[40:])
    prompts, said, notes = chosen(str(run))
    assert (prompts, notes) == (held_out, [])
    assert said.endswith("prompts.jsonl has changed since, and would hold out others.")


def test_data_that_has_grown_is_not_taken_for_what_the_run_held_out(run: Path) -> None:
    rows, test = hold_out(Dataset.from_dict({"prompt": PROMPTS}))
    lines = [{"kind": "evaluation", "step": 4, "key": "0", "prompt": test["prompt"][0]}]
    lines += [{"kind": "evaluation", "step": 8, "key": "0", "prompt": PROMPTS[0], "part": True}]
    (run / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    info = json.loads((run / "run.json").read_text()) | {"method": "PPO-Max"}
    for content, said in ((rows, "by a hash."), (rows.select(range(9)), "would hold out others.")):
        info["identity"] = data_facts("train_dataset", content)
        (run / "run.json").write_text(json.dumps(info))
        assert chosen(str(run))[1].endswith(said)
    assert chosen(str(run))[0] == test["prompt"][:1]  # of the whole evaluation


def test_a_test_set_that_is_named_takes_the_place_of_the_embedded_world() -> None:
    known = {"world_scale": 1.0, "model_name_or_path": None}
    names = {"dataset_name": None, "dataset_test_name": None, "dataset_test_split": None}
    assert in_world(known, SimpleNamespace(**names))
    for name in names:
        assert not in_world(known, SimpleNamespace(**names | {name: "x"}))


def test_the_reward_of_a_run_is_taken_with_its_weights_and_in_its_order(run: Path) -> None:
    for number in (2, 10, 9):
        shutil.copytree(run / "reward", run / f"reward_{number}")
    info = json.loads((run / "run.json").read_text())
    info["configuration"] |= {"reward_ensemble_weights": [3.0, 1.0, 1.0, 1.0], "reward_role_weight": 2.0}
    (run / "run.json").write_text(json.dumps(info))
    recipe, model_args, given = parsed("--policy_adapter", str(run))
    fill_from_run(recipe, model_args, given, str(run))
    names = [Path(each).name for each in recipe.reward_adapter]
    assert names == ["reward", "reward_2", "reward_9", "reward_10"]
    assert (recipe.ensemble_weights, recipe.reward_role_weight) == ([3.0, 1.0, 1.0, 1.0], 2.0)
    recipe, model_args, given = parsed("--policy_adapter", str(run), "--reward_role_weight=5")
    fill_from_run(recipe, model_args, given, str(run))
    assert recipe.reward_role_weight == 5
    flags = parsed("--policy_adapter", str(run), "--ensemble_weights", "1", "2")
    with pytest.raises(ValueError, match="2 ensemble weights for 4 reward models"):
        make_setting(*flags, str(run), print)


def test_a_folder_that_is_called_reference_is_a_policy_and_weights_reach_the_score(
    run: Path, tmp_path: Path, monkeypatch
) -> None:
    """And what an evaluation writes is not written over the run."""
    tuned = tmp_path / "x" / "reference"
    shutil.copytree(run, tuned)
    shutil.copytree(run / "reward", tuned / "reward_2")
    weights = load_file(tuned / "adapter_model.safetensors")
    save_file({key: 3 * value for key, value in weights.items()}, tuned / "adapter_model.safetensors")
    info = json.loads((run / "run.json").read_text())
    info["configuration"] |= {"reward_ensemble_weights": [3.0, 1.0], "reward_role_weight": 2.0}
    (tuned / "run.json").write_text(json.dumps(info))
    scorers, scorer = [], scoring.ResponseScorer
    monkeypatch.setattr(scoring, "ResponseScorer", lambda *a, **k: scorers.append(k) or scorer(*a, **k))
    evaluate.main(["--policy_adapter", str(tuned), "--output_dir", str(tmp_path / "out"), "--eval_prompts=3"])
    record = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert list(record["policies"]) == ["reference", str(tuned)]
    assert record["policies"][str(tuned)]["KL from the reference, nats"]["mean"] > 0.01
    assert [(each["ensemble_weights"], each["role_weight"]) for each in scorers] == [([3.0, 1.0], 2.0)] * 2
    with pytest.raises(ValueError, match="is the folder of a run, whose samples would be lost"):
        evaluate.main(["--policy_adapter", str(tuned), "--output_dir", str(tuned)])
    with pytest.raises(ValueError, match="is the folder of a run"):
        compare.main([str(tuned), str(run), "--output_dir", str(run)])


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
