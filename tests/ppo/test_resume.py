"""A run that was killed and resumed ends where the run that was never killed ends: to the last bit."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from tests.ppo import tiny
from trl_ext import Role, SharedBaseModel

ALL_ROLES = tuple(Role)
# Everything that has a state: warm-up until step 3, a controlled beta, PPO-ptx; two passes over two micro-batches
EVERYTHING = {"critic_warmup_steps": 3, "kl_control": "adaptive", "kl_horizon": 8.0, "kl_target": 0.1, "ptx_coef": 0.5}
PASSES = {"num_iterations": 2, "steps_per_generation": 2, "per_device_train_batch_size": 2}


class KilledError(Exception):
    pass


class RaiseAfterSave(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        raise KilledError


class Recorder(TrainerCallback):
    """The prompts that each rollout was made from, in order, and the steps that were saved."""

    def __init__(self):
        self.prompts, self.saved = [], []

    def reward(self, prompts, completions, **kwargs):
        self.prompts.append(list(prompts))
        return tiny.count_words(prompts, completions)

    def on_save(self, args, state, control, **kwargs):
        self.saved.append(state.global_step)


def make(world, folder, callbacks=(), **options):
    options = {"save_strategy": "steps"} | options
    if options.get("ptx_coef"):
        options["ptx_dataset"] = tiny.texts()
    return tiny.trainer(world, folder, callbacks=list(callbacks), **options)


def killed_and_resumed(world, folder, **options):
    """A run that ends right after its first checkpoint, and the new trainer that went on from there."""
    with pytest.raises(KilledError):
        make(world, folder, [RaiseAfterSave()], **options).train()
    torch.manual_seed(12345)  # a new process starts from other random numbers
    resumed = make(world, folder, **options)
    resumed.train(resume_from_checkpoint=True)
    return resumed


def assert_same_run(a, b):
    """Equal logs, adapters, heads, optimizer, schedule and PPO state; the last log entry sums up one process's run."""
    left, right = tiny.comparable(a.state.log_history[:-1]), tiny.comparable(b.state.log_history[:-1])
    assert [entry["step"] for entry in left] == [entry["step"] for entry in right]
    for x, y in zip(left, right, strict=True):
        assert x == y
    for role in ALL_ROLES:
        assert tiny.same(tiny.role_weights(a.model, role), tiny.role_weights(b.model, role)), role
    assert a.ppo_state.state_dict() == b.ppo_state.state_dict()
    assert a.lr_scheduler.get_last_lr() == b.lr_scheduler.get_last_lr()
    left, right = a.optimizer.state_dict(), b.optimizer.state_dict()
    assert left["param_groups"] == right["param_groups"]
    assert left["state"].keys() == right["state"].keys()
    for i, state in left["state"].items():
        assert tiny.same(state, right["state"][i])


@pytest.mark.slow
def test_a_process_killed_right_after_its_checkpoint_goes_on_as_if_nothing_had_happened(world, tmp_path, repo_root):
    # Rollouts of 4 steps; 3 rollouts an epoch; killed at step 12, on the border between two epochs, of 24.
    config = EVERYTHING | PASSES | {"max_steps": 24, "save_steps": 12, "save_strategy": "steps"}
    config |= {"critic_warmup_steps": 14}
    job = {"world": str(world), "folder": str(tmp_path / "killed"), "config": config}
    script = Path(__file__).parent / "run_and_die.py"
    process = subprocess.run(
        [sys.executable, str(script), json.dumps(job)], cwd=repo_root, env=tiny.environment(repo_root), timeout=200
    )
    assert process.returncode == -signal.SIGKILL
    resumed = make(world, tmp_path / "killed", **config)
    resumed.train(resume_from_checkpoint=True)
    never_killed = make(world, tmp_path / "whole", **config)
    never_killed.train()
    assert never_killed.state.log_history[-2]["epoch"] > 2
    assert_same_run(never_killed, resumed)


