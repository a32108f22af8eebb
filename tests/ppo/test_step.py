"""The size of an update: distances and factors by hand, steps that are shortened or taken back, whole runs."""

import copy
import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from tests.ppo import tiny
from trl_ext import Role
from trl_ext.ppo.callback import PPOStateCallback
from trl_ext.ppo.state import PPOState
from trl_ext.ppo.step import FLOOR, StepControl, StepControls, critic_distance, policy_distance

INF, NAN = math.inf, math.nan
TARGET = 0.2


class One:
    """One weight at 1.0 that a step moves by its rate; the distance is `slope` times the square of what it moved."""

    def __init__(self, slope=1.0, lr=1.0, steps=4, initial_lr=None, rests=True):
        self.weight, self.slope, self.tries = nn.Parameter(torch.ones(1)), slope, 0
        self.group = {"params": [self.weight], "lr": lr, "initial_lr": initial_lr or lr}
        self.control = StepControl(TARGET, steps, rests)

    def measure(self) -> float:
        self.tries += 1
        return self.slope * (self.weight.item() - 1) ** 2

    def step(self, skipped=False):
        self.control.before_step(self.group)
        with torch.no_grad():
            self.weight += 0.0 if skipped else self.group["lr"]
        self.control.after_step(skipped)

    def check(self) -> bool:
        return self.control.check(self.measure(), self.measure)


# ---------------------------------------------------------------------- distances


def test_the_policys_distance_by_hand():
    # k3 of KL(old, new) = r - 1 - ln r. Rows: r = 2 and r = 1/2; r = 1; outside the mask anything. Two sequences.
    rows = {"logps": torch.zeros(2, 2), "completion_mask": torch.tensor([[1, 1], [1, 0]])}
    logps = torch.tensor([[math.log(2), math.log(0.5)], [0.0, NAN]])
    expected = (2 - 1 - math.log(2) + 0.5 - 1 + math.log(2)) / 2
    assert policy_distance(rows, logps, lambda x: x) == pytest.approx(expected)
    assert policy_distance(rows, logps * NAN, lambda x: x) != policy_distance(rows, logps, lambda x: x)
    # a second process with one nat more on two sequences: (0.5 + 1) / 4
    assert policy_distance(rows, logps, lambda x: x + torch.tensor([1.0, 2.0])) == pytest.approx(1.5 / 4)


def test_the_critics_distance_by_hand():
    rows = {"values": torch.zeros(1, 3), "returns": torch.tensor([[1.0, -1.0, 5.0]])}
    rows["completion_mask"] = torch.tensor([[1, 1, 0]])
    # moved by 0.5 and 1: (0.25 + 1) of an error of 1 + 1
    assert critic_distance(rows, torch.tensor([[0.5, 1.0, 9.0]]), lambda x: x) == pytest.approx(1.25 / 2)
    # half of the way to the returns covers a quarter
    assert critic_distance(rows, rows["returns"] / 2, lambda x: x) == pytest.approx(0.25)


# ---------------------------------------------------------------------- the rate of the next update


@pytest.mark.parametrize(
    ("distance", "taken", "factor"),
    [
        (0.2, 4, 1.0),  # on target
        (0.05, 4, 2.0),  # a quarter of it: sqrt(4)
        (0.05, 2, 1.0),  # after half of the steps: all of them would have covered 4 times as much
        (0.3, 4, math.sqrt(2 / 3)),
        (0.3, 1, math.sqrt(0.2 / (0.3 * 16)) if math.sqrt(0.2 / 4.8) > 1 / 3 else 1 / 3),
        (0.2 / 36, 4, 3.0),  # far below it: half of the way
        (1e-9, 4, 8.0),  # never more than eight times,
        (0.4, 1, 1 / 3),  # nor less than a third
        (0.0, 4, 8.0),
    ],
)
def test_the_rate_of_the_next_update_by_hand(distance, taken, factor):
    one = One()
    for _ in range(taken):
        one.step()
    stats = one.control.end(lambda: distance)
    assert one.control.scale == pytest.approx(factor)
    assert stats == {
        "distance": distance,
        "wanted": TARGET,
        "scale": 1.0,
        "steps": taken / 4,
        "shortened": 1.0,
    }


