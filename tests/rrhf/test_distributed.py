"""RRHF on two real processes (gloo, DistributedDataParallel): one run, not two."""

from pathlib import Path

import pytest
import torch

from tests.ppo import tiny
from tests.processes import run_script
from tests.rrhf.two_processes import WHOLE, run

pytestmark = pytest.mark.slow  # PPO's and the reward model's run by default


@pytest.fixture(scope="module")
def ranks(world, tmp_path_factory):
    """What two_processes.py found on each of two processes."""
    folder = tmp_path_factory.mktemp("two_processes")
    script = Path(__file__).parent / "two_processes.py"
    done = run_script(script, world, folder, processes=2, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr[-5000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]


def test_gradients_metrics_and_evaluation_of_two_halves_are_those_of_the_whole(world, tmp_path, ranks):
    whole = run(world, tmp_path, WHOLE | {"per_device_train_batch_size": 8})
    for rank in ranks:
        half = rank["half"]
        assert half["wrapped"] == "DistributedDataParallel"
        assert half["gradients"].keys() == whole["gradients"].keys()
        for name, gradient in whole["gradients"].items():
            torch.testing.assert_close(half["gradients"][name], gradient, rtol=1e-4, atol=1e-5)
        for name in ("rank_loss", "sft_loss", "kl_loss", "ranking_accuracy", "kendall_tau", "perplexity_best", "loss"):
            assert half["history"][0][name] == pytest.approx(whole["history"][0][name], rel=1e-4, abs=1e-6), name
        for name in ("ranking_accuracy", "kendall_tau", "perplexity_best"):
            expected = whole["evaluation"][f"eval_{name}"]
            assert half["evaluation"][f"eval_{name}"] == pytest.approx(expected, rel=1e-4), name
    assert max(gradient.abs().max() for gradient in whole["gradients"].values()) > 0.1


def test_both_processes_sample_for_themselves_and_end_with_the_same_weights(ranks):
    left, right = (rank["online"] for rank in ranks)
    assert tiny.same(left["weights"], right["weights"])
    assert left["history"] == right["history"]
    assert sum("reward" in entry for entry in left["history"]) == 3  # at steps 0, 2 and 4


def test_an_evaluation_before_training_leaves_training_one_run_on_both_processes(ranks):
    (left_kind, left), (right_kind, right) = (rank["evaluated first"] for rank in ranks)
    assert left_kind == right_kind == "DistributedDataParallel"
    assert tiny.same(left, right)
