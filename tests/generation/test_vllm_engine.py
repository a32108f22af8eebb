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
from transformers import LlamaForCausalLM

from tests.generation.widened import widened
from tests.ppo import tiny
from trl_ext import Role, SharedBaseModel
from trl_ext.generation.vllm import VLLMEngine
from trl_ext.generation.vllm_options import VLLMOptions
from trl_ext.generation.vllm_probe import check_server, difference, our_logps, random_adapter, random_prompts
from trl_ext.generation.vllm_server import SamplingParameters, VLLMError

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
        environment = os.environ | {"OMP_NUM_THREADS": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
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
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4, "initializer_range": 0.1}
    config = tiny.tiny_config(**sizes | {"head_dim": 32})
    config.num_key_value_heads = 4
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny.tiny_tokenizer().save_pretrained(folder)
    return folder


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


@pytest.mark.parametrize("through", ["server", "generate"])
def test_ppo_on_a_real_model_learns_and_leaves_the_base_as_it_was(
    vllm_python, repo_root, shared_dir, tmp_path, through, record_property
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
    print(f"\n{through}: reward {sum(rewards[:5]) / 5:.3f} -> {sum(rewards[-5:]) / 5:.3f}, kl {entries[-1]['kl']:.2f}")
    assert sum(rewards[-5:]) > sum(rewards[:5])
    if served is not None:
        print(f"difference mean {max(e[MEAN] for e in entries):.2g}, max {max(e[LARGEST] for e in entries):.2g}")
        assert max(entry[LARGEST] for entry in entries) < 1e-4
