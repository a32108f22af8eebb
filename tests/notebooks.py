"""Runs a notebook of docs/notebooks, and keeps what it printed.

    python tests/notebooks.py docs/notebooks/the_loop.ipynb
    python tests/notebooks.py docs/notebooks/ppo_max_qlora.ipynb --folder FOLDER --set 'MODEL="tinychat-3m"' PROMPTS=64

It is run in FOLDER with the given values behind its cell of parameters, and written back with its outputs: what was
printed and drawn, without progress bars and warnings. The values are not written: the cell of parameters stays.
"""

import argparse
import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbclient
import nbformat

ROOT = Path(__file__).resolve().parent.parent


def parameters(notebook: Any) -> int:
    """The number of the cell of parameters."""
    (position,) = (i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    return position


def execute(notebook: Any, folder: Path, values: Mapping[str, Any], timeout: int = 250) -> Any:
    """A copy of a notebook, run from its first cell to its last in a kernel of its own."""
    run = nbformat.from_dict(json.loads(json.dumps(notebook)))
    text = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    run.cells.insert(parameters(notebook) + 1, nbformat.v4.new_code_cell(text))
    kernel = {
        "PYTHONPATH": str(ROOT),
        "IPYTHONDIR": str(folder / ".ipython"),
        "HF_DATASETS_CACHE": str(folder / ".cache"),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    before = {name: os.environ.get(name) for name in kernel}
    os.environ.update(kernel)
    try:
        resources = {"metadata": {"path": str(folder)}}
        nbclient.NotebookClient(run, timeout=timeout, kernel_name="python3", resources=resources).execute()
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
    return run


def shown(cell: Any) -> list[Any]:
    """What a cell printed and drew, without what went to the error stream, bars and addresses of objects."""
    kept = []
    for output in cell.outputs:
        if output.output_type == "stream" and output.name == "stdout" and output.text.strip():
            lines = [line for line in output.text.splitlines() if "it/s" not in line and "\r" not in line]
            kept.append(nbformat.v4.new_output("stream", name="stdout", text="\n".join(lines) + "\n"))
        elif "image/png" in output.get("data", {}):
            picture = {"image/png": output.data["image/png"], "text/plain": "a picture"}
            kept.append(nbformat.v4.new_output("display_data", data=picture))
    return kept


def save(path: Path, folder: Path, values: Mapping[str, Any]) -> None:
    """Run a notebook and write it back with what it showed."""
    notebook = nbformat.read(path, as_version=4)
    run = execute(notebook, folder, values, timeout=3600)
    cells = [cell for i, cell in enumerate(run.cells) if i != parameters(notebook) + 1]
    count = 0
    for cell, done in zip(notebook.cells, cells, strict=True):
        if cell.cell_type == "code":
            count += 1
            cell.execution_count, cell.outputs = count, shown(done)
    text = json.dumps(notebook, indent=1, ensure_ascii=False)
    path.write_text(re.sub(re.escape(str(folder)), ".", text) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--folder", type=Path, help="where it runs; default: an empty one")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=JSON")
    options = parser.parse_args()
    values = {name: json.loads(value) for name, _, value in (each.partition("=") for each in options.set)}
    folder = Path(tempfile.mkdtemp()) if options.folder is None else options.folder.resolve()
    save(options.notebook, folder, values)


if __name__ == "__main__":
    main()
