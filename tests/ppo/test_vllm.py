"""PPO through a server that speaks vLLM's protocol and samples, by plain PEFT, from what it was sent."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from tests.ppo import tiny
from tests.ppo.test_resume import EVERYTHING, PASSES, assert_same_run, killed_and_resumed, make
from tests.vllm_stand_in import BASE, Sampling, StandIn
from trl_ext import Role
from trl_ext.generation.vllm_server import VLLMError

MEAN, LARGEST = (f"sampling/sampling_logp_difference/{name}" for name in ("mean", "max"))


@pytest.fixture
def server(world):
    """A server with the tiny base."""
    with StandIn(**Sampling(world / "base").hooks()) as stand_in:
        yield stand_in


def through(server, **options) -> dict:
    return {"vllm_server_url": server.url, "vllm_wait": 5.0, "vllm_timeout": 60.0} | options


def base_weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if model.owner(name) is None}


def test_a_run_samples_from_every_version_of_the_policy_and_leaves_the_base_as_it_was(world, tmp_path, server):
    trainer = tiny.trainer(world, tmp_path, dataset=tiny.prompts(16), max_steps=3, **through(server))
    probe, asked = len(server.events), len(server.bodies)
    before, policy = base_weights(trainer.model), tiny.role_weights(trainer.model, Role.POLICY)
    trainer.train()
    assert tiny.same(base_weights(trainer.model), before)
    assert not tiny.same(tiny.role_weights(trainer.model, Role.POLICY), policy)
    entries = tiny.rollout_entries(trainer)
    assert len(entries) == 3
    for entry in entries:
        assert 0 < entry[LARGEST] < 1e-5
        assert entry["sampling/effective_sample_size"] == pytest.approx(1, abs=1e-5)
    names = [name for kind, name in server.events[probe:] if kind == "load"]
    assert len(set(names)) == 3
    a, b, c = names
    assert server.events[probe:] == [
        ("load", a), ("generate", a),
        ("load", b), ("unload", a), ("generate", b),
        ("load", c), ("unload", b), ("generate", c),
    ]  # fmt: skip
    seeds = [body["seed"] for body in server.bodies[asked:]]
    assert len(set(seeds)) == len(seeds) == 12
    trainer.vllm_generation.engine.close()
    assert server.loaded == {}
    assert not list((tmp_path / "vllm_adapters").iterdir())


@pytest.mark.slow
def test_a_policy_that_has_not_moved_is_not_sent_again(world, tmp_path, server):
    options = {"dataset": tiny.prompts(16), "max_steps": 3, "critic_warmup_steps": 2}
    trainer = tiny.trainer(world, tmp_path, **options, **through(server))
    before = len(server.events)
    trainer.train()
    assert [kind for kind, _ in server.events[before:]] == ["load", "generate"]


@pytest.mark.slow
def test_the_role_that_is_active_samples_whatever_the_step(world, tmp_path, server):
    trainer = tiny.trainer(world, tmp_path, **through(server))
    prompts = list(tiny.prompts(2)["prompt"])
    trainer.complete(prompts)
    policy = server.events[-1][1]
    with torch.no_grad():  # as the guard does it when it goes back: no step is taken
        for name, parameter in trainer.model.named_parameters():
            if trainer.model.owner(name) is Role.POLICY:
                parameter.mul_(2)
    trainer.complete(prompts)
    assert server.events[-1][1] != policy
    with trainer.model.role(Role.REFERENCE):
        trainer.complete(prompts)
    assert server.events[-1][1] not in (policy, BASE)
    with trainer.model.role(Role.REWARD), pytest.raises(RuntimeError, match="scores and does not generate"):
        trainer.complete(prompts)
    options = {"model": str(world / "base"), "reward_funcs": tiny.count_words}
    fresh = tiny.trainer(world, tmp_path / "fresh", **options, **through(server))
    with fresh.model.role(Role.REFERENCE):
        fresh.complete(prompts)
    assert server.events[-1] == ("generate", BASE)


@pytest.mark.slow
def test_a_resumed_run_is_the_run(world, tmp_path, server):
    options = PASSES | EVERYTHING | {"max_steps": 8, "save_steps": 4, "dataset": tiny.prompts(32)} | through(server)
    whole = make(world, tmp_path / "whole", **options)
    whole.train()
    assert_same_run(whole, killed_and_resumed(world, tmp_path / "killed", **options))


def test_evaluations_go_through_the_server_too(world, tmp_path, server):
    trainer = tiny.trainer(world, tmp_path, eval_dataset=tiny.prompts(4), **through(server))
    before = len(server.bodies)
    metrics = trainer.evaluate()
    assert len(server.bodies) == before + 4
    assert metrics[f"eval_{LARGEST}"] < 1e-5


class Restart(TrainerCallback):
    """Stops the server before step 1, and starts it again."""

    def __init__(self, server, again=True):
        self.server, self.again = server, again

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.server.stop()
            if self.again:
                self.server.start()


@pytest.mark.slow
def test_a_restarted_server_gets_the_adapter_again_and_the_run_goes_on(world, tmp_path, server):
    options = {"dataset": tiny.prompts(16), "max_steps": 3, "critic_warmup_steps": 2}  # the policy stands still
    plain = tiny.trainer(world, tmp_path / "plain", **options, **through(server))
    plain.train()
    trainer = tiny.trainer(world, tmp_path / "run", callbacks=[Restart(server)], **options, **through(server))
    trainer.train()
    assert tiny.comparable(plain.state.log_history[:-1]) == tiny.comparable(trainer.state.log_history[:-1])
    assert len(server.loaded) == 1


@pytest.mark.slow
def test_a_server_that_is_gone_ends_the_run_with_what_to_do(world, tmp_path, server):
    options = through(server, vllm_wait=0.1)
    trainer = tiny.trainer(world, tmp_path, callbacks=[Restart(server, again=False)], **options)
    with pytest.raises(VLLMError, match=r"did not answer for 0.1 s.*trl-ext vllm-serve"):
        trainer.train()


def test_an_empty_completion_is_counted_and_trained_around(world, tmp_path, server):
    trainer = tiny.trainer(world, tmp_path, max_steps=1, **through(server))
    server.faults = ["empty"]
    trainer.train()
    (entry,) = tiny.rollout_entries(trainer)
    assert entry["completions/empty"] == 1
    assert entry[LARGEST] < 1e-5


def test_the_same_completions_train_the_same_policy_whoever_samples_them(world, tmp_path, server):
    options = {"dataset": tiny.prompts(16), "max_steps": 4, "num_iterations": 2}
    first = tiny.trainer(world, tmp_path / "server", **through(server, **options))
    roles = (Role.POLICY, Role.CRITIC)
    start = {role: tiny.role_weights(first.model, role) for role in roles}
    sampled, complete = [], first._complete
    first._complete = lambda prompts: sampled.append(complete(prompts)) or sampled[-1]
    first.train()
    second = tiny.trainer(world, tmp_path / "generate", **options)
    second._complete = lambda prompts: sampled.pop(0)
    second.train()
    assert not sampled
    for role in roles:
        ours, theirs = (tiny.role_weights(trainer.model, role) for trainer in (first, second))
        moved = max(float((ours[name] - weight).abs().max()) for name, weight in start[role].items())
        apart = max(float((ours[name] - weight).abs().max()) for name, weight in theirs.items())
        assert apart < 1e-3 * moved
        assert moved > 1e-3


def test_what_the_server_is_off_by_is_weighed_in_the_loss(world, tmp_path):
    sampling = Sampling(world / "base")
    with StandIn(**sampling.hooks()) as server:
        batches = []
        for name, options in (("on", {}), ("off", {"vllm_importance_sampling_correction": False})):
            trainer = tiny.trainer(world, tmp_path / name, **through(server), **options)
            sampling.off = 0.02
            batches.append(trainer._generate_and_score_completions(list(tiny.prompts(4))))
            sampling.off = 0.0
    assert "importance" not in batches[1]
    mask = batches[0]["completion_mask"].bool()
    weights = batches[0]["importance"]
    torch.testing.assert_close(weights[mask], torch.full_like(weights[mask], 0.98019867), rtol=1e-4, atol=0)
    assert (weights[~mask] == 1).all()


@pytest.mark.slow
def test_a_run_with_dis_takes_its_ratio_to_the_server(world, tmp_path):
    sampling = Sampling(world / "base")
    with StandIn(**sampling.hooks()) as server:
        options = {"policy_objective": "dis", "epsilon": 0.8, "epsilon_high": 3.0, "critic_warmup_steps": 0}
        trainer = tiny.trainer(world, tmp_path, max_steps=1, **through(server), **options)
        policy = tiny.role_weights(trainer.model, Role.POLICY)
        sampling.off = 0.02
        trainer.train()
    assert tiny.rollout_entries(trainer)[0]["ratio_mean"] == pytest.approx(0.98019867, rel=1e-4)
    assert not tiny.same(tiny.role_weights(trainer.model, Role.POLICY), policy)


@pytest.mark.slow
def test_a_server_that_goes_astray_ends_the_run_with_the_likely_cause(world, tmp_path):
    sampling = Sampling(world / "base")
    with StandIn(**sampling.hooks()) as server:
        trainer = tiny.trainer(world, tmp_path / "off", **through(server))
        sampling.off = 0.1
        with pytest.raises(VLLMError, match=r"0\.1 nats a token from the policy's.*At the start they agreed"):
            trainer.train()
        sampling.off = 0.0
        fresh = {"model": str(world / "base"), "reward_funcs": tiny.count_words}
        trainer = tiny.trainer(world, tmp_path / "ignored", **fresh, **through(server))
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                if trainer.model.owner(name) is Role.POLICY:
                    parameter.normal_()
        trainer.ppo_state.rollouts = 1  # a policy on its way
        sampling.ignore = True
        with pytest.raises(VLLMError, match="the reference's: the server does not apply the policy's adapter"):
            trainer.train()


# ---------------------------------------------------------------------- the probe


def probed(world, tmp_path, sampling, server_options=None, **options):
    with StandIn(**sampling.hooks(), **(server_options or {})) as server:
        server.tokenize = lambda text: sampling.tokenizer(text, add_special_tokens=False)["input_ids"]
        try:
            return tiny.trainer(world, tmp_path, **through(server), **options)
        finally:
            assert not [name for name, path in server.loaded.items() if Path(path).exists()]


def test_the_probe_leaves_model_and_server_as_they_were(world, tmp_path):
    before = tiny.role_weights(tiny.four_roles(world), Role.POLICY)
    trainer = probed(world, tmp_path, Sampling(world / "base"))
    assert tiny.same(tiny.role_weights(trainer.model, Role.POLICY), before)


@pytest.mark.parametrize(
    ("sampler", "options", "message"),
    [
        ({"ignore": True}, {}, "those of the base: the server loads the adapter and ignores it"),
        pytest.param(
            {"raw": True},
            {"temperature": 0.5},
            "temperature 1, and the run samples at 0.5: .*processed_logprobs",
            marks=pytest.mark.slow,
        ),
        ({"off": 0.1}, {}, r"Without an adapter they differ too, by 0\.1, as another type or quantisation.*--dtype"),
        pytest.param({"off": 3.0}, {}, r"by 3: the server has another model or revision", marks=pytest.mark.slow),
    ],
)
def test_a_server_that_computes_something_else_is_refused_with_what_it_is(world, tmp_path, sampler, options, message):
    with pytest.raises(VLLMError, match=message) as error:
        probed(world, tmp_path, Sampling(world / "base", **sampler), **options)
    assert "vLLM 0.32.0" in str(error.value)


@pytest.mark.slow
def test_another_tokenizer_is_named(world, tmp_path):
    sampling = Sampling(world / "base", off=0.5)
    sampling.tokenizer = lambda text, **options: {"input_ids": [0]}
    with pytest.raises(VLLMError, match="and so do the tokenizers"):
        probed(world, tmp_path, sampling)


@pytest.mark.slow
def test_an_adapter_that_is_applied_in_another_way_is_told_from_another_base(world, tmp_path):
    sampling = Sampling(world / "base")
    load = sampling.load

    def halved(name, path):
        load(name, path)
        for module in sampling.peft.modules():
            if isinstance(getattr(module, "scaling", None), dict) and name in module.scaling:
                module.scaling[name] = 0.5

    sampling.load = halved
    with pytest.raises(VLLMError, match="the base is the same, and the adapter is computed in another way"):
        probed(world, tmp_path, sampling)


def test_a_server_with_too_little_room_is_refused(world, tmp_path):
    with pytest.raises(VLLMError, match=r"take 10 tokens, and http.* takes 9: start it with --max-model-len 10"):
        probed(world, tmp_path, Sampling(world / "base"), {"max_model_len": 9})


# ---------------------------------------------------------------------- two processes


@pytest.mark.slow
def test_two_processes_share_one_server_and_its_errors(world, tmp_path, repo_root, server):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = str(Path(__file__).parent / "vllm_two_processes.py")
    process = subprocess.run(
        [*launch, script, str(world), str(tmp_path), server.url],
        cwd=repo_root,
        env=tiny.environment(repo_root),
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert process.returncode == 0, process.stderr[-5000:]
    left, right = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert tiny.same(left["policy"], right["policy"])
    assert not tiny.same(left["policy"], left["start"])
    assert tiny.same(left["base before"], left["base after"])
    assert left["history"] == right["history"]
    assert max(entry[LARGEST] for entry in left["history"] if LARGEST in entry) < 1e-5
    assert left["prompts"] != right["prompts"]
    assert left["error"] == right["error"]
    assert "refused with 400" in left["error"]
    assert server.loaded == {}
