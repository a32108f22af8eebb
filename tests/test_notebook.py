"""The notebooks: what is saved in them, how they install, and that they run from the first cell to the last."""

import base64
import importlib.util
import json
import re
import subprocess
from pathlib import Path

import pytest

from trl_ext.toy import build_model, build_tokenizer

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
notebooks = pytest.importorskip("tests.notebooks")
execute, parameters = notebooks.execute, notebooks.parameters

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
TINY = {
    "PROMPTS": 8,
    "MAX_PROMPT_TOKENS": 16,
    "MAX_COMPLETION_TOKENS": 8,
    "WORDS": 5,
    "OPTIMIZER_BATCH": 4,
    "ROLLOUT_BATCH": 8,
    "MAX_STEPS": 4,
}


def read(path: Path):
    return nbformat.read(path, as_version=4)


def code(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(run, kind: str) -> str:
    """Everything printed, or the names of the pictures' formats."""
    found = [output for cell in code(run) for output in cell.outputs]
    if kind == "text":
        return "".join(output.text for output in found if output.output_type == "stream" and output.name == "stdout")
    return " ".join(key for output in found for key in output.get("data", {}))


# ---------------------------------------------------------------------- as they are kept


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_it_opens_in_colab_and_says_where_it_installs_from_in_its_first_cell_of_code(path: Path) -> None:
    notebook = read(path)
    (badge,) = re.findall(
        r"\(https://colab\.research\.google\.com/github/(\S+?)/blob/main/(\S+?)\)", notebook.cells[0].source
    )
    assert badge[1] == f"docs/notebooks/{path.name}"
    first = code(notebook)[0]
    assert first is notebook.cells[parameters(notebook)]
    assert f'SOURCE = "git+https://github.com/{badge[0]}"' in first.source
    assert ".whl" in first.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_what_it_showed_is_kept_without_errors_and_folders_of_a_machine(path: Path) -> None:
    notebook = read(path)
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    kinds = {output.output_type for cell in code(notebook) for output in cell.outputs}
    assert kinds == {"stream", "display_data"}
    assert "image/png" in outputs(notebook, "data")
    assert not re.search(r"(?<![\w.])/(?:home|root|tmp|work|usr|content)/", outputs(notebook, "text"))
    size = sum(len(base64.b64decode(o.data["image/png"])) for c in code(notebook) for o in c.outputs if "data" in o)
    assert size < 300_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_it_installs_a_repository_or_a_wheel_and_nothing_unnamed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (install,) = (cell.source for cell in code(read(path)) if "pip" in cell.source)
    asked: list[list[str]] = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "check_call", asked.append)
    for source in ("trl_ext-0.1.0-py3-none-any.whl", "git+https://github.com/someone/trl_ext"):
        exec(install, {"SOURCE": source})
        assert asked[-1][1:] == ["-m", "pip", "install", "-q", source]
    with pytest.raises(SystemExit, match="SOURCE"):
        exec(install, {"SOURCE": "git+https://github.com/OWNER/trl_ext"})
    assert len(asked) == 2


# ---------------------------------------------------------------------- run


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory):
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("notebook")
    tokenizer = build_tokenizer()
    build_model(tokenizer, seed=0).save_pretrained(folder / "model")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    texts = [f"one morning the little {animal} went to the river ." for animal in ("fox", "bear", "hen", "cat")] * 2
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in texts]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    values = {"MODEL": str(folder / "model"), "DATASET": str(folder / "prompts.jsonl"), **TINY}
    notebook = read(FOLDER / "ppo_max_qlora.ipynb")
    assert all(name in code(notebook)[0].source for name in values)
    return execute(notebook, folder, values), folder


def test_it_plans_trains_in_4_bits_and_shows_samples_and_curves(executed) -> None:
    run, folder = executed
    assert [cell.execution_count for cell in code(run)] == list(range(1, len(code(run)) + 1))
    text = outputs(run, "text")
    for wanted in ("computes in torch.float32", "KV cache / activations kept", "micro-batches of", "4-bit base: True"):
        assert wanted in text
    assert text.count("PROMPT: one morning") == 6
    assert text.count("BEFORE (") == 6
    assert text.count("AFTER (") == 3
    assert "image/png" in outputs(run, "data")
    assert (folder / "ppo_max_qlora" / "adapter_model.safetensors").is_file()
    assert (folder / "ppo_max_qlora" / "critic" / "adapter_config.json").is_file()


@pytest.mark.slow
def test_the_loop_from_inside(tmp_path: Path) -> None:
    run = execute(read(FOLDER / "the_loop.ipynb"), tmp_path, {"SCALE": 0.05, "MAX_STEPS": 8, "GUARD_STEPS": 24})
    text = outputs(run, "text")
    for wanted in ("PROMPT: one", "correlation over 64 completions", "advantage", "reward model", "comparison.html"):
        assert wanted in text
    assert outputs(run, "data").count("image/png") == 2
    assert (tmp_path / "loop" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "comparison.html").stat().st_size < 3_000_000
