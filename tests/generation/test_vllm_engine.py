"""The real engine, on a CPU: what it gives for the adapters that it is sent is what transformers and PEFT give.

Needs an environment that tests/vllm_environment.py makes, by TRL_EXT_VLLM_PYTHON.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import BitsAndBytesConfig, TrainerCallback

from tests.generation.draws import deviations
from tests.generation.widened import wide_base, widened
from tests.ppo import tiny
from tests.ppo.test_resume import KilledError, RaiseAfterSave
from trl_ext import Role, SharedBaseModel
from trl_ext.generation.vllm import VLLMEngine, row_seeds
from trl_ext.generation.vllm_options import VLLMOptions
from trl_ext.generation.vllm_probe import check_server, difference, our_logps, random_adapter, random_prompts
from trl_ext.generation.vllm_server import SamplingParameters, VLLMError
from trl_ext.scripts.vllm_serve import find_vllm
from trl_ext.text import pad_ids

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
START_SECONDS = 600
MEAN, LARGEST = (f"sampling/sampling_logp_difference/{name}" for name in ("mean", "max"))


@pytest.fixture(scope="module")
def vllm_python() -> str:
    python = os.environ.get("TRL_EXT_VLLM_PYTHON")
    if python is None:
        pytest.skip("no TRL_EXT_VLLM_PYTHON: python tests/vllm_environment.py FOLDER makes an environment")
    return python


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


class Served:
    """A server that recipes/vllm_serve.py starts, in a process group of its own."""

    def __init__(self, python: str, root: Path, log: Path, model: Path, *more: str):
        self.port = free_port()
        self.url, self.log = f"http://127.0.0.1:{self.port}", log
        recipe = [sys.executable, str(root / "recipes" / "vllm_serve.py"), "--python", python, "--model", str(model)]
        self.command = [*recipe, "--port", str(self.port), "--max_lora_rank", "16", *more]
        self.start()

    def start(self) -> None:
        # one thread: two of them wait for each other where the machine is busy
        environment = os.environ | {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return
            time.sleep(1)
        raise AssertionError(f"the server did not start:\n{self.log.read_text()[-3000:]}")

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A Llama of random numbers with heads as wide as the engine's attention takes them, and its tokenizer."""
    return wide_base(tmp_path_factory.mktemp("base"), torch.float32)


@pytest.fixture(scope="module")
def served(vllm_python, repo_root, base, tmp_path_factory):
    server = Served(vllm_python, repo_root, tmp_path_factory.mktemp("log") / "vllm.log", base, "--max_model_len", "64")
    yield server
    server.stop()


def test_every_version_of_an_adapter_gives_what_we_compute(served, base, tmp_path):
    patterns = {"rank_pattern": {"q_proj": 2, "down_proj": 6}, "alpha_pattern": {"v_proj": 3}}
    model = SharedBaseModel.from_pretrained(str(base), peft_config=tiny.lora(**patterns)).eval()
    engine = VLLMEngine(model, VLLMOptions(served.url), tmp_path)
    parameters = SamplingParameters(12, (1,), temperature=0.8)
    prompts = random_prompts(tiny.tiny_tokenizer(), 0)
    told = []
    for version in range(3):
        with random_adapter(model, version, 0.3):
            engine.sync(Role.POLICY)
            found = [each[0] for each in engine.sample(prompts, range(len(prompts)), parameters, role=Role.POLICY)]
            rows = [(prompt, completion.ids) for prompt, completion in zip(prompts, found, strict=True)]
            theirs, ours = [completion.logps for completion in found], our_logps(model, rows, 0.8)
            largest = max(abs(x - y) for a, b in zip(theirs, ours, strict=True) for x, y in zip(a, b, strict=True))
            assert difference(theirs, ours) < 1e-5
            assert largest < 3e-5
            assert difference(ours, our_logps(model, rows, 0.8, bare=True)) > 0.1
            told.append(theirs)
            again = engine.sample(prompts, range(len(prompts)), parameters, role=Role.POLICY)
            assert [each[0].ids for each in again] == [completion.ids for completion in found]
    assert told[0] != told[1] != told[2]
    assert check_server(engine, parameters, tiny.tiny_tokenizer()) < 1e-5
    engine.close()
    assert [entry["id"] for entry in engine.server.models()] == ["base"]


