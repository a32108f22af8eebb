"""Recipes that a signal stops in training: the exit code, what is not run any more, and that they go on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.ppo.tiny import environment
from tests.scripts.pairs import write_pairs
from trl_ext.toy import build_world

pytestmark = pytest.mark.slow
COMMON = ["--save_strategy=steps", "--save_steps=1", "--logging_steps=1", "--use_cpu=true", "--report_to=none"]
COMMON += ["--gradient_checkpointing=false", "--max_steps=40", "--warmup_steps=0"]
RECIPES = {
    "ppo_max": ["--world_scale=0.02", "--eval_prompts=8", "--per_device_train_batch_size=4", "--critic_warmup_steps=1"],
    "rrhf": ["--world_scale=0.02", "--max_prompts=16", "--max_new_tokens=8", "--eval_prompts=4"],
    "reward_model": ["--world_scale=0.03", "--per_device_train_batch_size=8"],
}
RESULTS = {"ppo_max": "before_after.json", "rrhf": "before_after.json", "reward_model": "evaluation.json"}


def start(repo_root: Path, recipe: str, folder: Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, str(repo_root / "recipes" / f"{recipe}.py"), f"--output_dir={folder}", *flags]
    return subprocess.Popen(
        command,
        env=environment(repo_root),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def stop_when_saved(process: subprocess.Popen, folder: Path, number: int) -> tuple[str, str]:
    """The signal when the first checkpoint is being written; what the process has printed."""
    while not list(folder.glob("**/checkpoint-*")) and process.poll() is None:
        time.sleep(0.05)
    os.kill(process.pid, number)
    return process.communicate(timeout=280)


@pytest.mark.parametrize(
    ("recipe", "number"),
    [*((recipe, signal.SIGTERM) for recipe in RECIPES), ("ppo_max", signal.SIGINT)],
)
def test_a_recipe_stops_and_goes_on(repo_root: Path, tmp_path: Path, recipe: str, number: int) -> None:
    folder, flags = tmp_path / "out", [*RECIPES[recipe], *COMMON]
    process = start(repo_root, recipe, folder, *flags)
    out, err = stop_when_saved(process, folder, number)
    assert process.returncode == 128 + number, err[-3000:]
    assert f"{signal.Signals(number).name}: training ended after step" in out, err[-3000:]
    assert "go on with resume_from_checkpoint=True" in out
    assert "Traceback" not in err
    assert not (folder / RESULTS[recipe]).exists()
    again = start(repo_root, recipe, folder, *flags, "--resume_from_checkpoint=true")
    out, err = again.communicate(timeout=280)
    assert again.returncode == 0, err[-3000:]
    assert (folder / RESULTS[recipe]).is_file()


def test_the_pipeline_goes_on_with_the_member_that_it_was_in(repo_root: Path, tmp_path: Path) -> None:
    world, folder = build_world(tmp_path / "world", scale=0.02, template="chatml"), tmp_path / "out"
    write_pairs(tmp_path)
    (tmp_path / "reward.yaml").write_text(
        "use_cpu: true\ngradient_checkpointing: false\nreport_to: none\nsave_strategy: steps\nsave_steps: 1\n"
        "max_steps: 20\nbf16: false\nper_device_train_batch_size: 4\nlearning_rate: 1.0e-3\ndisable_tqdm: true\n"
    )
    flags = [f"--model_name_or_path={world.base}", f"--policy_adapter={world.policy_adapter}", "--members=2"]
    flags += [f"--dataset_name={tmp_path / 'train.jsonl'}", f"--dataset_test_name={tmp_path / 'test.jsonl'}"]
    flags += [f"--reward_config={tmp_path / 'reward.yaml'}", "--judged_prompts=6", "--max_completion_length=8"]
    flags += ["--per_device_train_batch_size=4", "--steps_per_generation=2", "--bf16=false", "--critic_warmup_steps=0"]
    flags += [*COMMON, "--max_steps=4"]
    process = start(repo_root, "pipeline", folder, *flags)
    out, err = stop_when_saved(process, folder, signal.SIGTERM)
    assert process.returncode == 143, err[-3000:]
    assert "the same command goes on there." in out
    again = start(repo_root, "pipeline", folder, *flags, "--resume_from_checkpoint=true")
    _, err = again.communicate(timeout=280)
    assert again.returncode == 0, err[-3000:]
    assert (folder / "judgement.json").is_file()
