"""What a run writes down, also one that was killed and went on; by one process."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import TrainerCallback

from tests.ppo import tiny
from trl_ext.report import machine
from trl_ext.report.lines import as_json, read_lines
from trl_ext.report.recorder import RunRecorder, of_this_run
from trl_ext.report.samples import latest_of

ROLLOUTS = {"num_iterations": 2, "steps_per_generation": 2, "per_device_train_batch_size": 2}


class KilledError(Exception):
    pass


class KillAfter(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KilledError


def metrics_of(folder: Path) -> list[dict]:
    return read_lines(folder / "metrics.jsonl")[0]


def run_of(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def assert_one_line_for_each_entry(folder: Path, history: list[dict]) -> None:
    lines = metrics_of(folder)
    assert [line["entry"] for line in lines] == list(range(len(history)))
    for line, entry in zip(lines, history, strict=True):
        expected = json.loads(as_json(entry))
        assert {name: line[name] for name in expected} == expected


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """A run of three rollouts, evaluated before and after, without and with a report."""
    folder = tmp_path_factory.mktemp("finished")
    options = {"reward_funcs": tiny.count_words, "eval_dataset": tiny.prompts(10), "write_report": True}
    trainer = tiny.trainer(world, folder, max_steps=12, eval_on_start=True, **ROLLOUTS | options)
    trainer.train()
    trainer.evaluate()
    return trainer


def test_every_log_entry_has_its_line(finished):
    assert_one_line_for_each_entry(Path(finished.args.output_dir), finished.state.log_history)
    times = [line["time"] for line in metrics_of(Path(finished.args.output_dir))]
    assert times == sorted(times)


def test_the_samples_before_and_after_are_of_the_same_prompts_with_their_figures(finished):
    samples, broken = read_lines(Path(finished.args.output_dir) / "samples.jsonl")
    assert not broken
    by_step = latest_of(samples)
    assert list(by_step) == [0, 12]
    assert list(by_step[0]) == list(by_step[12])
    assert len(by_step[0]) == 10
    before = next(row for row in finished.state.log_history if "eval_reward" in row)
    rows = list(by_step[0].values())
    for key, name in (("reward", "eval_reward"), ("kl", "eval_kl")):
        # in batches of 4, 4 and 2: the mean is over rows
        assert sum(row[key] for row in rows) / 10 == pytest.approx(before[name], abs=1e-5)
    assert all(set(row["rewards"]) == {"count_words", "reward_role"} for row in rows)
    assert all(row["rewards"]["count_words"] == len(row["completion"].split()) for row in rows)
    assert all(row["kl"] == pytest.approx(row["reference_nll"] - row["nll"]) for row in rows)


def test_some_completions_of_the_training_are_kept_alike_with_the_same_seed(finished, world, tmp_path):
    def kept(folder):
        return [row for row in read_lines(Path(folder) / "samples.jsonl")[0] if row["kind"] == "training"]

    rows = kept(finished.args.output_dir)
    assert sorted({row["step"] for row in rows}) == [0, 4, 8]
    assert all({"prompt", "completion", "reward", "kl"} <= set(row) for row in rows)
    options = {"reward_funcs": tiny.count_words, "eval_dataset": tiny.prompts(10)}
    tiny.trainer(world, tmp_path, max_steps=12, eval_on_start=True, **ROLLOUTS | options).train()
    assert kept(tmp_path) == rows


def test_run_json_says_what_was_run(finished):
    info = run_of(Path(finished.args.output_dir))
    assert info["outcome"] == "finished"
    assert info["method"] == "PPO-Max"
    assert info["steps"] == {"planned": 12, "done": 12}
    assert info["seed"] == finished.args.seed
    assert info["configuration"]["num_iterations"] == 2
    assert info["configuration"]["learning_rate"] == 1e-2
    assert info["defaults"]["learning_rate"] == 1e-4
    assert info["identity"]["rows of train_dataset"] == 8
    assert {"reward adapter", "reference adapter"} <= set(info["identity"])
    assert {"torch", "trl", "transformers", "python"} <= set(info["versions"])
    assert info["hardware"]["device"] == "cpu"
    assert info["memory"]["measured_gib"] > 0
    assert info["ended"] >= info["started"]


def test_the_report_is_there_at_the_end_and_knows_the_evaluation_after_training(finished):
    page = (Path(finished.args.output_dir) / "report.html").read_text()
    assert "10 held-out prompts at step 0 and at step 12" in page
    assert (Path(finished.args.output_dir) / "learning_curve.png").stat().st_size > 1000


def test_a_run_that_was_killed_and_went_on_has_the_lines_of_one_that_was_not(world, tmp_path):
    options = ROLLOUTS | {"save_strategy": "steps", "save_steps": 4, "max_steps": 12}
    options |= {"eval_dataset": tiny.prompts(4), "eval_on_start": True}
    with pytest.raises(KilledError):
        tiny.trainer(world, tmp_path, callbacks=[KillAfter(6)], **options).train()
    assert [line["step"] for line in metrics_of(tmp_path)][-1] == 6
    assert run_of(tmp_path)["outcome"] == "failed"
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"entry": 7, "step": 7, "rewa')  # as a process that dies leaves it
    options["eval_on_start"] = False  # as the recipe does
    resumed = tiny.trainer(world, tmp_path, **options)
    resumed.train(resume_from_checkpoint=True)
    assert_one_line_for_each_entry(tmp_path, resumed.state.log_history)
    assert all("time" in line for line in metrics_of(tmp_path))  # none had to be written anew
    samples, broken = read_lines(tmp_path / "samples.jsonl")
    assert not broken
    steps = [row["step"] for row in samples if row["kind"] == "training"]
    assert steps == sorted(steps)
    assert set(steps) == {0, 4, 8}
    assert len({(row["step"], row["completion"], row["prompt"]) for row in samples if row["step"] == 4}) <= 4
    info = run_of(tmp_path)
    assert [(s["from_step"], s["outcome"]) for s in info["sessions"]] == [(0, "failed"), (4, "finished")]
    assert info["started"] == info["sessions"][0]["started"]


def test_lines_that_are_lost_are_written_anew_from_the_log_of_the_checkpoint():
    history = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": math.nan}, {"step": 2, "eval_loss": 3.0}]
    lines = [{"entry": None, "step": 0, "a": 1}, {"entry": 0, "step": 1, "time": 5.0, "loss": 1.0}]
    lines += [{"entry": 3, "step": 3, "loss": 9.0}]
    assert of_this_run(lines, history) == [
        {"entry": None, "step": 0, "a": 1},
        {"entry": 0, "step": 1, "time": 5.0, "loss": 1.0},
        {"entry": 1, "step": 2, "loss": None},
        {"entry": 2, "step": 2, "eval_loss": 3.0},
    ]


def test_a_new_run_in_a_used_folder_keeps_the_old_lines_aside(world, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"entry": 0, "step": 1, "loss": 7.0}\n')
    tiny.trainer(world, tmp_path).train()
    assert (tmp_path / "metrics.jsonl.old").read_text() == '{"entry": 0, "step": 1, "loss": 7.0}\n'
    assert all(line.get("loss") != 7.0 for line in metrics_of(tmp_path))


def test_what_is_not_finite_is_null_and_texts_stay_on_one_line():
    hostile = "a\u2028b\x85c\ud800\n<script>[INST]"
    text = as_json({"nan": math.nan, "inf": [math.inf], "text": hostile})
    assert len(text.splitlines()) == 1
    assert json.loads(text, parse_constant=pytest.fail) == {"nan": None, "inf": [None], "text": hostile}
    text.encode()


def test_the_guard_s_alarms_stand_in_the_lines_once(tmp_path):
    alarms = [{"step": 3, "alarm": "kl_high", "seen": "KL 12", "act": None}]
    args = tiny.config(tmp_path)
    recorder = RunRecorder(args, "PPO-Max", "base", dict, lambda: {"alarms": alarms, "stopped": None})
    state = SimpleNamespace(global_step=0, max_steps=8, log_history=[], is_world_process_zero=True)
    recorder.on_train_begin(args, state, None)
    for step in (3, 4, 5):
        state.global_step = step
        state.log_history.append({"step": step})
        if step == 5:
            alarms.append({"step": 5, "alarm": "kl_high", "seen": "KL 14", "act": "raise_beta"})
        recorder.on_log(args, state, None, logs={"kl": 1.0})
    told = [[alarm["step"] for alarm in line.get("alarms", [])] for line in metrics_of(tmp_path)]
    assert told == [[3], [], [5]]
    # gone on from step 4: the alarm of step 5 will be told again
    state.log_history, state.global_step = state.log_history[:2], 4
    again = RunRecorder(args, "PPO-Max", "base", dict, lambda: {"alarms": alarms, "stopped": None})
    again.on_train_begin(args, state, None)
    state.log_history.append({"step": 5})
    state.global_step = 5
    again.on_log(args, state, None, logs={"kl": 1.0})
    assert [[a["step"] for a in line.get("alarms", [])] for line in metrics_of(tmp_path)] == [[3], [], [5]]


def test_a_second_process_writes_nothing(tmp_path):
    args = SimpleNamespace(process_index=1, output_dir=str(tmp_path), write_report=True)
    recorder = RunRecorder(args, "PPO-Max", "base", dict)
    state = SimpleNamespace(global_step=0, max_steps=8, log_history=[{"step": 1}])
    recorder.on_train_begin(args, state, None)
    recorder.on_log(args, state, None, logs={"kl": 1.0})
    recorder.evaluated([{"prompt": "a", "completion": "b"}])
    recorder.on_evaluate(args, state, None)
    recorder.sampled(lambda rows: pytest.fail("it was asked for"), 4, 0, 1)
    recorder.failed(ValueError(), 1)
    recorder.on_train_end(args, state, None)
    assert not list(tmp_path.iterdir())


def test_a_trainer_that_is_never_trained_leaves_the_files_of_a_run_alone(world, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"entry": 0, "step": 1, "loss": 7.0}\n')
    tiny.trainer(world, tmp_path, eval_dataset=tiny.prompts(4)).evaluate()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert len(metrics_of(tmp_path)) == 1


def test_an_error_in_training_is_written_down(world, tmp_path):
    def broken(completions, **kwargs):
        raise OSError("the judge is asleep")

    with pytest.raises(OSError, match="asleep"):
        tiny.trainer(world, tmp_path, reward_funcs=broken).train()
    info = run_of(tmp_path)
    assert info["outcome"] == "failed"
    assert "the judge is asleep" in info["why"]


def test_a_report_that_cannot_be_written_loses_no_run(world, tmp_path, monkeypatch, caplog):
    def fail(*args):
        raise ValueError("no ink")

    monkeypatch.setattr("trl_ext.report.page.write_page", fail)
    tiny.trainer(world, tmp_path, write_report=True).train()
    assert "no ink" in caplog.text
    assert "trl-ext report" in caplog.text
    assert run_of(tmp_path)["outcome"] == "finished"


def test_samples_on_the_way_change_nothing_in_the_run(world, tmp_path):
    def run(folder, keep):
        trainer = tiny.trainer(world, folder, max_steps=8, **ROLLOUTS)

        class Keep(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if keep and state.global_step == 4:
                    from trl_ext.scripts.running import seeded

                    with seeded(args.seed):
                        trainer.complete_and_keep([{"prompt": "w1 w2"}, {"prompt": "w3"}])

        trainer.add_callback(Keep())
        trainer.train()
        return trainer

    plain, watched = run(tmp_path / "plain", False), run(tmp_path / "watched", True)
    assert tiny.comparable(plain.state.log_history[:-1]) == tiny.comparable(watched.state.log_history[:-1])
    rows = [row for row in read_lines(tmp_path / "watched" / "samples.jsonl")[0] if row["kind"] == "evaluation"]
    assert [(row["step"], row["part"], row["prompt"]) for row in rows] == [(4, True, "w1 w2"), (4, True, "w3")]


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["/venv/bin/trl-ext", "ppo-max", "--seed=1"], "trl-ext ppo-max --seed=1"),
        (["/x/trl_ext/__main__.py", "rrhf"], f"{Path(sys.executable).name} -m trl_ext rrhf"),
        (["train.py", "--hub_token", "s"], f"{Path(sys.executable).name} train.py --hub_token ..."),
    ],
)
def test_a_command_is_shown_as_it_was_typed(monkeypatch, arguments: list[str], shown: str) -> None:
    monkeypatch.setattr(sys, "argv", arguments)
    assert machine.this_command() == shown
