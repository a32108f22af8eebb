"""recipes/plan_memory.py and --auto_batch, run for real at tiny size."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPTNeoConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import ModelConfig

from trl_ext import PPOMaxConfig
from trl_ext.scripts.parsing import Given


@pytest.fixture
def plan_memory(monkeypatch: pytest.MonkeyPatch):
    """The recipe as a module: a process for each test would mostly import."""
    monkeypatch.setenv("COLUMNS", "200")
    return importlib.import_module("trl_ext.scripts.plan_memory")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of a few thousand weights; one word is one token."""
    folder = tmp_path_factory.mktemp("model")
    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, 40)}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


SHORT = ("--max_prompt_length=16", "--max_completion_length=16")


def test_the_plan_is_printed_with_the_largest_batches(plan_memory, model: Path, repo_root: Path, capsys) -> None:
    config = repo_root / "trl_ext" / "configs" / "qlora_8b.yaml"  # keys of training are passed over
    arguments = (f"--config={config}", f"--model_name_or_path={model}", "--gpu=1GiB", *SHORT)
    plan_memory.main(list(arguments))
    printed = capsys.readouterr().out
    for wanted in (
        "copy before the update",
        "load",
        "generate",
        "score",
        "update",
        "KV cache",
        "Fits into 1.00 GiB",
        "7 in 4 bits",
        "generate 64",
    ):
        assert wanted in printed
    assert "256" in printed.split("Largest batches")[1]


@pytest.mark.parametrize(
    ("flags", "held"), [((), True), (("--update_kl_target=0.1",), True), (("--update_kl_target=0",), False)]
)
def test_the_plan_keeps_a_copy_where_the_run_would(plan_memory, model: Path, flags, held) -> None:
    plan, model_args, given = plan_memory.parse([f"--model_name_or_path={model}", *SHORT, *flags])
    assert (
        plan_memory.setup_of(plan, plan_memory.memory.load_config(str(model)), model_args, given).holds_updates is held
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpu=100MiB",), "lora_r: 8"),
        (("--gpu=lots",), "gpu='lots' is no size"),
        (("--gpu=1GiB", "--no_such_flag=1"), "--no_such_flag=1: no such option"),
        (("--gpu=1GiB", "--adapters", "policy", "poet"), "adapters=['poet']"),
        (("--gpu=1GiB", "--max_completion_length=500"), "64 positions"),
    ],
)
def test_what_cannot_be_planned_says_why(plan_memory, model: Path, arguments, message) -> None:
    with pytest.raises((ValueError, SystemExit), match=re.escape(message)):
        plan_memory.main([f"--model_name_or_path={model}", *SHORT, *arguments])


def test_a_model_without_sdpa_is_planned_with_the_attention_that_it_has(plan_memory, tmp_path: Path, capsys) -> None:
    GPTNeoConfig(
        vocab_size=40, hidden_size=16, num_layers=1, num_heads=2, max_position_embeddings=64,
        attention_types=[[["global"], 1]], bos_token_id=1, eos_token_id=1,
    ).save_pretrained(tmp_path)  # fmt: skip
    plan_memory.main([f"--model_name_or_path={tmp_path}", "--gpu=1GiB", *SHORT])
    assert "Fits into 1.00 GiB" in capsys.readouterr().out


def test_a_plan_that_nobody_asked_for_never_ends_a_run(plan_memory, model: Path, tmp_path: Path, capsys) -> None:
    training = PPOMaxConfig(
        str(tmp_path), use_cpu=True, report_to="none", optim="sgd", steps_per_generation=1, max_completion_length=8
    )
    recipe = SimpleNamespace(auto_batch=False, adapter_dtype="float32", policy_adapter=None, reward_adapter=None)
    prompts = Dataset.from_dict({"prompt": ["w3 w4 w5"]})
    arguments = (training, ModelConfig(str(model)), Given(), prompts)
    assert plan_memory.plan_of_run(recipe, *arguments) is None
    assert "There is no memory plan for this run, which goes on without: ValueError: optim" in capsys.readouterr().out
    recipe.auto_batch, recipe.gpu = True, "1GiB"
    with pytest.raises(ValueError, match="optim"):
        plan_memory.plan_of_run(recipe, *arguments)


