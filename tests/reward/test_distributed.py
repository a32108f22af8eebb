"""Two real processes (gloo, DistributedDataParallel) train the reward model that one process trains."""

from pathlib import Path

import pytest
import torch

from tests.ppo import tiny
from tests.processes import run_script
from tests.reward import two_processes

pytestmark = pytest.mark.slow  # PPO's run by default, and so does its whole recipe


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory):
    """Where two_processes.py has left what it found on each of two processes, and the adapter."""
    folder = tmp_path_factory.mktemp("two_processes")
    done = run_script(Path(two_processes.__file__), base, folder, processes=2, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory):
    return two_processes.run(base, tmp_path_factory.mktemp("alone"), 1)


def test_both_processes_end_with_the_same_and_it_is_what_one_process_makes(ranks, alone):
    assert [rank["wrapped"] for rank in ranks] == ["DistributedDataParallel"] * 2
    assert tiny.same(ranks[0]["weights"], ranks[1]["weights"])
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(ranks[0]["weights"][name], weight, rtol=0, atol=1e-3, msg=lambda t, n=name: n + t)


def test_logs_and_evaluation_are_of_all_processes(ranks, alone):
    assert ranks[0]["history"] == ranks[1]["history"]
    assert len(alone["history"]) == len(ranks[0]["history"]) == 6
    *steps, (two, one) = zip(ranks[0]["history"], alone["history"], strict=True)
    for pair in steps:
        for name in ("loss", "accuracy", "margin", "loss/preference", "loss/centering", "min_reward", "max_reward"):
            assert pair[0][name] == pytest.approx(pair[1][name], abs=1e-4), name
    for name in ("eval_loss", "eval_accuracy", "eval_margin"):
        assert two[name] == pytest.approx(one[name], abs=1e-3), name


def test_scores_are_of_all_rows_in_order_on_every_process(ranks, alone):
    for rank in ranks:
        assert rank["scores"]["rows"].tolist() == list(range(10))
        for name in ("chosen", "rejected"):
            torch.testing.assert_close(rank["scores"][name], alone["scores"][name], rtol=0, atol=1e-3)
        assert rank["scale"] == ranks[0]["scale"]
        assert rank["scale"] == (
            pytest.approx(alone["scale"][0], abs=1e-3),
            pytest.approx(alone["scale"][1], abs=1e-3),
            10,
        )


def test_the_adapter_is_written_once_and_whole(folder):
    names = {path.name for path in (folder / "run").iterdir()}
    assert {"adapter_model.safetensors", "reward_scale.json", "README.md"} <= names


def test_an_evaluation_before_training_leaves_training_one_run_on_both_processes(ranks):
    (left_kind, left), (right_kind, right) = (rank["evaluated first"] for rank in ranks)
    assert left_kind == right_kind == "DistributedDataParallel"
    assert tiny.same(left, right)