def test_completions_are_drawn_from_the_policy_itself(served, base, tmp_path):
    model = SharedBaseModel.from_pretrained(str(base), peft_config=tiny.lora()).eval()
    engine = VLLMEngine(model, VLLMOptions(served.url), tmp_path)
    prompts = random_prompts(tiny.tiny_tokenizer(), 0) * 50
    with random_adapter(model, 0, 0.3):
        engine.sync(Role.POLICY)
        seeds = row_seeds(0, 0, len(prompts))
        found = [each[0].ids for each in engine.sample(prompts, seeds, SamplingParameters(12, (1,), temperature=0.8))]
        ids, mask = pad_ids([prompt + own for prompt, own in zip(prompts, found, strict=True)], 0, left=False)
        with torch.no_grad():
            every = model(ids, mask).logits / 0.8
    engine.close()
    places = [slice(len(prompt) - 1, len(prompt) - 1 + len(own)) for prompt, own in zip(prompts, found, strict=True)]
    logits = [rows[place] for rows, place in zip(every, places, strict=True)]
    assert sum(map(len, found)) > 1000
    told = deviations(logits, found, [1])
    print(f"\n{sum(map(len, found))} tokens: {told}")
    assert max(map(abs, told.values())) < 4
    assert deviations([0.8 * rows for rows in logits], found, [1])["surprise"] < -4, "another temperature shows"


def test_a_rank_above_the_servers_is_refused_with_the_flag(served, base, tmp_path):
    options = {"peft_config": tiny.lora(r=32), "model": str(base), "reward_funcs": tiny.count_words}
    with pytest.raises(VLLMError, match="--max-lora-rank"):
        tiny.trainer(base, tmp_path, vllm_server_url=served.url, **options)


def test_a_run_goes_on_with_a_server_that_was_killed_and_started_again(served, base, tmp_path):
    options = {"model": str(base), "reward_funcs": tiny.count_words, "peft_config": tiny.lora(), "max_steps": 3}
    trainer = tiny.trainer(base, tmp_path, dataset=tiny.prompts(16), vllm_server_url=served.url, **options)
    step, kills = trainer.compare_with_sampler, []

    def killed_after_the_first(rollout):
        figures = step(rollout)
        if not kills:
            kills.append(served.stop())
            served.start()
        return figures

    trainer.compare_with_sampler = killed_after_the_first
    trainer.train()
    entries = tiny.rollout_entries(trainer)
    assert len(entries) == 3
    assert max(entry[LARGEST] for entry in entries) < 1e-5


def fresh(served, base, folder, **options):
    """A trainer through the server, of a fresh policy and a function that scores."""
    options = {"dataset": tiny.prompts(32), "peft_config": tiny.lora(), "vllm_server_url": served.url} | options
    return tiny.trainer(base, folder, model=str(base), reward_funcs=tiny.count_words, **options)


class Kill(TrainerCallback):
    """Kills the server when so many steps are done."""

    def __init__(self, served, step):
        self.served, self.step = served, step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.served.stop()


@pytest.mark.parametrize("lag", [0, 1])
def test_a_server_that_stays_away_is_a_clear_error_and_the_run_goes_on_when_it_is_back(served, base, tmp_path, lag):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "rollout_lag": lag, "vllm_wait": 2.0}
    try:
        with pytest.raises(VLLMError, match=r"did not answer for 2 s.*trl-ext vllm-serve"):
            fresh(served, base, tmp_path, callbacks=[Kill(served, 2)], **options).train()
    finally:
        served.start()
    trainer = fresh(served, base, tmp_path, **options)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    entries = tiny.rollout_entries(trainer)
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4]
    if not lag:
        assert max(entry[LARGEST] for entry in entries) < 3e-5


@pytest.mark.parametrize("lag", [0, 1])
def test_a_killed_trainer_is_resumed_and_ends_equal(served, base, tmp_path, lag):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "rollout_lag": lag}
    whole = fresh(served, base, tmp_path / "whole", **options)
    whole.train()
    with pytest.raises(KilledError):
        fresh(served, base, tmp_path / "killed", callbacks=[RaiseAfterSave()], **options).train()
    torch.manual_seed(12345)
    resumed = fresh(served, base, tmp_path / "killed", **options)
    resumed.train(resume_from_checkpoint=True)
    for role in (Role.POLICY, Role.CRITIC):
        assert tiny.same(tiny.role_weights(whole.model, role), tiny.role_weights(resumed.model, role))
    left, right = (tiny.comparable(trainer.state.log_history[:-1]) for trainer in (whole, resumed))
    assert left == right


