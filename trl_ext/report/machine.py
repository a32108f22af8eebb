"""What a run ran on, and with: versions, hardware, the peak of its memory, its command line."""

import importlib.metadata
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

LIBRARIES = (
    "trl_ext",
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "bitsandbytes",
    "deepspeed",
    "vllm",
)
SECRET = ("token", "key", "password", "secret")
NO_SECRET = ("--eos_token", "--pad_token")


def versions() -> dict[str, str]:
    """Version of Python and of each library that is installed."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # of no use to this run
            continue
    return found


def hardware(device: torch.device, processes: int) -> dict[str, Any]:
    """The device that trained, how many of them, and the machine around it."""
    facts: dict[str, Any] = {
        "device": str(device.type),
        "processes": processes,
        "cpu_cores": os.cpu_count(),
        "system": platform.platform(terse=True),
        "machine": platform.machine(),
    }
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        facts |= {"card": card.name, "card_gib": round(card.total_memory / 2**30, 2)}
    return facts


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process so far in GiB: allocated on the card, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":  # which has no `resource`
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**30
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def this_command() -> str:
    """The command of this process as `command_line`: `trl-ext ...` where that was typed, without its folder."""
    program = Path(sys.argv[0])
    start = [Path(sys.executable).name, sys.argv[0]]
    if program.stem == "trl-ext":
        start = [program.stem]
    elif program.name == "__main__.py":  # python -m, as accelerate's launcher starts it
        start = [start[0], "-m", program.parent.name]
    return command_line([*start, *sys.argv[1:]])


def command_line(arguments: Sequence[str]) -> str:
    """A command as a shell reads it; values of flags that name a secret are left out."""
    shown: list[str] = []
    hide = False
    for argument in arguments:
        flag, equals, _ = argument.partition("=")
        secret = flag.startswith("--") and flag.lower().endswith(SECRET) and flag not in NO_SECRET
        if hide and not argument.startswith("--"):
            shown.append("...")
        else:
            shown.append(f"{flag}=..." if secret and equals else argument)
        hide = secret and not equals
    return shlex.join(shown)
