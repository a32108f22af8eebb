"""PPOState: what PPO-Max remembers, in and out of JSON, and when saving and evaluating may happen."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl, TrainerState

from tests.ppo import tiny
from trl_ext.ops.kl import AdaptiveKL, FixedKL, PenaltyKL
from trl_ext.ppo.state import FIXED_FIELDS, PPOState, PPOStateCallback, make_kl_controller


def state_of(tmp_path, **options):
    return PPOState(tiny.config(tmp_path, **options))


def used(tmp_path, **options):
    """A state that has seen something."""
    state = state_of(tmp_path, **options)
    state.moments.update(torch.tensor([1.0, 2.0, 4.0]))
    state.kl.update(100.0, 4)
    state.rollouts = 3
    state.in_warmup(global_step=10)
    return state


@pytest.mark.parametrize("control", ["fixed", "adaptive", "penalty"])
def test_the_state_survives_json_to_the_last_bit(tmp_path, control):
    before = used(tmp_path, kl_control=control, critic_warmup_steps=5)
    after = state_of(tmp_path, kl_control=control, critic_warmup_steps=5)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert after.state_dict() == before.state_dict()
    assert (after.moments.mean, after.moments.std) == (before.moments.mean, before.moments.std)
    assert after.kl.update(0.0, 4) == before.kl.update(0.0, 4)
    assert not after.in_warmup(0)
    assert after.rollouts == 3


def test_a_state_of_another_configuration_is_refused_before_it_is_taken(tmp_path):
    saved = used(tmp_path).state_dict()
    for name in FIXED_FIELDS:
        other = saved | {"config": saved["config"] | {name: "another"}}
        state = state_of(tmp_path)
        with pytest.raises(ValueError, match=f"written with {name}='another'.*Resume with {name}='another'"):
            state.load_state_dict(other)
        assert state.moments.count == 0


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


def test_warm_up_ends_once_and_for_all(tmp_path):
    state = state_of(tmp_path, critic_warmup_steps=3, critic_warmup_explained_variance=0.5)
    assert [state.in_warmup(step) for step in range(3)] == [True] * 3
    state.observe_explained_variance(0.4)
    assert state.in_warmup(2)
    state.observe_explained_variance(0.5)
    state.observe_explained_variance(-3.0)
    assert not state.in_warmup(2)
    state = state_of(tmp_path, critic_warmup_steps=3)
    state.observe_explained_variance(1.0)  # no threshold was set
    assert [state.in_warmup(step) for step in (2, 3, 2)] == [True, False, False]
    assert not state_of(tmp_path, critic_warmup_steps=0).in_warmup(0)


def saved_steps(tmp_path, wanted, total, **options):
    """Steps at which a callback lets a save through that `Trainer` wants at the steps `wanted`."""
    args = tiny.config(tmp_path, **options)
    callback = PPOStateCallback(SimpleNamespace(timer=SimpleNamespace(end_update=lambda: None)))
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