def test_a_role_that_does_not_rest_makes_no_leaps():
    one = One(rests=False)
    one.control.scale = 0.01
    one.step()
    one.control.end(lambda: 1e-9)
    assert one.control.scale == pytest.approx(0.02)


@pytest.mark.parametrize("rests", [True, False])
def test_the_factor_has_bounds(rests):
    one = One(rests=rests)
    for distance, bound in ((0.0, 1e3), (2 * TARGET, 1e-5)):
        for _ in range(40):
            one.step()
            one.control.end(lambda d=distance: d)
        assert one.control.scale == pytest.approx(bound)


def test_an_update_without_a_step_changes_nothing():
    one = One()
    assert one.control.end(lambda: 5.0) == {}
    one.step(skipped=True)
    assert one.control.end(lambda: 5.0) == {}
    assert one.control.scale == 1.0


# ---------------------------------------------------------------------- within an update


def test_a_step_within_the_budget_stays_and_one_beyond_lets_the_policy_rest():
    one = One(slope=TARGET)
    one.step()  # distance 1 budget
    assert not one.check()
    assert not one.control.resting
    one.step()  # 4 budgets, shortened to within 2; the policy rests
    assert one.check()
    assert one.control.resting
    one.control.end(one.measure)
    assert not one.control.resting, "the next rollout wakes it"
    critic = One(slope=0.6 * TARGET / 0.5, rests=False)
    critic.step()  # 1.2 budgets: too far to go on, not too far to stay
    assert not critic.check()
    assert not critic.control.resting


def test_a_policy_beyond_its_budget_and_within_two_rests_and_keeps_the_step():
    one = One(slope=1.5 * TARGET)
    one.step()
    assert one.check()
    assert one.control.resting
    assert one.control.shortened == 1.0
    assert one.weight.item() == 2.0


def test_a_step_that_went_too_far_is_shortened_by_hand():
    # distance 1.0 = 5 budgets: the share is sqrt(1 / 5), and the distance then one budget
    one = One(slope=1.0)
    one.step()
    assert one.check()
    share = math.sqrt(0.2)
    assert one.weight.item() == pytest.approx(1 + share)
    assert one.control.shortened == pytest.approx(share)
    assert one.control.distance == pytest.approx(TARGET)
    assert one.control.scale == pytest.approx(share)
    assert one.tries == 2
    stats = one.control.end(one.measure)
    assert (stats["distance"], stats["shortened"]) == (pytest.approx(TARGET), pytest.approx(share))
    assert one.control.scale == pytest.approx(share), "already changed: not once more"


def test_the_whole_way_of_the_update_is_shortened():
    one = One(slope=0.05)  # 0.05 after one step: a quarter of the budget; then a long one
    one.step()
    assert not one.check()
    one.group["lr"] = one.group["initial_lr"] = 9.0
    one.step()  # at 11: 0.05 * 100 = 5 = 25 budgets; a fifth of the way of 10
    assert one.check()
    assert one.weight.item() == pytest.approx(1 + 10 / 5)


def test_a_step_that_other_rows_show_to_be_too_long_can_still_be_shortened():
    one = One(slope=5 * TARGET)
    one.step()
    assert not one.control.check(0.1, one.measure)  # of rows that have hardly moved
    one.group["lr"] = one.group["initial_lr"] = 0.1
    one.step()
    assert one.check()
    assert one.control.distance <= 2 * TARGET
    assert one.control.shortened > 0


def test_a_try_is_no_shorter_than_a_tenth_and_no_longer_than_seven_tenths():
    far = One(slope=1e3)  # 5000 budgets; a tenth each: 50, then 1 / sqrt(50) of it
    far.step()
    far.check()
    assert far.control.shortened == pytest.approx(0.1 * math.sqrt(0.2 / 10))
    near = One(slope=2.1 * TARGET)  # sqrt(1 / 2.1) = 0.69
    near.measure = lambda: 2.1 * TARGET if near.weight.item() > 1.5 else 0.0
    near.step()
    near.check()
    assert near.control.shortened == pytest.approx(math.sqrt(1 / 2.1) * 0.7, rel=0.1)


