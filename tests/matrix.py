"""Runs the suite with several sets of versions, each in an environment of its own.

    python tests/matrix.py                      # lowest, pinned and newest, one after another
    python tests/matrix.py lowest --folder envs -- tests/ops -x

lowest: every bound of pyproject.toml as it is declared. pinned: constraints.txt. newest: what the bounds allow and the
index has. main: the newest, with TRL and transformers from their main branches. Needs python 3.11 or newer, a package
index, and git for main; an environment that is there already is used again. Exit status 1 where a set fails.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SETS = ("lowest", "pinned", "newest")
MAIN = [f"{name} @ git+https://github.com/huggingface/{name}" for name in ("transformers", "trl")]


def lowest_bounds(requirements: list[str]) -> list[str]:
    """`name==version` of each `name>=version,...`.

    Raises:
        ValueError: A requirement that declares no lower bound.
    """
    found = []
    for requirement in requirements:
        match = re.fullmatch(r"([\w.-]+)(?:\[[\w,]+\])?>=([\w.]+)(?:,.*)?", requirement.replace(" ", ""))
        if match is None:
            raise ValueError(f"{requirement!r} declares no lower bound: write it as name>=version.")
        found.append(f"{match[1]}=={match[2]}")
    return found


def constraints_of(name: str, more: Sequence[str] = ()) -> list[str]:
    """Lines of the constraints file of a set; `more` are `name==version`, which take the place of the set's own."""
    lines = []
    if name == "lowest":
        lines = lowest_bounds(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])
    elif name == "pinned":
        lines = (ROOT / "constraints.txt").read_text().splitlines()
    replaced = {line.partition("==")[0] for line in more}
    return [*(line for line in lines if line.partition("==")[0] not in replaced), *more]


def make_environment(name: str, folder: Path, more: Sequence[str] = ()) -> Path:
    """The python of the set's environment, made where it is not there. torch comes first, as in .ci/run."""
    python = folder / name / ("Scripts" if os.name == "nt" else "bin") / "python"
    done = folder / name / "whole"
    if not done.exists():
        venv.create(folder / name, with_pip=True, clear=True)
        constraints = folder / f"{name}.txt"
        constraints.write_text("\n".join(constraints_of(name, more)) + "\n", encoding="utf-8")
        pip = [str(python), "-m", "pip", "install", "--quiet", "-c", str(constraints)]
        subprocess.run([*pip, "torch"], check=True)
        subprocess.run([*pip, "-e", f"{ROOT}[test]"], check=True)
        if name == "main":  # outside the declared bounds, on purpose
            subprocess.run([*pip[:-2], "--upgrade", "--no-deps", *MAIN], check=True)
        done.touch()
    return python


def run_set(name: str, folder: Path, pytest: list[str], more: Sequence[str] = ()) -> bool:
    """Whether the suite passes with a set; its versions and pytest's report are printed."""
    print(f"=== {name}", flush=True)
    try:
        python = make_environment(name, folder, more)
    except subprocess.CalledProcessError as error:
        print(f"{name}: the environment cannot be made: {error}", flush=True)
        return False
    subprocess.run([str(python), "-m", "pip", "freeze", "--exclude-editable"], check=True)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run([str(python), "-m", "pytest", *pytest], cwd=ROOT, env=environment, check=False)
    return done.returncode == 0


def main() -> None:
    """Run the sets that were asked for, and say how each ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", default=list(SETS), metavar="SET", help=f"{', '.join((*SETS, 'main'))}")
    parser.add_argument("--folder", type=Path, help="where environments go, and are found again; default: a new one")
    parser.add_argument(
        "--with",
        dest="more",
        action="append",
        default=[],
        metavar="NAME==VERSION",
        help="a version that every set gets, as torch==2.13.0 where the index has one CPU build; may be repeated",
    )
    own, pytest = sys.argv[1:], []
    if "--" in own:
        own, pytest = own[: own.index("--")], own[own.index("--") + 1 :]
    options = parser.parse_args(own)
    unknown = set(options.sets) - {*SETS, "main"}
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: sets are {', '.join((*SETS, 'main'))}.")
    folder = (options.folder or Path(tempfile.mkdtemp(prefix="trl_ext-matrix-"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    passed = {name: run_set(name, folder, pytest, options.more) for name in options.sets}
    print("\n".join(f"{name:8}{'passed' if ok else 'FAILED'}" for name, ok in passed.items()))
    raise SystemExit(0 if all(passed.values()) else 1)


if __name__ == "__main__":
    main()
