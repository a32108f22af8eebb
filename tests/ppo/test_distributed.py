"""PPO-Max on two real processes (gloo, DistributedDataParallel): one run, not two that happen to share a folder."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.ppo import tiny
from tests.ppo.two_processes import GRADIENTS, TRAINING, gradient_options


@pytest.fixture(scope="module")
def ranks(world, tmp_path_factory, repo_root):
    """What two_processes.py found out on each of two processes."""
    folder = tmp_path_factory.mktemp("two_processes")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = str(Path(__file__).parent / "two_processes.py")
    process = subprocess.run(
        [*launch, script, str(world), str(folder)],
        cwd=repo_root,
        env=tiny.environment(repo_root),
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert process.returncode == 0, process.stderr[-5000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_of_two_halves_are_those_of_the_whole_on_one_process(world, tmp_path, ranks, name):
    options = GRADIENTS[name] | {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    whole = tiny.gradients(tiny.trainer(world, tmp_path, **gradient_options(options)), tiny.random_rollout())
    for rank in ranks:
        assert rank[name].keys() == whole.keys()
        for weight, gradient in whole.items():
            if gradient is None or rank[name][weight] is None:
                assert gradient is None and rank[name][weight] is None, weight
                continue
            torch.testing.assert_close(rank[name][weight], gradient, rtol=1e-5, atol=1e-6)
    critic = {name for name in whole if ".critic." in name or name.startswith("heads.")}
    for weight, gradient in whole.items():  # the comparison is not one of zeros
        trained = weight in critic or "warm-up" not in name
        assert (gradient is not None and bool(gradient.abs().max() > 1e-4)) == trained, weight


def test_both_processes_end_with_the_same_weights(ranks):
    assert [rank["wrapped"] for rank in ranks] == ["DistributedDataParallel"] * 2
    for role, weights in ranks[0]["weights"].items():
        assert tiny.same(weights, ranks[1]["weights"][role]), role
    assert not tiny.same(ranks[0]["start"], ranks[0]["weights"]["policy"])
    assert ranks[0]["next_random"] != ranks[1]["next_random"]  # each samples completions of its own


def test_moments_and_beta_are_of_all_processes_and_equal(ranks):
    states = [rank["state"] for rank in ranks]
    assert states[0] == states[1]
    # 3 rollouts of 4 micro-batches of 2 rows on 2 processes
    assert states[0]["moments"]["count"] == TRAINING["max_steps"] // 4 * 4 * 2 * 2
    assert states[0]["moments"]["mean"] > 5  # process 1 is paid 10 more for everything
    assert states[0]["kl"]["coef"] != 0.05


def test_logged_figures_are_of_all_processes(ranks):
    left, right = (tiny.comparable(rank["history"]) for rank in ranks)
    own = {"grad_norm"}  # logged by Trainer, the same up to rounding
    for x, y in zip(left, right, strict=True):
        assert {k: v for k, v in x.items() if k not in own} == {k: v for k, v in y.items() if k not in own}
    rollouts = [entry for entry in left if "reward" in entry]
    assert all(entry["rewards/rank_reward/mean"] > 5 for entry in rollouts)
    assert all(entry["rewards/rank_reward/std"] > 4 for entry in rollouts)
    evaluations = [entry for entry in left if "eval_reward" in entry]
    assert all(entry["eval_rewards/rank_reward/std"] > 4 for entry in evaluations)
    assert [entry["step"] for entry in evaluations] == [4, 8, 12]
