"""Scores and spread over a run: by hand, and by the command on a run's samples."""

import json

import pytest
import torch

from tests.ppo import tiny
from trl_ext.reward.shift import shift_over_run
from trl_ext.scripts import models, reward_shift


def test_mean_spread_shift_and_doubt_by_hand():
    first = torch.tensor([[1.0, -1.0], [3.0, 1.0], [1.0, -1.0], [3.0, 1.0]])  # means 0, 2, 0, 2; spreads 1
    later = torch.tensor([[6.0, 2.0]] * 4)  # means 4, spreads 2
    few = torch.tensor([[9.0, 9.0]])
    gold = torch.tensor([1.0] * 4 + [0.5, 0.5, float("nan"), float("nan")] + [0.0])
    course = shift_over_run([0] * 4 + [8] * 4 + [9], torch.cat([first, later, few]), gold)
    assert [moment["step"] for moment in course] == [0, 8]
    assert course[0] == {
        "step": 0, "count": 4, "mean": 1.0, "std": 1.0, "spread": 1.0, "gold": 1.0, "shift": 0.0, "doubt": 1.0,
    }  # fmt: skip
    assert (course[1]["shift"], course[1]["doubt"], course[1]["gold"]) == (3.0, 2.0, 0.5)
    with pytest.raises(ValueError, match="at least two reward models"):
        shift_over_run([0] * 4, first[:, :1])
    with pytest.raises(ValueError, match="no moment of the run has 4 samples"):
        shift_over_run([0], few)


def test_the_samples_of_a_run_are_scored_in_parts(tmp_path, monkeypatch):
    moved, load = [], models.load_base

    def watched(*args, **options):
        base = load(*args, **options)
        base.to = lambda device: moved.append(device) or base
        return base

    monkeypatch.setattr(models, "load_base", watched)
    world, run = tiny.build(tmp_path / "world"), tmp_path / "run"
    run.mkdir()
    rows = [
        {"kind": "training", "step": 4 * (i // 4), "prompt": f"w{i % 6}", "completion": f" w{i % 5} w{i % 7}"}
        | {"rewards": {"gold_reward": float(i)}}
        for i in range(32)
    ]
    (run / "metrics.jsonl").write_text("")
    (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    adapters = [str(world / "reward")] * 2
    flags = [f"--run={run}", f"--model_name_or_path={world / 'base'}", "--moments=2", "--reward_adapter", *adapters]
    reward_shift.main(flags)
    assert moved == [models.PartialState().device]
    course = json.loads((run / "reward_shift.json").read_text())["course"]
    assert [(moment["step"], moment["count"]) for moment in course] == [(0, 16), (16, 16)]
    assert course[0]["spread"] == 0  # the same adapter twice
    assert course[1]["gold"] == sum(range(16, 32)) / 16
    assert (run / "reward_shift.png").is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--run is missing"),
        (["--run=RUN"], "at least two are needed"),
        (["--run=RUN", "--reward_adapter", "a", "b", "--kind=all"], "--kind all is unknown"),
        (["--run=RUN", "--reward_adapter", "a", "b", "--kind=evaluation", "--moments=3"], "--moments: evaluations"),
    ],
)
def test_what_shift_cannot_honour_is_refused(flags, message, tmp_path):
    (tmp_path / "samples.jsonl").write_text("")
    with pytest.raises(ValueError, match=message):
        reward_shift.parse([flag.replace("RUN", str(tmp_path)) for flag in flags])


def test_a_run_that_is_not_there_is_refused_when_it_is_read(tmp_path):
    recipe, _, _ = reward_shift.parse([f"--run={tmp_path / 'run'}", "--reward_adapter", "a", "b"])
    with pytest.raises(ValueError, match=r"name the folder of a run, with samples\.jsonl"):
        reward_shift.samples_of(recipe)
