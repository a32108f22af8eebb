"""Whole recipes at tiny size, started as a scheduler starts them: the same command every time."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LONGEST = 280  # seconds of a run
SAVED = [
    *["--resume_from_checkpoint=true", "--save_strategy=steps", "--save_steps=2", "--logging_steps=1"],
    *["--use_cpu=true", "--report_to=none", "--gradient_checkpointing=false", "--disable_tqdm=true"],
]
FLAGS = {
    "ppo_max": [
        *["--world_scale=0.02", "--max_steps=8", "--eval_prompts=4", "--per_device_train_batch_size=4"],
        *["--per_device_eval_batch_size=4", "--steps_per_generation=1", "--critic_warmup_steps=2"],
        *["--max_completion_length=12"],
    ],
    "rrhf": [
        *["--world_scale=0.02", "--max_prompts=16", "--max_new_tokens=8", "--eval_prompts=4"],
        *["--per_device_train_batch_size=2", "--num_train_epochs=1", "--online_every_steps=1"],
        *["--max_completion_length=8"],
    ],
    "reward_model": ["--world_scale=0.03", "--max_steps=8", "--warmup_steps=0", "--per_device_train_batch_size=8"],
}
TIMES = ("runtime", "second", "time", "flos", "memory")


@dataclass
class Recipe:
    """A recipe and its flags; `output_dir` comes with each run."""

    name: str
    flags: list[str]
    seconds: float = 0.0  # that a run takes which nobody kills
    writes: int = 0  # into checkpoints
    checkpoints: int = 0
    results: dict[str, Any] = field(default_factory=dict)

    def start(self, folder: Path, dies_at: int = 0, largest_file: int | None = None) -> subprocess.Popen[str]:
        """The recipe in a process, which is killed at one of its writes, or cannot write large files."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        command = [sys.executable, str(Path(__file__).with_name("die.py")), str(folder), str(dies_at)]
        command += [str(ROOT / "recipes" / f"{self.name}.py"), f"--output_dir={folder}", *self.flags]
        folder.mkdir(exist_ok=True)

        def limit() -> None:
            if largest_file is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=limit
        )

    def run(self, folder: Path, seconds: float | None = None, **options: Any) -> tuple[int, str]:
        """Exit status and output of a run that is killed after so many seconds."""
        process = self.start(folder, **options)
        try:
            output, _ = process.communicate(timeout=seconds or LONGEST)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
        return process.returncode, output

    def measure(self, folder: Path) -> None:
        """What an uninterrupted run leaves, how long it takes, and how often it writes into checkpoints."""
        began = time.monotonic()
        status, output = self.run(folder)
        assert status == 0, output[-4000:]
        self.seconds = time.monotonic() - began
        self.writes, self.results = int((folder / "writes.txt").read_text()), results_of(folder)
        self.checkpoints = len(list(folder.rglob("checkpoint-*/trainer_state.json")))

    def moments(self, count: int, rng: random.Random) -> list[tuple[str, float]]:
        """When to kill: every other time at a write into a checkpoint, else after a time; a share of what is left."""
        return [("write" if k % 2 == 0 else "time", rng.random()) for k in range(count)]

    def kill(self, folder: Path, kind: str, share: float) -> dict[str, Any]:
        """Options of `run`. A run that goes on has less to write and less time to live."""
        done = len(list(folder.rglob("checkpoint-*/trainer_state.json")))
        left = max(1 - done / self.checkpoints, 0)
        if kind == "write" and left > 0:
            return {"dies_at": 1 + int(share * 0.9 * left * self.writes)}
        return {"seconds": self.seconds * (0.2 + 0.7 * share * max(left, 0.2))}

    def survive(self, folder: Path, moments: list[tuple[str, float]], world: Path | None = None) -> list[str]:
        """Run until it ends by itself, killed at these moments; anew in another folder where it ends before the last.

        Returns:
            What was printed by each run.

        Raises:
            AssertionError: A run failed, or ended with other results.
        """
        left, outputs = list(moments), []
        while left:
            folder = folder.with_name(f"{folder.name}+")
            folder.mkdir()
            if world is not None and outputs:  # the first time it builds one, in which it may be killed too
                (folder / "world").symlink_to(world)
            while True:
                status, output = self.run(folder, **(self.kill(folder, *left[0]) if left else {}))
                outputs.append(output)
                if status == 0:
                    break
                assert status == -signal.SIGKILL, output[-4000:]
                left.pop(0)
            if left:  # it ended before it could be killed: earlier in the next
                left[0] = left[0][0], left[0][1] * 0.7
            found = results_of(folder)
            assert found.keys() == self.results.keys()
            assert [name for name in found if found[name] != self.results[name]] == []
            shutil.rmtree(folder)
        return outputs


def results_of(folder: Path) -> dict[str, Any]:
    """Everything by which two runs must be equal: adapters to the last bit, their scales, and figures without times."""
    found: dict[str, Any] = {}
    for name in ("adapter_model.safetensors", "reward_scale.json"):
        for path in sorted(folder.rglob(name)):
            found[str(path.relative_to(folder))] = path.read_bytes()
    found = {name: content for name, content in found.items() if not name.startswith(("world", "."))}
    for name in ("before_after.json", "evaluation.json", "judgement.json"):
        if (folder / name).is_file():
            found[name] = without_times(json.loads((folder / name).read_text()))
    return found


def without_times(found: Any) -> Any:
    """Figures that hang on the run and not on the machine."""
    if not isinstance(found, dict):
        return found
    kept = {key: value for key, value in found.items() if not any(word in key for word in TIMES)}
    return {key: without_times(value) for key, value in kept.items()}
