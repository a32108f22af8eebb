"""Which checkpoints are whole, and which one a run goes on from.

`Trainer` writes a checkpoint file by file, its state last. A run that is killed, or whose disk is full, leaves a folder
that looks like a checkpoint and is none. Here every file is looked into: one that is missing or torn is named, and a
run that asks for its last checkpoint gets the last one that is whole.
"""

import json
import logging
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

LOGGER = logging.getLogger(__name__)
STATE_FILE = "trainer_state.json"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
TRAINING_FILES = ("optimizer.pt", "scheduler.pt")  # where no engine keeps them in files of its own
NAME = re.compile(r"checkpoint-(\d+)")


def what_is_wrong(folder: str | Path, adapters: Iterable[str] = (), with_optimizer: bool = True) -> str | None:
    """What keeps a run from going on at a checkpoint; None: it is whole.

    Args:
        folder: Of the checkpoint.
        adapters: Names of the subfolders that hold adapters beside the one in the folder itself.
        with_optimizer: Whether optimizer and schedule lie in `TRAINING_FILES`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return f"there is no folder {folder}"
    wanted = [folder / name for name in ADAPTER_FILES]
    wanted += [folder / name / file for name in adapters for file in ADAPTER_FILES]
    wanted += [folder / name for name in (TRAINING_FILES if with_optimizer else ())]
    wanted += [*sorted(folder.glob("rng_state*.pth")), folder / STATE_FILE]
    for path in wanted:
        problem = _problem(path)
        if problem is not None:
            return f"{path.relative_to(folder)} {problem}"
    return None


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
    with_optimizer: bool = True,
    difference: Callable[[Path], str | None] = lambda folder: None,
) -> tuple[Path | None, dict[Path, str]]:
    """The newest whole checkpoint of a run, None where there is none; and newer ones that are not, with the reason.

    Args:
        output_dir: Where the checkpoints lie.
        adapters, with_optimizer: See `what_is_wrong`.
        difference: In what a whole checkpoint is one of another run; None: in nothing.
    """
    adapters = list(adapters)
    skipped: dict[Path, str] = {}
    for path in checkpoints_of(output_dir):
        problem = what_is_wrong(path, adapters, with_optimizer) or difference(path)
        if problem is None:
            return path, skipped
        skipped[path] = problem
    return None, skipped


def checkpoint_to_resume(
    given: str | bool | None,
    output_dir: str | Path,
    adapters: Iterable[str] = (),
    with_optimizer: bool = True,
    difference: Callable[[Path], str | None] = lambda folder: None,
) -> str | None:
    """The folder that a run goes on from.

    Args:
        given: True for the newest whole one in `output_dir`; a folder; None or False: the run starts anew.
        output_dir, adapters, with_optimizer, difference: See `newest_whole`.

    Raises:
        ValueError: There is none, or the folder given is not whole or of another run; it names the file, or what
            differs.
    """
    if given is None or given is False:
        return None
    if given is not True:
        problem = what_is_wrong(given, adapters, with_optimizer)
        if problem is not None:
            raise ValueError(
                f"resume_from_checkpoint={given!r} is not a whole checkpoint of this run: {problem}. Give another one, "
                "or True for the newest whole one."
            )
        problem = difference(Path(given))
        if problem is not None:
            raise ValueError(f"resume_from_checkpoint={given!r} is no checkpoint of this run: {problem}.")
        return str(given)
    path, skipped = newest_whole(output_dir, adapters, with_optimizer, difference)
    reasons = "; ".join(f"{folder.name}: {problem}" for folder, problem in skipped.items())
    if path is None:
        raise ValueError(
            f"resume_from_checkpoint=True, but {output_dir} holds no whole checkpoint"
            f"{f' ({reasons})' if reasons else ''}. Leave it out to start anew, or name the folder of one."
        )
    if skipped:
        LOGGER.warning(
            "going on from %s; newer folders that are not whole, or of another run, were skipped: %s", path, reasons
        )
    return str(path)


def make_room(args: Any, step: int) -> None:
    """Remove an older checkpoint of this step: half overwritten it would look whole, of two runs."""
    if args.should_save:
        shutil.rmtree(Path(str(args.output_dir)) / f"checkpoint-{step}", ignore_errors=True)


def flush(folder: str | Path) -> None:
    """Force a finished checkpoint to the disk, and its name with it."""
    folder = Path(folder)
    paths = [*(path for path in folder.rglob("*") if path.is_file()), *(p for p in folder.rglob("*") if p.is_dir())]
    for path in [*paths, folder, folder.parent]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
