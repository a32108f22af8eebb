"""Who may import whom, read from the source: every import statement counts, also one inside a function.

scripts -> method/trainer -> method/{rollout, rewards, losses, data} -> text, scoring, generation -> roles -> ops
"""

import ast
import sys
from pathlib import Path

import pytest

import trl_ext

REPO_ROOT = Path(__file__).resolve().parent.parent
PACKAGE = REPO_ROOT / "trl_ext"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 420

# Folder, or file directly in trl_ext -> those of trl_ext that it may import (a folder its own files always).
BELOW_METHODS = {"ops", "roles", "text", "scoring", "generation", "fields", "runs", "checkpoints", "report", "data"}
BELOW_METHODS |= {"engines", "run_identity", "training", "token_rewards"}
ALLOWED = {
    "ops": set(),
    "fields": set(),
    "checkpoints": set(),
    "runs": {"ops", "roles", "fields", "checkpoints"},
    "engines": {"roles", "checkpoints"},
    "run_identity": {"roles", "checkpoints"},
    "signals": set(),
    "training": {"checkpoints", "engines", "report", "roles", "run_identity", "runs", "signals"},
    "roles": {"ops"},
    "text": set(),
    "generation": {"ops", "roles", "text", "fields"},
    "token_rewards": set(),
    "sources": {"text", "token_rewards"},
    "scoring": {"ops", "roles", "text", "sources", "token_rewards"},
    "report": {"ops", "roles", "text", "generation", "scoring", "checkpoints", "run_identity"},
    "data": {"ops", "text"},
    "toy": {"ops", "roles", "data"},
    "memory": {"ops", "roles"},
    "feedback": {"data"},
    "ppo": BELOW_METHODS,
    "reward": BELOW_METHODS,
    "rrhf": BELOW_METHODS,
    "__main__": {"scripts"},
    "scripts": BELOW_METHODS | {"ppo", "reward", "rrhf", "memory", "toy", "feedback"} | set(trl_ext.__all__),
}
METHODS = ("ppo", "reward", "rrhf")
# Files of a method that are functions of tensors and settings: they do not know the shared model.
MODEL_FREE = ("config.py", "losses.py", "rewards.py", "data.py")


def for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imported_modules(source: str, package: str, typing: bool = True) -> set[str]:
    """Full names of all modules that `source`, a module of `package`, imports; `from a import b` gives a and a.b.

    `typing=False` leaves out those under `if TYPE_CHECKING`, which are not there when the code runs.
    """
    tree = ast.parse(source)
    hidden = set()
    if not typing:
        hidden = {inner for block in ast.walk(tree) if for_type_checkers(block) for inner in ast.walk(block)}
    names = set()
    for node in set(ast.walk(tree)) - hidden:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *([base] if base else [])])
            names.add(base)
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return names


def imports_of(path: Path, typing: bool = True) -> set[str]:
    return imported_modules(path.read_text(), ".".join(path.relative_to(REPO_ROOT).parent.parts), typing)


def top(name: str) -> str:
    return name.partition(".")[0]


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def folder_of(path: Path) -> str:
    """The folder of trl_ext that a file belongs to, or the name of a file directly in trl_ext; "" for its __init__."""
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else path.stem.removeprefix("__init__")


def each_file(where=lambda path: True):
    """Parametrizes a test with the path of each file of trl_ext for which `where` is true."""
    return pytest.mark.parametrize("path", [path for path in FILES if where(path)], ids=name_of)


def test_the_reader_sees_every_kind_of_import():
    source = """
import os, torch.nn as nn
from peft import LoraConfig
from . import losses
from .losses import policy_loss
from ..ops import kl
if TYPE_CHECKING:
    import datasets
def late():
    if True:
        import trl.trainer
"""
    at_run_time = {
        "os", "torch.nn", "peft", "peft.LoraConfig", "trl_ext.ppo", "trl_ext.ppo.losses",
        "trl_ext.ppo.losses.policy_loss", "trl_ext.ops", "trl_ext.ops.kl", "trl.trainer",
    }  # fmt: skip
    assert imported_modules(source, "trl_ext.ppo", typing=False) == at_run_time
    assert imported_modules(source, "trl_ext.ppo") == at_run_time | {"datasets"}


def test_every_folder_and_file_has_its_rule():
    folders = {folder_of(path) for path in FILES} - {""}
    assert folders <= set(ALLOWED), "give the new folder or file its line in ALLOWED"


@each_file(lambda path: folder_of(path) != "")
def test_folders_import_only_what_they_may(path):
    own = {name.split(".")[1] for name in imports_of(path) if name.startswith("trl_ext.")}
    assert own <= ALLOWED[folder_of(path)] | {folder_of(path)}


def test_no_file_imports_in_a_circle_not_even_for_types():
    files = set_of_files()
    graph = {}
    for path in FILES:
        name = ".".join(path.relative_to(REPO_ROOT).with_suffix("").parts)
        if path.name != "__init__.py":  # these only name what others hold
            graph[name] = imports_of(path) & files - {name}
    assert circle(graph) == []


def set_of_files() -> set[str]:
    return {".".join(path.relative_to(REPO_ROOT).with_suffix("").parts) for path in FILES if path.name != "__init__.py"}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, in order; empty where none do."""
    state: dict[str, int] = {}
    path: list[str] = []

    def visit(name: str) -> list[str]:
        state[name] = 1
        path.append(name)
        for other in sorted(graph[name]):
            if state.get(other) == 1:
                return [*path[path.index(other) :], other]
            if other not in state and (found := visit(other)):
                return found
        state[name] = 2
        path.pop()
        return []

    return next((found for name in sorted(graph) if name not in state and (found := visit(name))), [])


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@each_file(lambda path: folder_of(path) != "roles")
def test_only_roles_imports_peft_and_bitsandbytes(path):
    assert not {"peft", "bitsandbytes"} & set(map(top, imports_of(path)))


@each_file(
    lambda path: (
        path.name not in ("config.py", "trainer.py") and folder_of(path) not in ("data", "generation", "scripts")
    )
)
def test_trl_is_imported_only_in_configs_trainers_generation_data_and_scripts(path):
    assert "trl" not in set(map(top, imports_of(path)))


@each_file(lambda path: folder_of(path) == "ops" or path.name == "losses.py")
def test_ops_and_losses_import_only_torch(path):
    for name in imports_of(path):
        assert top(name) == "torch" or top(name) in sys.stdlib_module_names or name.startswith("trl_ext.ops")


@each_file(lambda path: folder_of(path) in METHODS)
def test_inside_a_method_nothing_points_back_up(path):
    method = f"trl_ext.{folder_of(path)}"
    imports = imports_of(path)
    if path.name != "__init__.py":
        assert not [name for name in imports if name.startswith(f"{method}.trainer")]
    if path.name in MODEL_FREE:
        assert not [name for name in imports if name.startswith("trl_ext.roles")]
    if path.name == "losses.py":
        assert not [name for name in imports if name.startswith(method)]


def test_importing_the_package_imports_nothing_heavy():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    eager = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = set().union(*(imported_modules(ast.unparse(node), "trl_ext") for node in eager))
    assert {top(name) for name in names} <= sys.stdlib_module_names


@each_file()
def test_files_stay_short(path):
    assert len(path.read_text().splitlines()) < MAX_LINES, "a file that wants to be longer is two files"