@pytest.mark.parametrize("distance", [NAN, INF, 1e30])
def test_after_six_tries_the_step_is_taken_back(distance):
    one = One()
    one.step()
    measured = []

    def measure():
        measured.append(one.weight.item())
        return distance if one.weight.item() > 1 else 0.01

    assert one.control.check(distance, measure)
    assert one.weight.item() == 1.0
    assert len(measured) == 7
    assert measured[:6] == pytest.approx([1 + 0.1**k for k in range(1, 7)])
    assert (one.control.shortened, one.control.distance, one.control.resting) == (0.0, 0.01, True)
    assert one.control.scale == pytest.approx(1e-5)


def test_a_policy_that_few_rows_let_rest_is_looked_at_again():
    one = One(slope=1.0)
    one.step()
    assert one.control.check(1.5 * TARGET, one.measure)  # 5 budgets on other rows
    assert one.weight.item() == 2.0
    stats = one.control.end(one.measure)
    assert (stats["distance"], stats["shortened"]) == (pytest.approx(TARGET), pytest.approx(math.sqrt(0.2)))


def test_the_last_step_of_an_update_is_looked_at_too():
    one = One(slope=1e3)
    one.step()
    stats = one.control.end(one.measure)
    assert one.slope * (one.weight.item() - 1) ** 2 <= 2 * TARGET
    assert stats["shortened"] < 0.1


# ---------------------------------------------------------------------- noise, schedule, scaler, the optimizer's group


def test_what_rounding_shows_before_the_first_step_is_no_distance():
    one = One(slope=TARGET)
    assert not one.control.check(0.05, one.measure)
    assert not one.control.resting
    one.step()
    assert not one.control.check(0.05 + 0.19, one.measure)
    assert one.control.distance == pytest.approx(0.19)
    assert one.control.end(lambda: 0.05 + 0.18)["distance"] == pytest.approx(0.18)
    assert one.control.noise is None, "each update has its own"
    # where the noise is larger than the budget, the step may be as large as the noise
    one.group["lr"] = 0.1
    one.control.check(0.05, one.measure)
    one.step()
    assert one.control.budget == pytest.approx(0.05)


def test_the_budget_sinks_with_the_square_of_the_schedules_factor():
    one = One(lr=0.5, initial_lr=1.0, steps=1)
    one.step()
    assert one.control.budget == pytest.approx(TARGET / 4)
    assert one.control.end(lambda: TARGET / 4)["wanted"] == pytest.approx(TARGET / 4)
    assert one.control.scale == pytest.approx(1.0)


def test_the_last_steps_of_a_schedule_do_not_judge_those_before_them():
    one = One(slope=TARGET)
    one.control.before_step(one.group)
    one.control.after_step()
    one.group["lr"] = 0.01
    one.step()
    assert one.control.budget == TARGET


def test_a_rate_of_zero_moves_nothing_and_is_answered_by_nothing():
    one = One(lr=1.0)
    one.group["lr"] = 0.0  # the first step of a learning rate that warms up
    one.step()
    assert not one.control.check(FLOOR / 2, one.measure)  # rounding
    one.control.end(one.measure)
    assert one.control.scale == 1.0


def test_a_step_that_a_scaler_skipped_is_none():
    one = One(slope=TARGET, steps=2)
    one.step(skipped=True)
    assert not one.control.unchecked
    assert one.group["lr"] == 1.0
    one.step()
    assert one.control.end(one.measure)["steps"] == 0.5
    assert one.control.scale == pytest.approx(math.sqrt(1 / 4))  # half of the steps covered the whole target


def test_the_callback_asks_the_optimizer_whether_its_step_was_skipped(tmp_path):
    state, one = PPOState.of_run(tiny.config(tmp_path)), One()
    one.control = state.steps[Role.POLICY]
    callback = PPOStateCallback(state)
    for skipped, taken in ((True, 0), (False, 1)):
        one.control.before_step(one.group)
        callback.on_optimizer_step(None, None, None, optimizer=SimpleNamespace(step_was_skipped=skipped))
        assert one.control.taken == taken


