"""Real processes for tests, forked from one server that has imported torch, TRL and the recipes: no import is repeated.

The server is that of the standard library (`multiprocessing`, start method `forkserver`); it has run nothing, so what
it forks is like a fresh interpreter but for the imports. What an interpreter, `accelerate launch` or torchrun adds is
not there; tests of those start them.
"""

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["trl_ext.scripts.ppo_max", "trl_ext.scripts.rrhf", "trl_ext.scripts.pipeline"])


class Done(NamedTuple):
    """What is left of a process, as of `subprocess.run`."""

    returncode: int | None
    stdout: str
    stderr: str


def _run_script(script: str, arguments: list[str], environment: dict[str, str], output: str) -> None:
    """Be `python SCRIPT ARGUMENTS` in the root of the repository, with both streams into files."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    for stream, name in ((sys.stdout, "stdout"), (sys.stderr, "stderr")):
        with open(f"{output}.{name}", "w") as file:
            os.dup2(file.fileno(), stream.fileno())
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")


def free_port() -> int:
    """One that nothing listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def run_script(script: Path, *arguments: Any, processes: int = 1, timeout: float = 280, **environment: str) -> Done:
    """Run a Python script on so many processes, as torchrun starts them; what the first wrote, and how it ended.

    Where another ended worse, that one's. `environment` comes on top of that of the tests.
    """
    shared = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    port = str(free_port())
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for rank in range(processes):
            own = shared
            if processes > 1:
                own = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
                own |= {"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            given = (str(script), [str(argument) for argument in arguments], own, f"{folder}/{rank}")
            started.append(SERVER.Process(target=_run_script, args=given))
            started[-1].start()
        _wait(started, timeout)
        outputs = [Path(f"{folder}/{rank}.{name}") for rank in range(processes) for name in ("stdout", "stderr")]
        texts = [path.read_text() if path.exists() else "" for path in outputs]
    codes = [process.exitcode for process in started]
    worst = next((rank for rank, code in enumerate(codes) if code != 0), 0)
    return Done(codes[worst], texts[2 * worst], texts[2 * worst + 1])


def _wait(started: list[Any], timeout: float) -> None:
    """Until all have ended; the others are ended when one has failed, as torchrun does, or when time is up."""
    end = time.monotonic() + timeout
    while any(process.is_alive() for process in started):
        if time.monotonic() > end or any(process.exitcode for process in started):
            time.sleep(1)  # the others may be about to say the same
            for process in started:
                process.kill()
        time.sleep(0.05)
    for process in started:
        process.join()
