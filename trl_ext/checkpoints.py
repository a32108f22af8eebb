"""Which checkpoints are whole, and which one a run goes on from.

`Trainer` writes a checkpoint file by file, its state last. A run that is killed, or whose disk is full, leaves a folder
that looks like a checkpoint and is none. Here every file is looked into: one that is missing or torn is named, and a
run that asks for its last checkpoint gets the last one that is whole.
"""

import contextlib
import errno
import json
import logging
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

LOGGER = logging.getLogger(__name__)
STATE_FILE = "trainer_state.json"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
TRAINING_FILES = ("optimizer.pt", "scheduler.pt")  # where no engine keeps them in files of its own
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
TORCH_WRITERS = ("inline_container", "PytorchStreamWriter", "iostream")  # in errors of `torch.save` about a file
NAME = re.compile(r"checkpoint-(\d+)")


def what_is_wrong(
    folder: str | Path, adapters: Iterable[str] = (), training_files: Iterable[str] = TRAINING_FILES
) -> str | None:
    """What keeps a run from going on at a checkpoint; None: it is whole.

    Args:
        folder: Of the checkpoint.
        adapters: Names of the subfolders that hold adapters beside the one in the folder itself.
        training_files: Where the engine keeps optimizer and schedule; patterns, each of at least one file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return f"there is no folder {folder}"
    wanted = [folder / name for name in ADAPTER_FILES]
    wanted += [folder / name / file for name in adapters for file in ADAPTER_FILES]
    for pattern in training_files:
        wanted += sorted(folder.glob(pattern)) or [folder / pattern]
    wanted += [*sorted(folder.glob("rng_state*.pth")), folder / STATE_FILE]
    for path in wanted:
        problem = _problem(path)
        if problem is not None:
            return f"{path.relative_to(folder)} {problem}"
    missing = [name for name in _random_states(folder) if not (folder / name).is_file()]
    return f"{missing[0]} is missing" if missing else None


def _random_states(folder: Path) -> list[str]:
    """Files of the random states of all processes that wrote a checkpoint; each writes its own, no order among them."""
    state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    callbacks = state.get("stateful_callbacks") if isinstance(state, dict) else None
    saved = (callbacks or {}).get("EngineCallback")
    processes = saved.get("attributes", {}).get("processes", 0) if isinstance(saved, dict) else 0
    return ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]


def _problem(path: Path) -> str | None:
    """Why a file cannot be read; the last byte of each kind shows whether it was written to its end."""
    if not path.is_file():
        return "is missing"
    try:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                file.keys()
        else:
            with zipfile.ZipFile(path) as file:
                file.namelist()
    except (OSError, ValueError, SafetensorError, zipfile.BadZipFile) as error:
        return f"is torn or damaged ({str(error)[:80]})"
    return None


def checkpoints_of(output_dir: str | Path) -> list[Path]:
    """Folders named as checkpoints, the newest step first."""
    found = [(NAME.fullmatch(path.name), path) for path in Path(output_dir).glob("checkpoint-*") if path.is_dir()]
    return [path for _, path in sorted(((int(m[1]), path) for m, path in found if m), reverse=True)]


def newest_whole(
    output_dir: str | Path,
    adapters: Iterable[str] = (),
    training_files: Iterable[str] = TRAINING_FILES,
    difference: Callable[[Path], str | None] = lambda folder: None,
) -> tuple[Path | None, dict[Path, str], dict[Path, str]]:
    """The newest whole checkpoint of a run, None where there is none.

    Args:
        output_dir: Where the checkpoints lie.
        adapters, training_files: See `what_is_wrong`.
        difference: In what a whole checkpoint is one of another run; None: in nothing.

    Returns:
        It; newer ones that are not whole, with the reason; newer ones of another run, with what differs.
    """
    adapters, training_files = list(adapters), list(training_files)
    torn: dict[Path, str] = {}
    others: dict[Path, str] = {}
    for path in checkpoints_of(output_dir):
        problem = what_is_wrong(path, adapters, training_files)
        if problem is not None:
            torn[path] = problem
            continue
        problem = difference(path)
        if problem is None:
            return path, torn, others
        others[path] = problem
    return None, torn, others


def checkpoint_to_resume(
    given: str | bool | None,
    output_dir: str | Path,
    adapters: Iterable[str] = (),
    training_files: Iterable[str] = TRAINING_FILES,
    difference: Callable[[Path], str | None] = lambda folder: None,
) -> str | None:
    """The folder that a run goes on from; None: it starts anew.

    A run that is always started with True goes on by itself however often it is killed: before its first checkpoint
    there is none, and it starts anew with a warning that says so.

    Args:
        given: True for the newest whole one in `output_dir`, if there is one; a folder; None or False for none.
        output_dir, adapters, training_files, difference: See `newest_whole`.

    Raises:
        ValueError: The folder given is not whole, or it and all whole ones are of another run; it names the file, or
            what differs.
    """
    if given is None or given is False:
        return None
    if given is not True:
        problem = what_is_wrong(given, adapters, training_files)
        if problem is not None:
            raise ValueError(
                f"resume_from_checkpoint={given!r} is not a whole checkpoint of this run: {problem}. Give another one, "
                "or True for the newest whole one."
            )
        problem = difference(Path(given))
        if problem is not None:
            raise ValueError(f"resume_from_checkpoint={given!r} is no checkpoint of this run: {problem}.")
        return str(given)
    path, torn, others = newest_whole(output_dir, adapters, training_files, difference)
    skipped = torn | others
    reasons = "; ".join(f"{folder.name}: {problem}" for folder, problem in skipped.items())
    if path is None and others:
        newest, problem = next(iter(others.items()))
        raise ValueError(
            f"resume_from_checkpoint=True, but what lies in {output_dir} is of another run; {newest.name}: {problem}. "
            "Set that back, or start anew in another output_dir."
        )
    if path is None:
        left = f"; folders that are not were skipped: {reasons}" if reasons else ""
        LOGGER.warning("starting anew: %s holds no whole checkpoint to go on from%s", output_dir, left)
        return None
    if skipped:
        LOGGER.warning(
            "going on from %s; newer folders that are not whole, or of another run, were skipped: %s", path, reasons
        )
    return str(path)


class NotWrittenError(RuntimeError):
    """A checkpoint or a model could not be written to the disk."""


@contextlib.contextmanager
def explained_writing(folder: str | Path) -> Iterator[None]:
    """Say what could not be written where a disk is full, and that earlier checkpoints are as they were.

    Raises:
        NotWrittenError: A file in `folder` could not be written.
    """
    try:
        yield
    except NotWrittenError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        number = re.search(r"os error (\d+)", str(error)) if isinstance(error, SafetensorError) else None
        code = int(number[1]) if number else getattr(error, "errno", None)
        if code not in DISK_ERRORS and not any(name in str(error) for name in TORCH_WRITERS):
            raise
        raise NotWrittenError(
            f"{folder} could not be written ({error}). Is the disk full? Checkpoints written before it are as they "
            "were: make room and go on with resume_from_checkpoint=True."
        ) from error


def make_room(args: Any, step: int) -> None:
    """Remove an older checkpoint of this step: half overwritten it would look whole, of two runs."""
    if args.should_save:
        shutil.rmtree(Path(str(args.output_dir)) / f"checkpoint-{step}", ignore_errors=True)


def flush(folder: str | Path) -> None:
    """Force a finished checkpoint to the disk, and its name with it."""
    folder = Path(folder)
    paths, how = [path for path in folder.rglob("*") if path.is_file()], os.O_RDONLY
    if sys.platform == "win32":  # where folders cannot be forced, nor files that are open for reading alone
        how = os.O_RDWR
    else:
        paths += [*(path for path in folder.rglob("*") if path.is_dir()), folder, folder.parent]
    for path in paths:
        descriptor = os.open(path, how)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