def test_the_schedule_and_a_checkpoint_never_see_the_factor():
    one = One(lr=0.5)
    one.control.scale = 0.25
    one.control.before_step(one.group)
    assert one.group["lr"] == 0.125
    one.control.after_step()
    assert one.group["lr"] == 0.5
    one.control.after_step()  # of a step without this role
    assert (one.group["lr"], one.control.taken) == (0.5, 1)


def test_an_update_that_was_interrupted_leaves_nothing_behind():
    one = One(slope=1e3)
    one.step()
    one.control.begin()
    assert not one.control.unchecked
    assert one.control.end(one.measure) == {}
    assert one.weight.item() == 2.0


def test_all_that_outlives_an_update_is_in_the_state():
    steps = StepControls(TARGET, 4)
    steps[Role.POLICY].scale, steps[Role.CRITIC].scale = 0.3, 0.4
    again = StepControls(TARGET, 4)
    again.load_state_dict(copy.deepcopy(steps.state_dict()))
    assert again.state_dict() == {"policy": 0.3, "critic": 0.4}
    again.load_state_dict({})
    assert again.state_dict() == {"policy": 1.0, "critic": 1.0}
    assert StepControls(0.0, 4) == {}


def test_only_groups_with_a_gradient_take_a_step():
    policy, critic, other = (nn.Parameter(torch.ones(1)) for _ in range(3))
    critic.grad = other.grad = torch.ones(1)
    groups = [{"params": [policy], "role": "policy"}, {"params": [critic], "role": "critic"}, {"params": [other]}]
    steps = StepControls(TARGET, 4)
    assert list(steps.of_groups(groups)) == [(steps[Role.CRITIC], groups[1])]


# ---------------------------------------------------------------------- whole runs

RUN = {"num_iterations": 2, "steps_per_generation": 2, "per_device_train_batch_size": 4, "max_steps": 12}
RUN |= {"reward_funcs": tiny.count_words, "guard": False}


