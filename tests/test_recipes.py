"""Recipes of policies, run for real at tiny size, the first by `accelerate launch`."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from peft import AutoPeftModelForCausalLM
from trl import SFTConfig

from tests.processes import Done, run_script
from trl_ext.scripts import ppo_max
from trl_ext.scripts.catalogue import COMMANDS

TINY_WORLD = [
    "--world_scale=0.02",
    "--max_steps=4",
    "--per_device_train_batch_size=4",
    "--eval_prompts=8",
    "--critic_warmup_steps=1",
    "--logging_steps=1",
]


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    root = Path(__file__).resolve().parents[1]
    out = tmp_path_factory.mktemp("toy")
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "accelerate.commands.launch", str(root / "recipes" / "ppo_max.py")]
    command += [f"--output_dir={out}", *TINY_WORLD]
    return out, subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)


def test_without_a_model_it_trains_in_the_embedded_world_and_reports(toy_run) -> None:
    out, result = toy_run
    assert result.returncode == 0, result.stderr[-3000:]
    for wanted in ("Before and after PPO-Max", "gold reward", "proxy reward", "KL from the reference", "perplexity"):
        assert wanted in result.stdout
    assert result.stdout.count("prompt: ") == 3
    assert str(out) in result.stdout.replace("\n", "")
    assert (out / "training.png").stat().st_size > 5000


@pytest.mark.slow
def test_a_policy_that_does_not_move_is_the_same_before_and_after(toy_run, tmp_path: Path) -> None:
    (tmp_path / "world").symlink_to(toy_run[0] / "world")
    still = ["--learning_rate=1e-30", "--critic_learning_rate=1e-30", "--per_device_eval_batch_size=4"]
    ppo_max.main([f"--output_dir={tmp_path}", *TINY_WORLD, *still])
    found = json.loads((tmp_path / "before_after.json").read_text())
    shown = [key for row in ppo_max.metric_labels(gold=True) for key in row[1:] if key]
    assert [found["before"][key] for key in shown] == [found["after"][key] for key in shown]


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
    result = run_script(
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
        (["--model_name_or_path=nowhere"], "--dataset_name is missing"),
        (["--model_name_or_path=nowhere", "--dataset_name=y"], "nothing scores the responses"),
        (
            ["--model_name_or_path=a", "--dataset_name=y", "--reward_funcs=no.py:f"],
            "there is no file",
        ),
    ],
)
def test_what_is_missing_is_said_before_anything_is_loaded(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        ppo_max.main([*arguments, f"--output_dir={tmp_path / 'out'}"])


def test_every_config_file_parses_and_has_a_header(repo_root: Path) -> None:
    folder = repo_root / "trl_ext" / "configs"
    paths = sorted([*folder.glob("*.yaml"), *folder.glob("presets/*.yaml")])
    assert paths
    for path in paths:
        command = re.search(r"^# .*trl-ext ([\w-]+)", path.read_text(), flags=re.M)
        assert command, f"{path.name}: its header names no command"
        recipe = COMMANDS[command[1]].module.rpartition(".")[2]
        if path.stem.startswith("sft"):  # of a stage
            assert set(yaml.safe_load(path.read_text())) <= set(SFTConfig.__dataclass_fields__)
            continue
        flags = ["--config", str(path), "--output_dir=x"]
        if "paged" in str(yaml.safe_load(path.read_text()).get("optim")):
            flags.append("--optim=adamw_torch")
        if "toy" not in path.name:
            flags += ["--model_name_or_path=x", "--dataset_name=x"]
            flags += ["--reward_funcs=x"] if recipe in ("ppo_max", "rrhf") else []
        importlib.import_module(f"trl_ext.scripts.{recipe}").parse(flags)


def test_help_names_our_options_and_those_of_trl(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        ppo_max.main(["--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for option in ("--reward_adapter", "--kl_target", "--lora_r", "--load_in_4bit", "--num_iterations"):
        assert option in printed


TINY_RRHF = [
    "--world_scale=0.02",
    "--max_prompts=8",
    "--max_new_tokens=8",
    "--eval_prompts=4",
    "--per_device_train_batch_size=4",
    "--num_train_epochs=1",
    "--logging_steps=1",
]


@pytest.fixture(scope="module")
def rrhf_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    root = Path(__file__).resolve().parents[1]
    out = tmp_path_factory.mktemp("rrhf")
    return out, run_script(root / "recipes" / "rrhf.py", f"--output_dir={out}", *TINY_RRHF)


def test_rrhf_goes_from_sampling_to_the_tuned_adapter(rrhf_run) -> None:
    out, result = rrhf_run
    assert result.returncode == 0, result.stderr[-3000:]
    for wanted in ("Before and after RRHF", "gold reward", "KL from the reference", "response length", "distinct-2"):
        assert wanted in result.stdout
    assert result.stdout.count("prompt: ") == 3
    records = [json.loads(line) for line in (out / "responses.jsonl").read_text().splitlines()]
    assert [len(record["responses"]) for record in records] == [4] * 8
    assert sum("lora_B" in name for name, _ in AutoPeftModelForCausalLM.from_pretrained(out).named_parameters()) > 0
    assert (out / "training.png").stat().st_size > 5000


@pytest.mark.slow
def test_responses_are_sampled_by_name_and_rrhf_trains_on_them(rrhf_run, tmp_path: Path, repo_root: Path) -> None:
    world = next((rrhf_run[0] / "world").glob("world-*"))
    rows = [
        {"prompt": f"one day the little {name} went to the hill .", "human": " she slept ."} for name in ("fox", "cat")
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "rewards.py").write_text(
        "def length(completions, **kwargs):\n    return [len(c) for c in completions]\n"
    )
    common = [
        f"--model_name_or_path={world / 'base'}",
        f"--policy_adapter={world / 'policy'}",
        f"--reward_funcs={tmp_path / 'rewards.py'}:length",
        "--max_new_tokens=6",
    ]
    sampling = [
        f"--dataset_name={tmp_path / 'prompts.jsonl'}",
        f"--output={tmp_path / 'responses.jsonl'}",
        f"--reward_adapter={world / 'reward'}",
        "--response_columns=human",
        "--sampling_methods",
        "temperature:2",
        "beam:2",
    ]
    result = run_script(repo_root / "recipes" / "sample_responses.py", *common, *sampling)
    assert result.returncode == 0, result.stderr[-3000:]
    for wanted in ("temperature", "beam", "human", "0 prompts were there, 2 are new"):
        assert wanted in result.stdout
    training = [f"--dataset_name={tmp_path / 'responses.jsonl'}", f"--output_dir={tmp_path / 'out'}", "--max_steps=1"]
    training += ["--report_to=none", "--gradient_checkpointing=false", "--use_cpu=true"]
    result = run_script(repo_root / "recipes" / "rrhf.py", *common, *training)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Before and after RRHF" in result.stdout


@pytest.mark.parametrize(
    ("recipe", "arguments", "message"),
    [
        ("rrhf", ["--model_name_or_path=a", "--output_dir=x"], "--dataset_name is missing"),
        ("rrhf", ["--model_name_or_path=a", "--output_dir=x", "--dataset_name=y"], "nothing scores the responses"),
        ("sample_responses", [], "--model_name_or_path is missing"),
        ("sample_responses", ["--model_name_or_path=a", "--dataset_name=y"], "--output is missing"),
    ],
)
def test_what_rrhf_lacks_is_said_before_anything_is_loaded(recipe: str, arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        importlib.import_module(f"trl_ext.scripts.{recipe}").main(arguments)


@pytest.mark.slow
def test_compare_makes_one_table_and_goes_on_where_it_stopped(rrhf_run, repo_root: Path) -> None:
    out = rrhf_run[0]
    flags = [f"--output_dir={out}", "--world_scale=0.02", "--samples=32", "--eval_prompts=4", "--max_new_tokens=6"]
    command = [sys.executable, str(repo_root / "recipes" / "experiments" / "compare.py"), *flags, "--methods"]
    environment = os.environ | {"PYTHONPATH": str(repo_root), "OMP_NUM_THREADS": "1"}
    keywords = {"env": environment, "capture_output": True, "text": True, "timeout": 280}
    first = subprocess.run([*command, "best_of_n"], **keywords, check=False)
    assert first.returncode == 0, first.stderr[-3000:]
    kept = json.loads((out / "results.json").read_text())["results"][0]
    second = subprocess.run([*command, "best_of_n", "rrhf"], **keywords, check=False)
    assert second.returncode == 0, second.stderr[-3000:]
    assert "best of n, seed 0 ..." not in second.stdout  # it was there
    results = json.loads((out / "results.json").read_text())["results"]
    assert [result["method"] for result in results] == ["best_of_n", "sample", "rrhf"]
    assert results[0] == kept
    table = (out / "table.md").read_text().splitlines()
    assert table[0] == "| method | reward | gold | KL | perplexity | length | distinct-2 | seconds | memory, GiB |"
    assert len(table) == 4
    assert (out / "reward_kl.png").stat().st_size > 5000
    third = subprocess.run([*command, "best_of_n", "--best_of=8"], **keywords, check=False)
    assert "another best_of" in third.stderr
