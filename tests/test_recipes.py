"""Every recipe, run for real at tiny size by `accelerate launch`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from peft import AutoPeftModelForCausalLM

TINY_WORLD = [
    "--world_scale=0.02",
    "--max_steps=4",
    "--per_device_train_batch_size=4",
    "--eval_prompts=8",
    "--critic_warmup_steps=1",
    "--logging_steps=1",
]


def launch(recipe: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(recipe.parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "accelerate.commands.launch", str(recipe), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    root = Path(__file__).resolve().parents[1]
    out = tmp_path_factory.mktemp("toy")
    return out, launch(root / "recipes" / "ppo_max.py", f"--output_dir={out}", *TINY_WORLD)


def test_without_a_model_it_trains_in_the_embedded_world_and_reports(toy_run) -> None:
    out, result = toy_run
    assert result.returncode == 0, result.stderr[-3000:]
    for wanted in ("Before and after PPO-Max", "gold reward", "proxy reward", "KL from the reference", "perplexity"):
        assert wanted in result.stdout
    assert result.stdout.count("prompt: ") == 3
    assert str(out) in result.stdout.replace("\n", "")
    assert (out / "training.png").stat().st_size > 5000


def test_the_saved_policy_loads_with_plain_peft(toy_run) -> None:
    out, _ = toy_run
    model = AutoPeftModelForCausalLM.from_pretrained(out)
    assert sum("lora_B" in name for name, _ in model.named_parameters()) > 0
    for role in ("critic", "reward", "reference"):
        assert json.loads((out / role / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_with_a_model_and_a_reward_function_it_is_a_real_run(toy_run, tmp_path: Path, repo_root: Path) -> None:
    world = next((toy_run[0] / "world").glob("world-*"))
    rows = [{"prompt": f"one morning the little {animal} went to the river ."} for animal in ("fox", "bear")] * 4
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "rewards.py").write_text(
        "def length(completions, **kwargs):\n    return [len(c) for c in completions]\n"
    )
    result = launch(
        repo_root / "recipes" / "ppo_max.py",
        f"--model_name_or_path={world / 'base'}",
        f"--policy_adapter={world / 'policy'}",
        f"--dataset_name={tmp_path / 'prompts.jsonl'}",
        f"--reward_funcs={tmp_path / 'rewards.py'}:length",
        f"--output_dir={tmp_path / 'out'}",
        "--max_steps=2",
        "--per_device_train_batch_size=4",
        "--max_completion_length=8",
        "--eval_prompts=4",
        "--critic_warmup_steps=0",
        "--gradient_checkpointing=false",
        "--report_to=none",
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert "Before and after PPO-Max" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model_name_or_path=nowhere", "--output_dir=x"], "--dataset_name is missing"),
        (["--model_name_or_path=nowhere", "--output_dir=x", "--dataset_name=y"], "nothing scores the completions"),
        (
            ["--model_name_or_path=a", "--output_dir=x", "--dataset_name=y", "--reward_funcs=no.py:f"],
            "there is no file",
        ),
    ],
)
def test_what_is_missing_is_said_before_anything_is_loaded(
    arguments: list[str], message: str, repo_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(repo_root / "recipes"))
    import ppo_max

    with pytest.raises(ValueError, match=message):
        ppo_max.main(arguments)


def test_every_config_file_parses_and_has_a_header(repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(repo_root / "recipes"))
    import ppo_max

    paths = sorted((repo_root / "recipes" / "configs").glob("*.yaml"))
    assert paths
    for path in paths:
        for word in ("# Hardware:", "# Command:"):
            assert word in path.read_text(), path
        optim = ["--optim=adamw_torch"] if "paged" in str(yaml.safe_load(path.read_text()).get("optim")) else []
        ppo_max.parse(["--config", str(path), "--output_dir=x", *optim])


def test_help_names_our_options_and_those_of_trl(repo_root: Path) -> None:
    result = launch(repo_root / "recipes" / "ppo_max.py", "--help")
    assert result.returncode == 0, result.stderr[-3000:]
    for option in ("--reward_adapter", "--kl_target", "--lora_r", "--load_in_4bit", "--num_iterations"):
        assert option in result.stdout
