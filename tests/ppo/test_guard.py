"""The guard's alarms by hand, what it decides, and what a trainer does when it acts."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from tests.ppo import tiny
from trl_ext.ppo.guard import (
    FAULTS,
    LASTING,
    PATIENCE,
    QUIET,
    START,
    Limits,
    PolicyGuard,
    completion_figures,
    distinct_pairs,
    watch,
)
from trl_ext.ppo.snapshot import Snapshot
from trl_ext.ppo.watching import WatchCallback
from trl_ext.roles import Role

HEALTHY = {
    "entropy": 2.0,
    "completions/distinct_2": 0.8,
    "tokens": 60.0,
    "completions/truncated_ratio": 0.2,
    "completions/ended_at_once": 0.0,
    "reward": 0.2,
    "reward_std": 0.1,
    "samples": 32.0,
    "kl": 4.0,
    "explained_variance": 0.4,
    "reward_uncertainty": 0.1,
    "rewards/gold/mean": 1.0,
    "rewards/gold/std": 0.5,
}
LIMITS = Limits(kl_target=6.0, watched=("gold",))


def guard(acts=("raise_beta", "step_back", "stop"), limits: Limits = LIMITS) -> PolicyGuard:
    """One that has seen its first batches."""
    made = PolicyGuard(acts, limits)
    for step in range(2 * START):
        assert made.observe(HEALTHY, step) == (None, {})
    return made


# ---------------------------------------------------------------------- alarms


@pytest.mark.parametrize(
    ("name", "bad", "fine"),
    [
        ("entropy_low", {"entropy": 0.49}, {"entropy": 0.51}),
        ("entropy_high", {"entropy": 3.76}, {"entropy": 3.74}),
        ("repetition", {"completions/distinct_2": 0.47}, {"completions/distinct_2": 0.49}),
        ("length_short", {"tokens": 23.0}, {"tokens": 25.0}),
        ("length_limit", {"completions/truncated_ratio": 0.96}, {"completions/truncated_ratio": 0.94}),
        ("ended_at_once", {"completions/ended_at_once": 0.26}, {"completions/ended_at_once": 0.24}),
        ("kl_high", {"kl": 10.6}, {"kl": 10.4}),
        ("uncertainty_high", {"reward_uncertainty": 0.26}, {"reward_uncertainty": 0.24}),
        # 7 standard errors: 0.1 * sqrt(1/32 + 1/160) = 0.01936 each
        ("reward_jump", {"reward": 0.2 - 0.152}, {"reward": 0.2 - 0.148}),
        ("reward_jump", {"reward_std": 2.1}, {"reward_std": 1.9}),
        ("policy_step_too_long", {"step/shortened/policy": 0.01}, {"step/shortened/policy": 0.03}),
        ("critic_step_too_long", {"step/shortened/critic": 0.01}, {"step/shortened/critic": 0.03}),
        ("critic_useless", {"explained_variance": 0.0}, {"explained_variance": 0.01}),
    ],
)
def test_each_fault_is_seen_at_its_limit_and_not_before(name: str, bad: dict, fine: dict) -> None:
    history = [HEALTHY] * START
    assert set(watch(HEALTHY | bad, history, LIMITS)) == {name}
    assert watch(HEALTHY | fine, history, LIMITS) == {}


def test_small_rollout_batches_are_taken_together_until_they_are_of_enough_completions() -> None:
    small = HEALTHY | {"samples": 8.0}
    history = [small] * 2 * START
    bad = small | {"completions/distinct_2": 0.1, "kl": 30.0}
    assert watch(bad, history, LIMITS) == {}  # 32 completions: distinct-2 (3 * 0.8 + 0.1) / 4 = 0.625, KL 10.5
    assert set(watch(bad, [*history[:-1], bad], LIMITS)) == {"repetition", "kl_high"}


def test_lengths_that_differ_much_must_differ_more_than_by_chance() -> None:
    # 3 standard errors: 3 * sqrt(40**2 / 32 + 40**2 / 160) = 23.2 tokens, more than 0.6 of 32
    start = HEALTHY | {"tokens": 32.0, "tokens_std": 40.0, "completions/ended_at_once": 0.5}
    history = [start] * START
    assert watch(start | {"tokens": 9.0}, history, LIMITS) == {}
    assert set(watch(start | {"tokens": 8.6}, history, LIMITS)) == {"length_short"}
    gone = start | {"tokens": 1.0, "tokens_std": 0.0, "completions/ended_at_once": 1.0}
    assert set(watch(gone, history, LIMITS)) == {"length_short", "ended_at_once"}


def test_a_rise_of_the_reward_is_no_fault_however_fast() -> None:
    assert watch(HEALTHY | {"reward": 50.0}, [HEALTHY] * START, LIMITS) == {}


def test_one_bad_completion_among_many_good_ones_is_no_jump() -> None:
    # Of eight completions nearly all have learned to please; then one has not: a mean of -0.34, not of -0.04.
    start = HEALTHY | {"samples": 8.0, "reward": -2.5, "reward_std": 0.9}
    learned = start | {"reward": -0.044, "reward_std": 0.07}
    history = [start] * START + [learned] * START
    assert watch(learned | {"reward": -0.336, "reward_std": 0.8}, history, LIMITS) == {}
    # The same fall of all of them is one.
    assert set(watch(learned | {"reward": -0.6}, history, LIMITS)) == {"reward_jump"}


def test_completions_that_were_all_cut_at_the_start_are_no_fault() -> None:
    cut = HEALTHY | {"completions/truncated_ratio": 1.0}
    assert watch(cut, [cut] * START, LIMITS) == {}


def test_nothing_is_compared_before_there_is_a_start() -> None:
    assert watch(HEALTHY | {"entropy": 0.0, "reward": -9.0}, [HEALTHY] * (START - 1), LIMITS) == {}


def test_a_kl_that_nothing_holds_has_no_limit() -> None:
    assert watch(HEALTHY | {"kl": 90.0}, [HEALTHY] * START, Limits(kl_target=None)) == {}


def test_hacking_is_a_reward_that_rises_while_a_watched_one_falls() -> None:
    later = HEALTHY | {"reward": 0.4, "rewards/gold/mean": 0.4}
    history = [HEALTHY] * START + [later] * (START - 1)
    assert set(watch(later, history, LIMITS)) == {"reward_hacking"}
    assert watch(later, history, Limits(6.0, watched=())) == {}
    # 3 standard errors of a mean over 5 batches of 32, twice: 3 * 0.5 * sqrt(2 / 160) = 0.168
    both = [HEALTHY] * START + [HEALTHY | {"reward": 0.4, "rewards/gold/mean": 0.84}] * START
    assert watch(both[-1], both[:-1], LIMITS) == {}


def test_every_fault_has_words_for_it() -> None:
    for name, fault in FAULTS.items():
        assert fault.name == name
        assert len(fault.means.split()) > 5


# ---------------------------------------------------------------------- decisions


def test_acts_come_in_their_order_each_with_time_to_help(caplog) -> None:
    watched, acts = guard(), []
    bad = HEALTHY | {"completions/distinct_2": 0.1}
    with caplog.at_level(logging.WARNING):
        for step in range(LASTING + 3 * PATIENCE):
            act, metrics = watched.observe(bad, step)
            acts.append(act)
            assert metrics == ({"guard/repetition": 1.0} if step >= LASTING - 1 else {})
    taken = [(i, act) for i, act in enumerate(acts) if act]
    first = LASTING - 1
    assert taken == [(first, "raise_beta"), (first + PATIENCE, "step_back"), (first + 2 * PATIENCE, "stop")]
    assert "distinct-2 0.1, at the start 0.8" in watched.state.stopped
    assert "repeats itself" in caplog.text
    assert [raised["act"] for raised in watched.state.raised] == ["raise_beta", "step_back", "stop"]


def test_a_fault_of_one_batch_is_no_alarm() -> None:
    watched = guard()
    assert watched.observe(HEALTHY | {"entropy": 0.1}, 0) == (None, {})
    assert watched.observe(HEALTHY, 1) == (None, {})


def test_an_act_that_is_not_allowed_is_left_out() -> None:
    watched = guard(acts=["stop"])
    acts = [watched.observe(HEALTHY | {"entropy": 0.1}, step)[0] for step in range(LASTING)]
    assert acts == [None, "stop"]
    silent = guard(acts=[])
    assert not any(silent.observe(HEALTHY | {"entropy": 0.1}, step)[0] for step in range(20))
    assert silent.state.stopped is None


def test_after_a_quiet_time_acts_begin_anew() -> None:
    watched = guard()
    bad = HEALTHY | {"entropy": 0.1}
    assert [watched.observe(bad, 0)[0], watched.observe(bad, 0)[0]] == [None, "raise_beta"]
    for _ in range(QUIET):
        watched.observe(HEALTHY, 0)
    assert [watched.observe(bad, 0)[0], watched.observe(bad, 0)[0]] == [None, "raise_beta"]


def test_a_broken_reward_ends_the_run_at_once() -> None:
    watched = guard()
    bad = HEALTHY | {"reward": -0.2}
    assert [watched.observe(bad, step)[0] for step in range(LASTING)] == [None, "stop"]


def test_what_the_step_control_has_mended_is_told_and_not_acted_on() -> None:
    watched = guard()
    act, metrics = watched.observe(HEALTHY | {"step/shortened/policy": 0.001}, 7)
    assert (act, metrics) == (None, {"guard/policy_step_too_long": 1.0})
    assert watched.sound


def test_the_state_goes_through_json() -> None:
    one, other = guard(), PolicyGuard(("stop",), LIMITS)
    one.observe(HEALTHY | {"entropy": 0.1}, 3)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert other.state == one.state


# ---------------------------------------------------------------------- figures


def test_distinct_pairs_by_hand() -> None:
    assert distinct_pairs(["a b a b", "a b"], [[], []], [4, 2]) == 2 / 4  # ab ba ab, ab
    assert distinct_pairs([[{"role": "assistant", "content": "a b c"}]], [[]], [3]) == 1.0
    assert distinct_pairs(["日本語"], [[7, 7, 7, 0]], [3]) == 1 / 2  # no spaces: by tokens
    assert distinct_pairs(["a"], [[5]], [1]) == 0.0


def test_figures_of_completions_by_hand() -> None:
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    rollout = SimpleNamespace(actions=mask.bool(), action_mask=None, completion_ids=mask, completions=["a b a b", ""])
    figures = completion_figures(rollout, lambda x: 2 * x)  # two processes with the same rows
    expected = {"completions/distinct_2": 2 / 3, "completions/ended_at_once": 0.5, "samples": 4.0}
    expected |= {"tokens": 2.5, "tokens_std": 1.5}
    assert figures == pytest.approx(expected)


def test_of_a_batch_sampled_ahead_the_policy_before_the_last_update_is_the_good_one(tmp_path) -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [weight], "role": "policy"}])
    state = SimpleNamespace(rollouts=0, steps={}, kl=SimpleNamespace(coef=0.1))
    args = tiny.config(tmp_path, rollout_lag=1, vllm_server_url="http://localhost:1")
    watching = WatchCallback(args, state, (), optimizer=lambda: optimizer, checkpoint=lambda: None)
    kept = []
    for rollout in range(
        1, 8
    ):  # the policy of update n has the weight n; each batch but the first is of the one before
        state.rollouts = rollout
        watching.observe(HEALTHY | {"sampling/lag": float(rollout > 1)}, step=rollout)
        kept.append(watching.snapshots["good"].tensors["policy/0"].item())
        weight.data.fill_(rollout)
    assert kept == [0, 0, 0, 2, 2, 2, 5]  # of the batches 1, 4 and 7
    assert set(watching.outcome()) == {"alarms", "stopped", "good_policy"}


# ---------------------------------------------------------------------- in a run


class Poison:
    """The reward of `tiny.count_words`, its sign turned after some batches."""

    __name__ = "poison"

    def __init__(self, after: int):
        self.after, self.calls = after, 0

    def __call__(self, prompts, completions, **kwargs):
        self.calls += 1
        sign = -1 if self.calls > self.after else 1
        return [sign * (10 + x) for x in tiny.count_words(prompts, completions)]


def policy_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def run(world: Path, folder: Path, **options):
    options = {"max_steps": 12, "learning_rate": 1e-2, "dataset": tiny.prompts(16)} | options
    return tiny.trainer(world, folder, model=str(world / "base"), peft_config=tiny.lora(), **options)


def test_a_run_with_a_broken_reward_stops_with_its_last_good_policy(world, tmp_path) -> None:
    trainer = run(world, tmp_path, reward_funcs=Poison(8))
    seen = {}
    trainer.watch.snapshots["good"].take, take = (
        lambda optimizer, **info: (take(optimizer, **info), seen.update({info["step"]: snapshot(trainer)})),
        trainer.watch.snapshots["good"].take,
    )
    with pytest.raises(RuntimeError, match=r"the guard stopped the run: reward_jump: reward .* of step 6, with its"):
        trainer.train()
    assert trainer.state.global_step == 10
    saved = policy_of(tmp_path)
    assert equal(saved, seen[6])
    assert not equal(saved, seen[0])
    assert (tmp_path / "critic" / "adapter_model.safetensors").is_file()
    alarms = [entry["guard/reward_jump"] for entry in trainer.state.log_history if "guard/reward_jump" in entry]
    assert alarms == [1.0]


def snapshot(trainer, role: Role = Role.POLICY) -> dict[str, torch.Tensor]:
    """The adapter's weights, named as in its file."""
    adapter = f".{role.adapter_name}."
    named = trainer.model.named_parameters()
    found = {n.replace(adapter, "."): p.detach().clone() for n, p in named if "lora_" in n and adapter in n}
    assert found
    return found