class Rates(TrainerCallback):
    """Learning rates of the groups as the schedule and checkpoints see them."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        self.seen.append([group["lr"] for group in optimizer.param_groups])
        assert optimizer.step_was_skipped is False, "what the callback asks, of accelerate's optimizer"


@pytest.fixture(scope="module", params=[1.0, 1e-2, 1e-5])
def run(request, world, tmp_path_factory):
    """A run of three updates at a learning rate, and its rates."""
    rates = Rates()
    folder = tmp_path_factory.mktemp("run")
    trainer = tiny.trainer(world, folder, learning_rate=request.param, callbacks=[rates], **RUN)
    trainer.train()
    return trainer, rates


def updates(trainer):
    return [entry["update_kl"] for entry in trainer.state.log_history if "update_kl" in entry]


def test_whatever_the_rate_no_update_goes_further_than_twice_its_target(run):
    trainer, _ = run
    found = updates(trainer)
    assert len(found) == 3
    assert all(0 <= kl <= 2 * trainer.args.update_kl_target for kl in found)
    assert all(w.isfinite().all() for role in Role for w in tiny.role_weights(trainer.model, role).values())
    rows = trainer._probe
    moved = policy_distance(rows, trainer._outputs_now(Role.POLICY, rows), lambda x: x)
    assert moved == pytest.approx(found[-1], rel=1e-3, abs=1e-9), "it is what the policy has moved"


def test_a_run_leaves_the_schedule_alone(run):
    trainer, rates = run
    expected = [trainer.args.learning_rate * (1 - step / 12) for step in range(1, 12)]
    assert [policy for policy, *_ in rates.seen][:-1] == pytest.approx(expected)


def test_a_rate_that_is_too_high_is_lowered_and_one_that_is_too_low_is_raised(run):
    trainer, _ = run
    scale = trainer.ppo_state.steps[Role.POLICY].scale
    assert {1.0: scale < 0.1, 1e-2: scale < 50, 1e-5: scale > 8}[trainer.args.learning_rate]


def test_without_a_target_a_rate_of_one_goes_many_times_as_far(world, tmp_path):
    trainer = tiny.trainer(world, tmp_path, learning_rate=1.0, **RUN | {"update_kl_target": 0.0, "max_steps": 4})
    trainer.train()
    assert updates(trainer) == []
    moved = policy_distance(trainer._probe, trainer._outputs_now(Role.POLICY, trainer._probe), lambda x: x)
    assert moved > 5 * trainer.args.kl_target / 64


def test_a_weight_that_a_step_broke_is_taken_back(world, tmp_path):
    class Break(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step == 1:
                next(p for p in model.parameters() if p.requires_grad).data[0, 0] = NAN

    trainer = tiny.trainer(world, tmp_path, max_steps=3, callbacks=[Break()])
    trainer.train()
    assert all(w.isfinite().all() for role in Role for w in tiny.role_weights(trainer.model, role).values())
    assert min(entry.get("step/shortened/policy", 1.0) for entry in trainer.state.log_history) == 0.0


def test_of_accumulated_micro_batches_the_first_is_looked_at(world, tmp_path):
    options = RUN | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 4}
    trainer = tiny.trainer(world, tmp_path, learning_rate=1.0, **options | {"max_steps": 4})
    looked, passes, control = [], [], trainer.ppo_state.steps[Role.POLICY]
    check, forward = control.check, trainer._pass
    control.check = lambda *given: looked.append(trainer._step) or check(*given)
    trainer._pass = lambda *given: passes.append(trainer._step) or forward(*given)
    trainer.train()
    # Micro-batches 0 to 7: the noise at 0; after the first optimizer step at 2, where it was too long; then the policy
    # rests; and at the end of the update
    assert looked == [0, 2, 8]
    assert passes.count(2) == 2
    assert trainer.ppo_state.steps[Role.POLICY].scale < 0.1


def test_a_pass_made_anew_sees_the_same_texts_of_ptx(world, tmp_path):
    options = {"ptx_coef": 0.1, "ptx_dataset": tiny.texts(), "learning_rate": 1.0} | RUN
    trainer = tiny.trainer(world, tmp_path, **options | {"max_steps": 4})
    shown, next_ptx = [], trainer._next_ptx
    trainer.ppo_state.steps[Role.POLICY].rests = False  # else the second pass has none

    def record():
        batch = next_ptx()
        shown.append((trainer._step, batch["input_ids"].tolist()))
        return batch

    trainer._next_ptx = record
    trainer.train()
    again = [(x, y) for (a, x), (b, y) in pairwise(shown) if a == b]
    assert again
    assert all(x == y for x, y in again)


# ---------------------------------------------------------------------- PPO-Penalty


def test_the_coefficient_of_the_kl_in_the_loss_follows_the_kl_of_the_update(world, tmp_path):
    options = RUN | {"policy_objective": "kl_penalty", "kl_penalty_coef": 4.0, "lr_scheduler_type": "constant"}
    trainer = tiny.trainer(world, tmp_path, **options)
    trainer.train()
    target, expected, factors = trainer.args.update_kl_target, 4.0, []
    for entry in trainer.state.log_history[:-1]:
        assert entry.get("kl_penalty_coef", expected) == expected
        assert "clip_fraction/policy" not in entry
        if "update_kl" in entry:
            kl = entry["update_kl"]
            factors.append(2 if kl > 1.5 * target else 0.5 if kl < target / 1.5 else 1)
            expected *= factors[-1]
    assert trainer.ppo_state.penalty.coef == expected
    assert set(factors) != {1}


def test_the_target_of_the_penalty_sinks_with_that_of_the_update(tmp_path):
    args = tiny.config(tmp_path, policy_objective="kl_penalty")
    state = PPOState.of_run(args)
    target = args.update_kl_target
    for distance, wanted, coef in (
        (target / 4, target / 4, 1.0),  # on a target that a schedule has lowered
        (target / 2, target / 4, 2.0),
        (0.1 * target, target / 4, 1.0),
        (INF, target, 1.0),  # weights that are broken: the run ends elsewhere
        (target, 0.0, 1.0),  # a rate of 0
    ):
        state.record_update({"distance": distance, "wanted": wanted})
        assert state.penalty.coef == coef
    state.record_update({})  # the critic alone was trained
    again = PPOState.of_run(args)
    state.penalty.update(10 * target, 1)
    again.load_state_dict(state.state_dict(), 0)
    assert again.penalty.coef == 2.0
    assert PPOState.of_run(tiny.config(tmp_path)).penalty is None
