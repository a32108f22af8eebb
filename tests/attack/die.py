"""Run by the tests beside it: die.py FOLDER N RECIPE FLAGS ... runs a recipe and is killed at its N-th write.

Writes are counted that a run makes into checkpoints below FOLDER: a file or folder that is made, renamed or removed. At
the N-th the process gets SIGKILL, right after an empty file was opened or in the middle of what `torch.save` writes; 0
lets it live. FOLDER/writes.txt is their number in a run that ended by itself.
"""

import io
import os
import random
import runpy
import signal
import sys
from pathlib import Path

import torch

FOLDER, N = Path(sys.argv[1]).resolve(), int(sys.argv[2])
COUNTED = ("os.mkdir", "os.rename", "os.remove")
count = 0


def is_counted(path: object) -> bool:
    if not isinstance(path, str | os.PathLike):
        return False
    parts = Path(os.path.abspath(path)).parts
    return parts[: len(FOLDER.parts)] == FOLDER.parts and any(part.startswith("checkpoint-") for part in parts)


def hit() -> bool:
    global count
    count += 1
    return count == N


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def on_event(event: str, arguments: tuple) -> None:
    if event == "open":
        path, mode, flags = arguments
        writes = (flags or 0) & (os.O_WRONLY | os.O_RDWR) if mode is None else set(mode) & set("wax+")
        if writes and is_counted(path) and hit():
            Path(path).touch()  # the hook comes before the file is opened
            die()
    elif event in COUNTED and is_counted(arguments[0]) and hit():
        die()


def torn_save(whole, found, path, *arguments, **options):
    """`torch.save` writes in C++, which no hook sees: a part of the file, then the end."""
    if isinstance(path, str | os.PathLike) and is_counted(path) and hit():
        buffer = io.BytesIO()
        whole(found, buffer, *arguments, **options)
        content = buffer.getvalue()
        descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.write(descriptor, content[: random.Random(N).randrange(len(content))])
        die()
    return whole(found, path, *arguments, **options)


def main() -> None:
    whole = torch.save
    torch.save = lambda *arguments, **options: torn_save(whole, *arguments, **options)
    sys.addaudithook(on_event)
    sys.argv = sys.argv[3:]
    runpy.run_path(sys.argv[0], run_name="__main__")
    (FOLDER / "writes.txt").write_text(str(count))


if __name__ == "__main__":
    main()
