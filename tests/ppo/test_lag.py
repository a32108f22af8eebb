"""`rollout_lag=1`: the next rollout is sampled while the present one trains, by the policy that the present one has."""

import threading
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from tests.ppo import tiny
from tests.ppo.test_resume import EVERYTHING, PASSES, Recorder, assert_same_run, killed_and_resumed, make
from tests.ppo.test_vllm import LARGEST, MEAN, Restart, through
from tests.processes import run_script
from tests.vllm_stand_in import Sampling, StandIn
from trl_ext import Role
from trl_ext.generation.vllm_server import VLLMError

LAG = "sampling/lag"


@pytest.fixture
def server(world):
    with StandIn(**Sampling(world / "base").hooks()) as stand_in:
        yield stand_in


def lagging(server, **options) -> dict:
    return through(server, rollout_lag=1) | options


def lags(trainer) -> list[float]:
    return [entry[LAG] for entry in tiny.rollout_entries(trainer)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rollout_lag": 1}, r"rollout_lag=1 does nothing without vllm_server_url"),
        (
            {"rollout_lag": 1, "vllm_server_url": "http://a:1", "vllm_importance_sampling_correction": False},
            r"rollout_lag=1 .* vllm_importance_sampling_correction=False",
        ),
        ({"rollout_lag": 2, "vllm_server_url": "http://a:1"}, r"rollout_lag=2 must be 0 or 1"),
        ({"rollout_lag": True, "vllm_server_url": "http://a:1"}, r"rollout_lag=True must be 0 or 1"),
    ],
)
def test_settings_that_contradict_the_lag_are_refused_by_name(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        tiny.config(tmp_path, **options)


def test_the_next_rollout_is_sampled_while_this_one_trains_by_the_policy_that_this_one_has(world, tmp_path, server):
    # 2 rollouts an epoch: the border between two epochs is passed
    seen = Recorder()
    options = {"dataset": tiny.prompts(8), "max_steps": 3, "reward_funcs": seen.reward}
    trainer = tiny.trainer(world, tmp_path / "lag", **options, **lagging(server))
    probe, asked = len(server.events), len(server.bodies)
    trainer.train()
    assert lags(trainer) == [0, 1, 1]
    a, b, c = (name for kind, name in server.events[probe:] if kind == "load")
    assert server.events[probe:] == [
        ("load", a), ("generate", a),  # the first two rollouts
        ("load", b), ("unload", a), ("generate", b),
        ("load", c), ("unload", b),  # nothing comes after the last one
    ]  # fmt: skip
    assert [body["model"] for body in server.bodies[asked:]] == [a] * 8 + [b] * 4
    assert len({body["seed"] for body in server.bodies[asked:]}) == 12
    # The prompts, rollout for rollout, are those of a run without lag
    plain = Recorder()
    options |= {"reward_funcs": plain.reward}
    without = tiny.trainer(world, tmp_path / "plain", **options, **through(server))
    without.train()
    without.vllm_generation.engine.close()
    assert seen.prompts == plain.prompts
    # What the rollouts are off by is what an update moves, and the first one is not off
    differences = [entry[MEAN] for entry in tiny.rollout_entries(trainer)]
    assert differences[0] < 1e-5 < 1e-3 < min(differences[1:])
    assert not trainer.vllm_generation.engine.ahead
    assert not [thread for thread in threading.enumerate() if thread.name == "rollout ahead"]
    trainer.vllm_generation.engine.close()
    assert server.loaded == {}


def test_old_logps_are_the_trainers_and_the_weights_make_up_for_the_lag(world, tmp_path, server):
    batches = []
    trainer = tiny.trainer(world, tmp_path, dataset=tiny.prompts(8), max_steps=2, **lagging(server))
    score = trainer._generate_and_score_completions

    def kept(inputs):
        batches.append(score(inputs))
        batches[-1]["own"] = trainer._outputs_now(Role.POLICY, batches[-1])
        batches[-1]["theirs"] = torch.zeros_like(batches[-1]["own"])
        for row, logps in zip(batches[-1]["theirs"], trainer.vllm_generation.logps, strict=True):
            row[: len(logps)] = torch.tensor(logps)
        return batches[-1]

    trainer._generate_and_score_completions = kept
    trainer.train()
    for batch in batches:
        mask = batch["completion_mask"].bool()
        torch.testing.assert_close(batch["logps"][mask], batch["own"][mask], rtol=0, atol=1e-6)
        weights = (batch["own"] - batch["theirs"])[mask].exp().clamp(max=3)
        torch.testing.assert_close(batch["importance"][mask], weights, rtol=1e-5, atol=0)
    assert (batches[1]["importance"][mask] - 1).abs().max() > 1e-2


@pytest.mark.slow
def test_an_error_in_the_background_is_raised_where_the_rollout_is_due(world, tmp_path, server):
    broken = []

    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1 and not broken:
                trainer.vllm_generation.engine._ahead.thread.join()
                broken.append(True)
                server.faults = ["refused"] * 4  # for the rollout that the second one begins

    options = {"dataset": tiny.prompts(16), "max_steps": 4, "callbacks": [Break()]}
    trainer = tiny.trainer(world, tmp_path, **options, **lagging(server))
    with pytest.raises(VLLMError, match="refused with 400"):
        trainer.train()
    assert trainer.state.global_step == 2
    assert not trainer.vllm_generation.engine.ahead
    server.faults = []
    trainer.train()  # from the start, and nothing is left of the other
    assert lags(trainer) == [0, 1, 1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("saved", [4, 8])
def test_a_resumed_run_is_the_run(world, tmp_path, server, saved):
    # Rollouts of 2 steps and epochs of 4 rollouts: killed in the middle of one, and between two
    options = PASSES | EVERYTHING | {"max_steps": 12, "save_steps": saved, "dataset": tiny.prompts(16)}
    options |= lagging(server)
    whole = make(world, tmp_path / "whole", **options)
    whole.train()
    assert lags(whole)[:2] == [0, 1]
    resumed = killed_and_resumed(world, tmp_path / "killed", **options)
    assert_same_run(whole, resumed)
    assert lags(resumed) == lags(whole)
    assert (tmp_path / "killed" / f"checkpoint-{saved}" / "rollout_ahead.safetensors").is_file()


@pytest.mark.slow
def test_without_its_rollout_a_checkpoint_begins_with_one_of_its_own_policy(world, tmp_path, server):
    options = {"max_steps": 4, "save_steps": 2, "dataset": tiny.prompts(16), "save_strategy": "steps"} | lagging(server)
    make(world, tmp_path, **options).train()
    folder = tmp_path / "checkpoint-2"
    (folder / "rollout_ahead.safetensors").unlink()
    resumed = make(world, tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(folder))
    assert lags(resumed)[-2:] == [0, 1]
    (folder / "rollout_ahead.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"rollout_ahead.safetensors is damaged"):
        make(world, tmp_path, **options).train(resume_from_checkpoint=str(folder))


@pytest.mark.slow
def test_evaluations_between_are_of_the_present_policy_and_change_no_rollout(world, tmp_path, server):
    seen = Recorder()
    options = {"dataset": tiny.prompts(16), "max_steps": 4, "reward_funcs": seen.reward} | lagging(server)
    trainer = tiny.trainer(
        world, tmp_path, eval_dataset=tiny.prompts(4), eval_strategy="steps", eval_steps=1, **options
    )
    trainer.train()
    evaluations = [entry for entry in trainer.state.log_history if f"eval_{LARGEST}" in entry]
    assert len(evaluations) >= 3
    assert max(entry[f"eval_{LARGEST}"] for entry in evaluations) < 1e-5
    assert lags(trainer) == [0, 1, 1, 1]
    assert server.loaded.keys() <= {name for kind, name in server.events if kind == "load"}


@pytest.mark.slow
def test_a_rollout_of_a_policy_that_the_guard_undoes_is_sampled_anew(world, tmp_path, server):
    class GoBack(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                trainer.watch.going_back = True

    options = {"dataset": tiny.prompts(32), "max_steps": 5, "save_steps": 3, "save_strategy": "steps"}
    options |= lagging(server)
    trainer = tiny.trainer(world, tmp_path / "run", callbacks=[GoBack()], **options)
    trainer.train()
    assert lags(trainer) == [0, 1, 1, 0, 1]
    third = tiny.rollout_entries(trainer)[3]
    assert third[LARGEST] < 1e-5
    folder = tmp_path / "run" / "checkpoint-3"
    assert not (folder / "rollout_ahead.safetensors").exists()
    resumed = tiny.trainer(world, tmp_path / "run", **options)
    resumed.train(resume_from_checkpoint=str(folder))
    assert_same_run(trainer, resumed)


@pytest.mark.slow
def test_a_step_that_is_taken_back_leaves_the_rollout_nearer_to_its_policy(world, tmp_path, server):
    # The step control shortens what it takes back, towards the policy that samples: nothing has to be sampled anew
    options = {"dataset": tiny.prompts(32), "max_steps": 4, "learning_rate": 1.0, "num_iterations": 2}
    trainer = tiny.trainer(world, tmp_path, **options, **lagging(server, vllm_max_logp_difference=1.0))
    trainer.train()
    entries = tiny.rollout_entries(trainer)
    assert min(entry.get("step/shortened/policy", 1) for entry in trainer.state.log_history) < 1
    assert [entry[LAG] for entry in entries] == [0, 1]


@pytest.mark.slow
def test_a_restarted_server_gets_the_version_again_that_samples_ahead(world, tmp_path, server):
    options = {"dataset": tiny.prompts(16), "max_steps": 4, "critic_warmup_steps": 2} | lagging(server)
    plain = tiny.trainer(world, tmp_path / "plain", **options)
    plain.train()
    trainer = tiny.trainer(world, tmp_path / "run", callbacks=[Restart(server)], **options)
    trainer.train()
    assert tiny.comparable(plain.state.log_history[:-1]) == tiny.comparable(trainer.state.log_history[:-1])


@pytest.mark.slow
def test_a_server_that_forgets_the_adapter_ends_a_lagging_run(world, tmp_path):
    """The bound on the difference grows by what an update may move, and not by more."""
    sampling = Sampling(world / "base")

    class Ignore(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            sampling.off = 0.5 if state.global_step >= 1 else 0.0

    with StandIn(**sampling.hooks()) as server:
        options = {"dataset": tiny.prompts(32), "max_steps": 6, "callbacks": [Ignore()]} | lagging(server)
        trainer = tiny.trainer(world, tmp_path, **options)
        with pytest.raises(VLLMError, match=r"difference=0.05 and the 0.\d+ that the update between may have moved"):
            trainer.train()


@pytest.mark.slow
def test_two_processes_agree_on_the_rollout_that_waits_and_on_its_errors(world, tmp_path, server):
    script = Path(__file__).parent / "lag_two_processes.py"
    done = run_script(script, world, tmp_path, server.url, processes=2, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr[-5000:]
    left, right = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert tiny.same(left["policy"], right["policy"])
    # 4 rollouts an epoch: the border between two is passed
    assert left["lags"] == right["lags"] == [0, 1, 1, 1, 1, 1]
    for mine, others in zip(left["prompts"], right["prompts"], strict=True):
        assert not set(mine) & set(others)
    assert left["error"] == right["error"] == "refused with 400"
    assert left["steps"] == right["steps"] == 1
