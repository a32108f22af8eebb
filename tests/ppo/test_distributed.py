"""PPO-Max on two real processes (gloo, DistributedDataParallel): one run, not two that happen to share a folder."""

from pathlib import Path

import pytest
import torch

from tests.ppo import tiny
from tests.ppo.two_processes import GRADIENTS, gradient_options
from tests.processes import run_script


@pytest.fixture(scope="module")
def ranks(world, tmp_path_factory):
    """What two_processes.py found out on each of two processes."""
    folder = tmp_path_factory.mktemp("two_processes")
    script = Path(__file__).parent / "two_processes.py"
    done = run_script(script, world, folder, processes=2, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr[-5000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_of_two_halves_are_those_of_the_whole_on_one_process(world, tmp_path, ranks, name):
    options = GRADIENTS[name] | {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    whole = tiny.gradients(tiny.trainer(world, tmp_path, **gradient_options(options)), tiny.random_rollout())
    for rank in ranks:
        assert rank[name].keys() == whole.keys()
        for weight, gradient in whole.items():
            assert (gradient is None) == (rank[name][weight] is None), weight
            if gradient is not None:
                torch.testing.assert_close(rank[name][weight], gradient, rtol=1e-5, atol=1e-6)
    critic = {name for name in whole if ".critic." in name or name.startswith("heads.")}
    for weight, gradient in whole.items():  # the comparison is not one of zeros
        trained = weight in critic or "warm-up" not in name
        assert (gradient is not None and bool(gradient.abs().max() > 1e-4)) == trained, weight


@pytest.mark.parametrize("name", ["anew", "resting"])
def test_a_pass_that_is_made_anew_leaves_the_gradients_right(world, tmp_path, ranks, name):
    options = GRADIENTS["in warm-up" if name == "resting" else "accumulated"]
    options = options | {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    whole = tiny.gradients(tiny.trainer(world, tmp_path, **gradient_options(options)), tiny.random_rollout())
    for rank in ranks:
        for weight, gradient in whole.items():
            assert (gradient is None) == (rank[name][weight] is None), weight
            if gradient is not None:
                torch.testing.assert_close(rank[name][weight], gradient, rtol=1e-5, atol=1e-6)


def test_both_processes_shorten_an_update_alike(ranks):
    left, right = (rank["shortened"] for rank in ranks)
    assert left["history"] == right["history"]
    assert left["state"] == right["state"]
    assert min(entry.get("step/shortened/policy", 1.0) for entry in left["history"]) < 1
    for role, weights in left["weights"].items():
        assert all(weight.isfinite().all() for weight in weights.values())
        assert tiny.same(weights, right["weights"][role]), role


def test_both_processes_end_with_the_same_weights(ranks):
    assert [rank["wrapped"] for rank in ranks] == ["DistributedDataParallel"] * 2
    left, right = (rank["end"]["weights"] for rank in ranks)
    for role, weights in left.items():
        assert tiny.same(weights, right[role]), role
    assert not tiny.same(ranks[0]["start"], left["policy"])
    assert ranks[0]["next_random"] != ranks[1]["next_random"]  # each samples completions of its own


def test_an_evaluation_before_training_leaves_training_one_run_on_both_processes(ranks):
    left, right = (rank["evaluated first"] for rank in ranks)
    assert left["wrapped"] == right["wrapped"] == "DistributedDataParallel"
    assert tiny.same(left["weights"], right["weights"])
    assert [rank["on start"] for rank in ranks] == [[0, 2]] * 2


def test_moments_and_beta_are_of_all_processes_and_equal(ranks):
    states = [rank["end"]["state"] for rank in ranks]
    assert states[0] == states[1]
    # 3 rollouts of 4 micro-batches of 2 rows on 2 processes
    assert states[0]["moments"]["count"] == 3 * 4 * 2 * 2
    assert states[0]["moments"]["mean"] > 5  # process 1 is paid 10 more for everything
    # beta reacts to the KL of all 16 sequences, once warm-up is over: in the last rollout
    kl = [entry["kl"] for entry in ranks[0]["end"]["history"] if "kl" in entry][-1]
    assert ranks[0]["observed"] == ranks[1]["observed"] == [(kl, 16)]
    assert states[0]["kl"]["coef"] != 0.05


def test_advantages_are_whitened_over_both_processes(ranks):
    # Process 1 is paid more. Whitened by itself, each process would have advantages of mean 0.
    assert all(left < -0.2 and right > 0.2 for left, right in zip(*(rank["advantages"] for rank in ranks), strict=True))


def test_logged_figures_are_of_all_processes(ranks):
    left, right = (rank["end"]["history"] for rank in ranks)
    assert left == right
    rollouts = [entry for entry in left if "reward" in entry]
    assert len(rollouts) == 3
    assert all(entry["rewards/rank_reward/mean"] > 5 for entry in rollouts)
    assert all(entry["rewards/rank_reward/std"] > 4 for entry in rollouts)
    evaluations = [entry for entry in left if "eval_reward" in entry]
    assert [entry["step"] for entry in evaluations] == [4, 8, 12]
    assert all(entry["eval_rewards/rank_reward/std"] > 4 for entry in evaluations)


def test_two_processes_resume_as_if_they_had_never_stopped(ranks):
    for rank in ranks:
        assert rank["resumed"]["state"] == rank["end"]["state"]
        assert rank["resumed"]["history"] == rank["end"]["history"]
        for role, weights in rank["end"]["weights"].items():
            assert tiny.same(weights, rank["resumed"]["weights"][role]), role
