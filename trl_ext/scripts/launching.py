"""Starting a command through accelerate: on how many devices, with which of its flags, and how it ends."""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.commands.config import default_config_file
from accelerate.commands.launch import launch_command, launch_command_parser

from trl_ext.scripts.configs import ACCELERATE, find_config

# Flags that accelerate's launcher has too: they are the command's.
SHARED = ("debug", "gradient_accumulation_steps")
# Flags that say what is started, which the command says itself
NOT_PASSED_ON = ("help", "module", "no_python")


class LauncherFlags(argparse.ArgumentParser):
    """The flags of `accelerate launch`, to tell them from those of a command."""

    def __init__(self) -> None:
        super().__init__(parents=[launch_command_parser()], add_help=False, allow_abbrev=False)

    def split(self, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
        """(those of the launcher, the others), each with its values, in order."""
        theirs: list[str] = []
        own: list[str] = []
        part, left = own, 0
        for argument in arguments:
            if argument.startswith("--"):
                flag, _, value = argument.partition("=")
                action = self._option_string_actions.get(flag)
                passed_on = action is not None and action.dest not in SHARED + NOT_PASSED_ON
                part = theirs if passed_on else own
                left = 1 if action is not None and action.nargs is None and not value else 0
            elif part is theirs:
                part, left = (theirs, left - 1) if left else (own, 0)
            part.append(argument)
        return theirs, own


def launch(name: str, arguments: Sequence[str]) -> bool:
    """Start the processes of a command, and wait for them; or leave it to this process.

    One process is enough where there is at most one device, no flag of the launcher and no configuration of accelerate:
    it is this one, which ends with its own status and hears signals itself.

    Returns:
        Whether nothing was started, and the command is left to this process.

    Raises:
        SystemExit: A process failed: its status.
        ValueError: `--config_file` names none.
    """
    theirs, own = LauncherFlags().split(arguments)
    configured = Path(default_config_file).is_file()
    if not theirs and not configured and torch.accelerator.device_count() < 2:
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)  # as accelerate's launcher does: the same run by either
        return True
    options = launch_command_parser().parse_args([*theirs, "--module", "trl_ext", name, *own])
    options.quiet = True  # the command has said what was wrong
    if options.config_file is not None:
        options.config_file = str(find_config(options.config_file, "--config_file", ACCELERATE))
    hand_on_signals()
    print(f"trl-ext {name}: starting accelerate's launcher ...", file=sys.stderr, flush=True)
    start(name, options)
    return False


def start(name: str, options: Any) -> None:
    """`launch_command`, which ends as the first process that failed, without a traceback of its own.

    Raises:
        SystemExit: With the status of that process.
    """
    import torch.distributed.run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for logger in ("accelerate.commands.launch", "torch.distributed.elastic", torch.distributed.run.__name__):
        silence(logger)
    try:
        launch_command(options)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        status = failure.exitcode
        how = f"by signal {-status}" if status < 0 else f"with status {status}"
        print(f"trl-ext {name}: process {rank} ended {how}; what it said is above.", file=sys.stderr, flush=True)
        raise SystemExit(status if status > 0 else 128 - status) from None


def silence(name: str) -> None:
    """Hide what a logger and those below it say of processes that end: the processes say it themselves."""
    for known in [name, *(other for other in logging.root.manager.loggerDict if other.startswith(f"{name}."))]:
        logging.getLogger(known).setLevel(logging.CRITICAL)


def hand_on_signals() -> None:
    """SIGTERM goes to the processes that were started. SIGINT they get from the terminal: this one only waits."""
    import psutil

    def hand_on(number: int, frame: Any) -> None:
        for child in psutil.Process().children():
            child.send_signal(number)

    signal.signal(signal.SIGTERM, hand_on)
    signal.signal(signal.SIGINT, lambda number, frame: None)
