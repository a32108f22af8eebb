"""PPOState: what PPO-Max remembers, in and out of JSON, and when saving and evaluating may happen."""

import json

import pytest
import torch
from transformers import TrainerControl, TrainerState

from tests.ppo import tiny
from trl_ext.ops.kl import AdaptiveKL, FixedKL, PenaltyKL
from trl_ext.ppo.callback import PPOStateCallback
from trl_ext.ppo.state import PPOState, make_kl_controller


def state_of(tmp_path, **options):
    return PPOState.of_run(tiny.config(tmp_path, **options))


def used(tmp_path, **options):
    """A state that has seen something."""
    state = state_of(tmp_path, **options)
    state.moments.update(torch.tensor([1.0, 2.0, 4.0]))
    state.kl.update(100.0, 4)
    state.diversity.record(0.5, 4, 4)
    state.rollouts = 3
    state.policy_start = 4
    return state


@pytest.mark.parametrize("control", ["fixed", "adaptive", "penalty"])
def test_the_state_survives_json_to_the_last_bit(tmp_path, control):
    before = used(tmp_path, kl_control=control, critic_warmup_steps=5, max_steps=30)
    after = state_of(tmp_path, kl_control=control, critic_warmup_steps=5, max_steps=30)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())), 4)
    assert after.state_dict() == before.state_dict()
    assert (after.moments.mean, after.moments.std) == (before.moments.mean, before.moments.std)
    assert after.kl.update(0.0, 4) == before.kl.update(0.0, 4)
    assert [after.in_warmup(step) for step in (3, 4)] == [True, False]
    assert after.rollouts == 3


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"kl_control": "fixed"}, FixedKL),
        ({"kl_control": "adaptive"}, AdaptiveKL),
        ({"kl_control": "penalty"}, PenaltyKL),
        ({"kl_control": "adaptive", "beta": 0.0}, FixedKL),
    ],
)
def test_the_controller_is_the_one_that_was_asked_for(tmp_path, options, kind):
    config = tiny.config(tmp_path, **options)
    controller = make_kl_controller(config)
    assert type(controller) is kind
    assert controller.coef == config.beta


def observed(state, explained_variance, step, threshold=0.5, kl=6.0, distinct_2=0.5, rows=4):
    state.record_rollout(kl, distinct_2, explained_variance, step, 4, rows, threshold)
    return state


def test_warm_up_ends_once_and_for_all(tmp_path):
    state = state_of(tmp_path, critic_warmup_steps=3, max_steps=30)
    assert [state.in_warmup(step) for step in range(4)] == [True, True, True, False]
    observed(state, 0.4, 1)
    assert state.in_warmup(2)
    observed(state, 0.5, 2)
    observed(state, -3.0, 2)
    assert [state.in_warmup(step) for step in (1, 2)] == [True, False]
    assert not observed(state_of(tmp_path), 1.0, 0).in_warmup(0)
    never = observed(state_of(tmp_path, critic_warmup_steps=3, max_steps=30), 1.0, 0, threshold=None)
    assert never.policy_start == 3


def test_lost_diversity_raises_beta(tmp_path):
    def beta(distinct_2, **options):
        state = state_of(tmp_path, critic_warmup_steps=0, **options)
        for _ in range(5):
            observed(state, 0.4, 0, kl=3.0)
        for _ in range(3):
            observed(state, 0.4, 0, kl=3.0, distinct_2=distinct_2)
        return state.kl.coef

    assert beta(0.25) > 1.5 * beta(0.5)
    assert beta(0.25, diversity_target=0.0) == beta(0.5)
    assert beta(0.25, kl_control="adaptive") == beta(0.5, kl_control="adaptive")
    assert beta(0.25, kl_control="adaptive", diversity_target=0.85) > beta(0.5, kl_control="adaptive")


def test_a_checkpoint_of_before_keeps_no_diversity(tmp_path, caplog):
    saved = used(tmp_path).state_dict()
    del saved["diversity"]
    state = state_of(tmp_path)
    state.load_state_dict(saved, 4)
    assert state.diversity.target == 0.0
    assert "diversity_target is off" in caplog.text
    again = state_of(tmp_path)
    again.load_state_dict(json.loads(json.dumps(state.state_dict())), 4)
    assert again.diversity.target == 0.0, "for the rest of the run"


def test_asking_changes_nothing(tmp_path):
    state = state_of(tmp_path, critic_warmup_steps=3, max_steps=30)
    before = json.dumps(state.state_dict())
    assert [state.in_warmup(step) for step in (5, 0)] == [False, True]
    assert json.dumps(state.state_dict()) == before


def test_beta_stands_still_as_long_as_the_policy_does(tmp_path):
    state = state_of(tmp_path, critic_warmup_steps=3, max_steps=30)
    assert observed(state, 0.9, 2, kl=1e3).kl.coef == 0.05  # this rollout was the policy's that had not moved
    assert observed(state, 0.9, 2, kl=1e3).kl.coef > 0.05
    assert state.rollouts == 2


@pytest.mark.parametrize(
    ("saved", "step", "steps", "start"),
    [
        ({"policy_start": 5}, 8, 5, 5),  # it was over, early or not
        ({"policy_start": 5}, 8, 20, 5),
        ({"policy_start": 5}, 4, 20, 20),  # it goes on, as long as the run that goes on says,
        ({"policy_start": 5}, 4, 2, 4),  # but never ends before now
        ({"warmup_done": True}, 8, 5, 0),  # a checkpoint of version 0.1
        ({"warmup_done": False}, 4, 5, 5),
    ],
)
def test_a_resumed_warm_up_ends_where_it_ended_or_will(tmp_path, saved, step, steps, start):
    state = state_of(tmp_path, critic_warmup_steps=steps, max_steps=30)
    rest = {name: value for name, value in used(tmp_path).state_dict().items() if name != "policy_start"}
    state.load_state_dict(rest | saved, step)
    assert state.policy_start == start


def saved_steps(tmp_path, wanted, total, **options):
    """Steps at which a callback lets a save through that `Trainer` wants at the steps `wanted`."""
    args = tiny.config(tmp_path, **options)
    callback = PPOStateCallback(PPOState.of_run(args))
    steps = []
    for step in range(1, total + 1):
        control = TrainerControl(should_save=step in wanted)
        callback.on_step_end(args, TrainerState(global_step=step, max_steps=total), control)
        if control.should_save:
            steps.append(step)
    return steps


@pytest.mark.parametrize(
    ("options", "wanted", "expected"),
    [
        ({"num_iterations": 1}, {1, 3}, [1, 3]),
        ({"num_iterations": 4}, {1, 2, 4, 6}, [4, 8]),
        ({"num_iterations": 4}, {9}, [10]),  # the last step
        ({"num_iterations": 4}, set(), []),
        ({"num_iterations": 2, "steps_per_generation": 2}, {3}, [4]),
        ({"num_iterations": 2, "steps_per_generation": 4, "gradient_accumulation_steps": 2}, {5}, [8]),
        ({"num_iterations": 2, "steps_per_generation": 2, "gradient_accumulation_steps": 2}, {5}, [6]),
    ],
)
def test_a_save_waits_for_the_border_and_comes_once(tmp_path, options, wanted, expected):
    assert saved_steps(tmp_path, wanted, 10, **options) == expected
