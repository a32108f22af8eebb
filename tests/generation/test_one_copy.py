"""The real engine in the trainer's process, on a CPU: one copy of the base, and the numbers of both.

Needs an environment with vLLM and the trainer, that tests/vllm_environment.py --with_trainer makes, by
TRL_EXT_ONE_COPY_PYTHON.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.mark.parametrize(("kind", "bound"), [("float32", 1e-5), ("4bit", 0.05)])
def test_trainer_and_engine_compute_the_same_from_one_copy(repo_root: Path, tmp_path: Path, kind: str, bound: float):
    python = os.environ.get("TRL_EXT_ONE_COPY_PYTHON")
    if python is None:
        pytest.skip("no TRL_EXT_ONE_COPY_PYTHON: python tests/vllm_environment.py FOLDER --with_trainer makes one")
    script = repo_root / "tests" / "generation" / "one_copy_run.py"
    environment = os.environ | {"PYTHONPATH": str(repo_root), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    done = subprocess.run([python, script, tmp_path, kind], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    found = json.loads(line.removeprefix("FOUND "))
    print(f"\n{kind}: {found}")
    assert found["shared"]
    assert found["base as it was"]
    assert found["policy moved"]
    assert found["weights"] == 2 * 9 + 3
    assert found["rollouts"] == 3
    assert found["cache, bytes"] == 0
    assert (found["adapters"], found["adapters after"]) == (1, 0)
    assert max(found["base"], found["mean"], found["probe"]) < bound
    for version in found["versions"]:
        assert version["difference"] < bound < version["moved"] / 2