def test_four_bits_are_the_trainers(vllm_python, repo_root, tmp_path):
    if not find_vllm(vllm_python).four_bit:
        pytest.skip("vllm-bnb-plugin is not there: python tests/vllm_environment.py FOLDER installs it")
    folder = wide_base(tmp_path / "base", torch.bfloat16)
    served = Served(vllm_python, repo_root, tmp_path / "vllm.log", folder, "--max_model_len", "64", "--load_in_4bit")
    try:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        model = SharedBaseModel.from_pretrained(
            str(folder), peft_config=tiny.lora(), quantization_config=quantization, dtype=torch.bfloat16
        ).eval()
        engine = VLLMEngine(model, VLLMOptions(served.url), tmp_path)
        parameters = SamplingParameters(12, (1,), temperature=0.8)
        prompts = random_prompts(tiny.tiny_tokenizer(), 0)
        for version in range(3):
            with random_adapter(model, version, 0.3):
                engine.sync(Role.POLICY)
                found = [each[0] for each in engine.sample(prompts, range(len(prompts)), parameters, role=Role.POLICY)]
                rows = [(prompt, completion.ids) for prompt, completion in zip(prompts, found, strict=True)]
                theirs, ours = [completion.logps for completion in found], our_logps(model, rows, 0.8)
                bare = our_logps(model, rows, 0.8, bare=True)
                print(f"\n4 bits: mean {difference(theirs, ours):.4f}, without adapter {difference(ours, bare):.4f}")
                assert difference(theirs, ours) < 0.02 < difference(ours, bare)
        assert check_server(engine, parameters, tiny.tiny_tokenizer()) < 0.02
        engine.close()
    finally:
        served.stop()


@pytest.mark.parametrize("seed", [42, 43])
@pytest.mark.parametrize("through", ["server", "generate"])
def test_ppo_on_a_real_model_learns_and_leaves_the_base_as_it_was(
    vllm_python, repo_root, shared_dir, tmp_path, through, seed
):
    sys.path.insert(0, str(shared_dir / "data"))
    from lexicon_reward import lexicon_reward

    model = widened(shared_dir / "models" / "tinystories-656k", tmp_path / "model")  # heads of 16 are too narrow for it
    rows = Dataset.from_json(str(shared_dir / "data" / "tinystories" / "prompts_train.jsonl.gz"))
    served = Served(vllm_python, repo_root, tmp_path / "vllm.log", model) if through == "server" else None
    try:
        trainer = tiny.trainer(
            model,
            tmp_path / "run",
            model=str(model),
            reward_funcs=lexicon_reward,
            dataset=rows,
            peft_config=tiny.lora(r=16, lora_alpha=32),
            per_device_train_batch_size=32,
            num_iterations=2,
            max_completion_length=48,
            max_steps=40,
            learning_rate=3e-3,
            seed=seed,
            **({} if served is None else {"vllm_server_url": served.url}),
        )
        own = trainer.model
        before = {name: p.detach().clone() for name, p in own.named_parameters() if own.owner(name) is None}
        trainer.train()
    finally:
        if served is not None:
            served.stop()
    assert all(torch.equal(dict(own.named_parameters())[name], value) for name, value in before.items())
    entries = tiny.rollout_entries(trainer)
    assert len(entries) == 20
    rewards = [entry["reward"] for entry in entries]
    first, last = sum(rewards[:5]) / 5, sum(rewards[-5:]) / 5
    print(f"\n{through}, seed {seed}: reward {first:.3f} -> {last:.3f}, kl {entries[-1]['kl']:.2f}")
    assert last > first
    if served is not None:
        print(f"difference mean {max(e[MEAN] for e in entries):.2g}, max {max(e[LARGEST] for e in entries):.2g}")
        assert max(entry[LARGEST] for entry in entries) < 1e-4
