"""`trl-ext`: one word for every job.

`trl-ext ppo-max --flag value ...` answers at once what needs no library (commands, pages, version), says what it is
doing, and starts the command of `catalogue`: in this process where there is one device, through accelerate's launcher
where there are more or its flags are given. `python -m trl_ext ppo-max ...` is one process, whoever starts it
(`torchrun`, `accelerate launch -m`); recipes are `run` with a name.
"""

import contextlib
import difflib
import importlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

import trl_ext
from trl_ext.scripts.catalogue import COMMANDS, overview, render

PACKAGE = Path(__file__).resolve().parents[1]
SHOW_TRACEBACK = "TRL_EXT_TRACEBACK"  # environment: 1 shows the traceback of errors that are a user's
# What this package raises when something that was given is wrong
KINDS = (ValueError, TypeError, RuntimeError)
OTHERS_WAIT = 10  # seconds


def main(arguments: Sequence[str] | None = None, launcher: bool = True) -> None:
    """The console command.

    Args:
        arguments: A command and its flags; default: those of the process.
        launcher: Whether accelerate's launcher may start processes, and its flags are known.

    Raises:
        SystemExit: With 0 where the overview was asked for, 1 after an error, 2 for a command that there is not, 130
            after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return
    name, *flags = arguments
    if name == "--version":
        print(f"trl_ext {trl_ext.__version__}")
        return
    if name not in COMMANDS:
        near = difflib.get_close_matches(name.replace("_", "-"), COMMANDS, n=1)
        meant = f" Did you mean {near[0]}?" if near else ""
        print(f"trl-ext: error: there is no command {name!r}.{meant}\n\n{overview()}", file=sys.stderr)
        raise SystemExit(2)
    if not (launcher and COMMANDS[name].launched):
        run(name, flags)
        return
    if shows_page(name, flags):
        return
    announce(name)
    with plain_errors(name):
        from trl_ext.scripts.launching import launch

        alone = launch(name, flags)
    if alone:
        work(name, flags)


def run(name: str, flags: Sequence[str]) -> None:
    """A command in this process, which may be one of several.

    Raises:
        SystemExit: After an error, 1; after Ctrl-C, 130.
    """
    if not shows_page(name, flags):
        announce(name)
        work(name, flags)


def shows_page(name: str, flags: Sequence[str]) -> bool:
    """Print the page of a command where it was asked for, without any import."""
    asked = COMMANDS[name].page is not None and any(flag in ("-h", "--help") for flag in flags)
    if asked:
        print(render(name))
    return asked


def announce(name: str) -> None:
    """Say that the command begins: the libraries take some seconds to load. Their bars are shown where they last."""
    os.environ.setdefault("TQDM_DELAY", "1")  # read when tqdm is imported
    if os.environ.get("RANK", "0") == "0":
        print(f"trl-ext {name}: loading {COMMANDS[name].loads} ...", file=sys.stderr, flush=True)


def work(name: str, flags: Sequence[str]) -> None:
    """Import a command and call it."""
    with plain_errors(name):
        importlib.import_module(COMMANDS[name].module).main(list(flags))


@contextlib.contextmanager
def plain_errors(name: str) -> Iterator[None]:
    """Print a user's error as one message, without a traceback; all others go on as they are.

    Of several processes the first one speaks: the others wait until the launcher has ended them, and speak where it
    has not, because the error is theirs alone.

    Raises:
        SystemExit: With 1 after such an error, 130 after Ctrl-C.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    except Exception as error:
        if os.environ.get(SHOW_TRACEBACK) == "1" or not is_users(error):
            raise
        rank = os.environ.get("RANK", "0")
        if rank != "0":
            time.sleep(OTHERS_WAIT)
        where = "" if rank == "0" else f" (process {rank})"
        print(f"trl-ext {name}: error{where}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None


def is_users(error: Exception) -> bool:
    """Whether an error says by itself what was wrong with what was given: one that this package raises, or of files."""
    if isinstance(error, OSError):
        return True
    frame = traceback.extract_tb(error.__traceback__)[-1]
    ours = Path(frame.filename).is_relative_to(PACKAGE)
    return ours and isinstance(error, KINDS) and (frame.line or "").startswith("raise")