def equal(saved: dict[str, torch.Tensor], adapter: dict[str, torch.Tensor]) -> bool:
    by_end = {name.split("layers")[-1]: tensor for name, tensor in saved.items()}
    return all(torch.equal(by_end[name.split("layers")[-1]], tensor) for name, tensor in adapter.items())


def test_a_step_back_restores_policy_critic_and_optimizer_and_resumes_bit_equal(world, tmp_path, monkeypatch) -> None:
    """The alarm is made by hand; what it does is not."""
    real = PolicyGuard.observe

    def observe(self, figures, step):
        act, metrics = real(self, figures, step)
        return ("step_back" if step == 5 else act), metrics

    monkeypatch.setattr(PolicyGuard, "observe", observe)
    options = {"reward_funcs": tiny.count_words, "max_steps": 8, "save_strategy": "steps", "save_steps": 2}
    whole = run(world, tmp_path / "whole", **options)
    kept = {}
    restore = whole.watch.snapshots["good"].restore
    monkeypatch.setattr(
        whole.watch.snapshots["good"],
        "restore",
        lambda optimizer: (restore(optimizer), kept.update(snapshot(whole), step=whole.state.global_step)),
    )
    whole.train()
    assert kept.pop("step") == 6
    at_border = policy_of(tmp_path / "whole" / "checkpoint-6")
    assert equal(at_border, kept)
    assert whole.watch.pace == 0.5
    for step in (4, 6):
        resumed = run(world, tmp_path / f"from-{step}", **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert resumed.watch.pace == 0.5
        resumed.watch.on_train_begin(resumed.args, resumed.state, resumed.control)  # as in a second train()
        assert resumed.ppo_state.steps[Role.POLICY].target == 0.5 * resumed.args.update_kl_target
        for role in (Role.POLICY, Role.CRITIC):
            assert equal(snapshot(whole, role), snapshot(resumed, role))


def test_a_checkpoint_without_its_snapshot_is_refused_by_name(world, tmp_path) -> None:
    options = {"reward_funcs": tiny.count_words, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    run(world, tmp_path, **options).train()
    file = tmp_path / "checkpoint-2" / "guard" / "good.safetensors"
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"good\.safetensors is missing or damaged"):
        run(world, tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_the_best_policy_of_the_evaluations_is_the_result(world, tmp_path, monkeypatch) -> None:
    options = {"eval_dataset": tiny.prompts(4), "eval_strategy": "steps", "eval_steps": 2, "max_steps": 6}
    trainer = run(world, tmp_path, reward_funcs=tiny.count_words, **options)
    rewards, policies = iter([(0.1, 0.0), (0.5, 1.0), (0.5, 0.5)]), {}
    evaluated = trainer.watch.on_evaluate

    def on_evaluate(args, state, control, metrics=None, **kwargs):
        reward, kl = next(rewards)
        policies[state.global_step] = snapshot(trainer)
        evaluated(args, state, control, metrics | {"eval_reward": reward, "eval_kl": kl})

    monkeypatch.setattr(trainer.watch, "on_evaluate", on_evaluate)
    trainer.train()
    trainer.save_model()
    saved = policy_of(tmp_path)
    assert equal(saved, policies[4])  # the earlier of two equal
    assert not equal(saved, policies[6])


@pytest.mark.parametrize("metrics", [{"eval_reward": float("nan")}, {"eval_reward": 9.0, "eval_kl": 8.1}, {}, None])
def test_an_evaluation_without_a_reward_or_too_far_away_names_no_best_policy(world, tmp_path, metrics) -> None:
    options = {"eval_dataset": tiny.prompts(4), "eval_strategy": "steps", "eval_steps": 2}
    trainer = run(world, tmp_path, reward_funcs=tiny.count_words, **options)
    trainer.watch.on_evaluate(trainer.args, trainer.state, trainer.control, metrics)
    assert trainer.watch.snapshots["best"].info == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_best_policy": True}, r"keep_best_policy=True needs evaluations, and eval_strategy is 'no'"),
        ({"guard_acts": ["pray"]}, r"guard_acts=\['pray'\] must be of raise_beta, step_back, stop"),
        (
            {"keep_best_policy": True, "load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
            | {"save_strategy": "steps", "save_steps": 2},
            r"keep_best_policy=True and load_best_model_at_end=True",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tmp_path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.config(tmp_path, **options)


def test_a_snapshot_of_a_fresh_optimizer_takes_its_states_away_again(tmp_path) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([{"params": [weight], "role": "policy"}], lr=0.1)
    fresh = Snapshot()
    fresh.take(optimizer, step=0)
    weight.grad = torch.ones(3)
    optimizer.step()
    used = Snapshot()
    used.take(optimizer, step=1)
    moved = weight.detach().clone()
    fresh.restore(optimizer)
    assert torch.equal(weight, torch.ones(3))
    assert not optimizer.state.get(weight)
    optimizer.step()  # the same step again
    assert torch.equal(weight, moved)
    optimizer.step()
    used.save(tmp_path / "used.safetensors")
    read = Snapshot()
    read.load(tmp_path / "used.safetensors")
    assert read.info == {"step": 1.0}
    read.restore(optimizer)
    assert torch.equal(weight, moved)
    assert float(optimizer.state[weight]["step"]) == 1.0