@pytest.mark.parametrize(
    ("save_steps", "options"),
    [
        pytest.param(4, {}, id="the middle of an epoch"),
        pytest.param(4, EVERYTHING | {"critic_warmup_steps": 6}, id="in warm-up, adaptive KL, PPO-ptx"),
        pytest.param(8, EVERYTHING, id="after warm-up, adaptive KL, PPO-ptx"),
        pytest.param(
            4,
            {"critic_warmup_steps": 6, "warmup_steps": 1},
            id="before the policy's schedule starts",
            marks=pytest.mark.slow,
        ),
        pytest.param(8, {"critic_warmup_steps": 6, "warmup_steps": 3}, id="in the policy's schedule"),
        pytest.param(
            4,
            {"critic_warmup_steps": 4, "critic_warmup_explained_variance": -1e9, "warmup_steps": 3},
            id="a warm-up that ended early",
        ),
        pytest.param(8, {"kl_control": "penalty", "kl_target": 0.01}, id="penalty KL", marks=pytest.mark.slow),
        pytest.param(
            8, {"update_kl_target": 0.0, "guard": False}, id="no control of updates, no guard", marks=pytest.mark.slow
        ),
        pytest.param(4, {"policy_objective": "kl_penalty"}, id="PPO-Penalty", marks=pytest.mark.slow),
        pytest.param(2, {"gradient_accumulation_steps": 2}, id="gradient accumulation"),
        pytest.param(
            4,
            {"num_generations": 2, "gradient_checkpointing": True},
            id="two completions per prompt",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_resuming_equals_never_stopping(world, tmp_path, save_steps, options):
    options = PASSES | {"max_steps": save_steps + 4, "save_steps": save_steps} | options
    resumed = killed_and_resumed(world, tmp_path / "killed", **options)
    never_killed = make(world, tmp_path / "whole", **options)
    never_killed.train()
    assert len(never_killed.state.log_history) == save_steps + 4 + 1
    assert_same_run(never_killed, resumed)


def test_resuming_right_after_an_update_that_was_shortened_equals_never_stopping(world, tmp_path):
    options = PASSES | {"max_steps": 8, "save_steps": 4, "learning_rate": 100.0}
    resumed = killed_and_resumed(world, tmp_path / "killed", **options)
    never_killed = make(world, tmp_path / "whole", **options)
    never_killed.train()
    assert never_killed.state.log_history[3]["step/shortened/policy"] < 1
    assert_same_run(never_killed, resumed)
    assert (
        tiny.read_state(tmp_path / "killed" / "checkpoint-4")["stateful_callbacks"]["PPOStateCallback"]["attributes"][
            "steps"
        ]["policy"]
        < 1
    )


@pytest.mark.parametrize("save_steps", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3, 4))])
def test_the_order_of_prompts_goes_on_across_epochs(world, tmp_path, save_steps):
    # Two rollouts an epoch: a checkpoint at 2 or 4 is on the border of an epoch, one at 1 or 3 within one.
    options = {"max_steps": 7, "save_steps": save_steps}

    def run(folder, callbacks=(), **train):
        recorder = Recorder()
        make(world, folder, [recorder, *callbacks], reward_funcs=recorder.reward, **options).train(**train)
        return recorder

    whole = run(tmp_path / "whole").prompts
    with pytest.raises(KilledError):
        run(tmp_path / "killed", [RaiseAfterSave()])
    assert run(tmp_path / "killed", resume_from_checkpoint=True).prompts == whole[save_steps:]
    epochs = [sorted(whole[i] + whole[i + 1]) for i in (0, 2, 4)]
    assert epochs == [sorted(tiny.prompts()["prompt"])] * 3  # each epoch has every prompt once,
    assert len({str(whole[i : i + 2]) for i in (0, 2, 4)}) == 3  # in an order of its own


def test_saving_waits_for_the_end_of_the_rollout_batch(world, tmp_path):
    # Rollouts of 4 steps: saves wanted at 3, 6 and 9 come at 4, 8 and 10, which is the last step.
    recorder = Recorder()
    make(world, tmp_path, [recorder], **PASSES, max_steps=10, save_steps=3).train()
    assert recorder.saved == [4, 8, 10]


def test_a_run_whose_last_checkpoint_cut_a_rollout_finds_the_borders_again(world, tmp_path):
    make(world, tmp_path, **PASSES, max_steps=6, save_steps=2).train()
    assert (tmp_path / "checkpoint-6").is_dir()
    recorder = Recorder()
    longer = make(world, tmp_path, [recorder], **PASSES, max_steps=13, save_steps=2)
    rollouts = []
    generate = longer._generate_and_score_completions
    longer._generate_and_score_completions = lambda inputs: (
        rollouts.append(longer.state.global_step) or generate(inputs)
    )
    for _ in range(2):  # the second time with what the first has left in the trainer
        longer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
        assert rollouts == [6, 8, 12]  # the cut one is made again, for the two steps it still owes
        assert recorder.saved == [8, 12, 13]
        rollouts.clear()
        recorder.saved.clear()


