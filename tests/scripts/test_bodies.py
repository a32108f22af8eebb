"""What holds for all recipes: thin files, public names of their neighbours only, results before tables, seeds."""

import ast
import os
import re
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

import trl_ext
from trl_ext.scripts import pipeline, ppo_max, reward_model, rrhf
from trl_ext.scripts.catalogue import COMMANDS
from trl_ext.toy import build_world

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
BODIES = [*sorted((ROOT / "trl_ext" / "scripts").glob("*.py")), *sorted((ROOT / "recipes").rglob("*.py"))]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_a_few_lines_and_its_body_is_in_the_package(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 20
    name = re.search(r'^    run\("([\w-]+)", sys\.argv\[1:\]\)$', path.read_text(), flags=re.M)
    assert name is not None
    assert COMMANDS[name[1]].module == f"trl_ext.scripts.{path.stem}"
    assert f"`trl-ext {name[1]}`" in path.read_text()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_no_recipe_hides_a_module_that_is_imported(path: Path) -> None:
    """Python puts the folder of a script first where it looks for modules."""
    elsewhere = [entry for entry in sys.path if Path(entry or ".").resolve() != path.parent]
    assert PathFinder.find_spec(path.stem, elsewhere) is None


def test_a_recipe_runs_from_a_clone_that_is_not_installed(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, str(ROOT / "recipes" / "plan_memory.py"), "--no_such_flag"]
    environment["TRL_EXT_TRACEBACK"] = "1"
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "--no_such_flag: no such option" in done.stderr
    assert str(ROOT / "trl_ext" / "scripts" / "plan_memory.py") in done.stderr


def private_names(source: str) -> list[str]:
    """Names that begin with one underscore and are used on something else than `self`, or imported."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            if not (isinstance(node.value, ast.Name) and node.value.id == "self"):
                found.append(node.attr)
        elif isinstance(node, ast.ImportFrom):
            found += [alias.name for alias in node.names if alias.name.startswith("_")]
    return found


def test_private_names_are_found() -> None:
    assert private_names("from a import _b\nself._own\ntrainer._metrics\nx.__name__") == ["_b", "_metrics"]


@pytest.mark.parametrize("path", BODIES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_only_public_names_are_used(path: Path) -> None:
    assert private_names(path.read_text()) == []


class BrokenTableError(Exception):
    pass


@pytest.fixture
def broken_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args, **kwargs):
        raise BrokenTableError

    for module in (pipeline, ppo_max, rrhf, reward_model):
        monkeypatch.setattr(module, "print_table", broken)
    monkeypatch.setattr(ppo_max, "sample_completions", lambda *_: (["a"], ["b"]))


def test_results_are_written_before_anything_is_shown(broken_tables, tmp_path: Path) -> None:
    trainer = SimpleNamespace(
        args=SimpleNamespace(output_dir=str(tmp_path)),
        state=SimpleNamespace(log_history=[{"step": 1, "reward": 1.0, "kl": 0.5, "explained_variance": 0.0}]),
        watch=SimpleNamespace(outcome=lambda: {"alarms": [], "stopped": None}),
    )
    scores = {name: torch.arange(4.0) for name in ("chosen", "rejected", "chosen_lengths", "rejected_lengths")}
    reports = {
        "before_after.json": lambda: ppo_max.report(trainer, Dataset.from_dict({"prompt": ["a"]}), {}, False),
        "training.png": lambda: rrhf.report(trainer, ({}, ["a"]), ({}, ["b"]), Dataset.from_dict({"prompt": ["a"]})),
        "evaluation.json": lambda: reward_model.report(trainer, scores | {"rows": [0]}, {"count": 4}),
        "judgement.json": lambda: pipeline.report(
            trainer, {"examples": [], "win": 1.0, "tie": 0.0, "loss": 0.0, "prompts": 1}
        ),
    }
    for name, report in reports.items():
        with pytest.raises(BrokenTableError):
            report()
        assert (tmp_path / name).is_file(), name
        for path in tmp_path.iterdir():
            path.unlink()


# ---------------------------------------------------------------------- seeds


class MadeError(Exception):
    pass


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory):
    return build_world(tmp_path_factory.mktemp("world"), scale=0.01)


@pytest.mark.parametrize(
    ("recipe", "trainer"),
    [(ppo_max, "PPOMaxTrainer"), (rrhf, "RRHFTrainer"), (reward_model, "RewardModelTrainer")],
)
def test_the_seed_governs_fresh_adapters(recipe, trainer: str, world, tmp_path: Path, monkeypatch) -> None:
    """Each process of a run, and each run, starts at the same weights, whatever was drawn before."""
    made = []

    def record(self, model=None, *args, **kwargs):
        made.append({name: p.detach().clone() for name, p in model.named_parameters() if "lora_A" in name})
        raise MadeError

    monkeypatch.setattr(getattr(trl_ext, trainer), "__init__", record)
    rows = ['{"prompt": "a", "chosen": "good", "rejected": "bad", "responses": ["b", "c"], "scores": [1, 2]}'] * 32
    if recipe is reward_model:
        rows = [f'{{"prompt": "a {i}", "chosen": "good", "rejected": "bad"}}' for i in range(32)]
    (tmp_path / "d.jsonl").write_text("\n".join(rows))
    (tmp_path / "r.py").write_text("def f(completions, **kwargs):\n    return [0.0] * len(completions)\n")
    flags = [f"--model_name_or_path={world.base}", f"--dataset_name={tmp_path / 'd.jsonl'}", "--use_cpu=true"]
    flags += [f"--output_dir={tmp_path / 'out'}", "--bf16=false", "--report_to=none", "--lora_r=4"]
    if recipe is not reward_model:
        flags += [f"--reward_funcs={tmp_path / 'r.py'}:f"]
        flags += ["--max_completion_length=8"] if recipe is ppo_max else ["--max_new_tokens=8"]
    for seed in (1, 1, 2):
        torch.rand(len(made) + 1)
        with pytest.raises(MadeError):
            recipe.main([*flags, f"--seed={seed}"])
    first, second, other = made
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