@pytest.mark.slow
def test_auto_batch_keeps_the_rollout_and_logs_the_prediction(model: Path, repo_root: Path, tmp_path: Path) -> None:
    rows = [{"prompt": " ".join(["w3", "w4", "w5"][: 1 + i % 3])} for i in range(16)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "rewards.py").write_text(
        "def length(completions, **kwargs):\n    return [len(c) / 9 for c in completions]\n"
    )
    arguments = {
        "model_name_or_path": model, "dataset_name": tmp_path / "prompts.jsonl", "output_dir": tmp_path / "out",
        "reward_funcs": f"{tmp_path / 'rewards.py'}:length", "auto_batch": "true", "gpu": "1GiB", "use_cpu": "true",
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "steps_per_generation": 8, "max_steps": 4,
        "max_completion_length": 4, "logging_steps": 1, "eval_prompts": 4, "report_to": "none", "use_peft": "true",
        "optim": "adamw_torch", "save_steps": 4, "critic_warmup_steps": 2,
    }  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(repo_root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(repo_root / "recipes" / "ppo_max.py")]
    command += [f"--{name}={value}" for name, value in arguments.items()]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "micro-batches of 4, 1 an optimizer step, 2 a rollout batch, generated 8 at a time" in result.stdout
    assert "Predicted peak" in result.stdout
    checkpoint = tmp_path / "out" / "checkpoint-4" / "trainer_state.json"
    history = json.loads(checkpoint.read_text())["log_history"]
    assert [entry["memory/predicted_gib"] > 0 for entry in history if "loss" in entry] == [True] * 4


@pytest.mark.parametrize(
    ("options", "at_once"),
    [
        pytest.param({}, None, marks=pytest.mark.slow),
        pytest.param({"per_device_generate_batch_size": 8}, 8, marks=pytest.mark.slow),
        pytest.param({"use_transformers_continuous_batching": True}, 1, marks=pytest.mark.slow),
    ],
    ids=["chosen", "given", "continuous batching"],
)
def test_auto_batch_bounds_the_cache_of_a_rollout_batch_that_does_not_fit(
    plan_memory, model: Path, tmp_path: Path, options, at_once, capsys
) -> None:
    def plan(gpu: str | None = None, **options):
        """(plan, training arguments) of a rollout batch of 4,096."""
        training = PPOMaxConfig(
            str(tmp_path), use_cpu=True, report_to="none", optim="adamw_torch", max_completion_length=40,
            per_device_train_batch_size=4, gradient_accumulation_steps=1, steps_per_generation=1024, **options,
        )  # fmt: skip
        recipe = SimpleNamespace(
            auto_batch=gpu is not None, gpu=gpu, adapter_dtype="float32", policy_adapter=None, reward_adapter=None
        )
        prompts = Dataset.from_dict({"prompt": ["w3 w4 w5"]})
        return plan_memory.make_plan(recipe, training, ModelConfig(str(model)), Given(), prompts), training

    assert plan(**options)[0].generate_batch == (at_once or 4096)
    small, _ = plan(per_device_generate_batch_size=64)
    assert not plan()[0].fits(small.needed)
    chosen, training = plan(gpu=f"{small.needed}B", **options)
    assert chosen.fits(small.needed)
    assert training.per_device_train_batch_size * training.steps_per_generation == 4096
    printed = capsys.readouterr().out
    if training.use_transformers_continuous_batching:
        assert training.per_device_generate_batch_size is None
        assert "generated by continuous batching," in printed
    else:
        assert training.per_device_generate_batch_size == chosen.generate_batch
        assert chosen.generate_batch == at_once if at_once else 64 <= chosen.generate_batch < 4096
        assert f"generated {chosen.generate_batch} at a time," in printed