@pytest.mark.parametrize("options", [{"max_steps": 5}, {"max_steps": -1, "num_train_epochs": 1.25}], ids=str)
def test_a_finished_run_takes_no_further_step(world, tmp_path, options):
    # Epochs of 2 steps: step 5 is in the middle of one
    options |= {"save_steps": 5, "lr_scheduler_type": "constant"}
    if options["max_steps"] == -1:
        options |= {"dataset": tiny.prompts(16)}  # 4 steps an epoch
    make(world, tmp_path, **options).train()
    again = make(world, tmp_path, **options)
    ended = {role: tiny.role_weights(again.model, role) for role in (Role.REWARD, Role.REFERENCE)}
    output = again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert (output.global_step, again.state.global_step) == (5, 5)
    saved = SharedBaseModel.from_pretrained(
        str(world / "base"),
        policy_adapter=tmp_path / "checkpoint-5",
        critic_adapter=tmp_path / "checkpoint-5" / "critic",
    )
    for role in (Role.POLICY, Role.CRITIC):
        assert tiny.same(tiny.role_weights(saved, role), tiny.role_weights(again.model, role)), role
    assert all(tiny.same(weights, tiny.role_weights(again.model, role)) for role, weights in ended.items())
    assert again.ppo_state.rollouts == 5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("reward_normalization", "none"),
        ("kl_control", "fixed"),
        ("num_iterations", 1),
        ("num_generations", 2),
        ("beta", 0.1),
        ("seed", 7),
    ],
)
def test_another_configuration_cannot_resume(world, checkpoint, name, value):
    other = make(world, checkpoint, **PASSES | {"max_steps": 8} | {name: value})
    with pytest.raises(ValueError, match=rf"(?s){name}=.*{name}=.*Resume with {name}="):
        other.train(resume_from_checkpoint=str(checkpoint / "checkpoint-4"))


def test_a_run_goes_on_with_its_batch_shared_out_otherwise(world, tmp_path):
    """As with another number of processes; the sums come in another order."""
    whole = make(world, tmp_path, **PASSES, max_steps=8, save_steps=4)
    whole.train()
    halves = PASSES | {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "steps_per_generation": 4}
    again = make(world, tmp_path, **halves, max_steps=8, save_steps=8)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for role in (Role.POLICY, Role.CRITIC):
        expected = tiny.role_weights(whole.model, role)
        for name, weight in tiny.role_weights(again.model, role).items():
            torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-5)
    another = make(world, tmp_path, **PASSES | {"steps_per_generation": 4}, max_steps=8)
    with pytest.raises(ValueError, match=r"generation_batch_size 4 -> 8.*steps_per_generation=2\."):
        another.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_other_roles_cannot_resume(world, checkpoint):
    bare = SharedBaseModel.from_pretrained(str(world / "base"), reward_adapter=world / "reward")
    with pytest.raises(ValueError, match=r"holds the roles .*Resume with the adapters"):
        make(world, checkpoint, **PASSES, model=bare).train(resume_from_checkpoint=str(checkpoint / "checkpoint-4"))


def test_a_checkpoint_without_our_state_is_refused(world, tmp_path, checkpoint):
    copy = tmp_path / "checkpoint-4"
    copy.mkdir()
    for path in (checkpoint / "checkpoint-4").rglob("*"):
        if path.is_file():
            target = copy / path.relative_to(checkpoint / "checkpoint-4")
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(path.read_bytes())
    state = tiny.read_state(copy)
    del state["stateful_callbacks"]["PPOStateCallback"]
    (copy / "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="no PPO-Max state"):
        make(world, tmp_path, **PASSES, max_steps=8).train(resume_from_checkpoint=str(copy))


@pytest.fixture(scope="module")
def checkpoint(world, tmp_path_factory):
    """A run's folder with checkpoint-4 in it."""
    folder = tmp_path_factory.mktemp("finished")
    make(world, folder, **PASSES, max_steps=4, save_steps=4).train()
    return folder
