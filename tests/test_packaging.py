"""What a wheel and an sdist hold and say: links of the package page, messages, imports that are declared."""

import ast
import importlib.util
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "trl_ext"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ANOTHER_NAME = {"yaml": "pyyaml"}
BESIDE = {"vllm"}  # in an environment that the user makes, with the build that a card needs (documentation: generation)
# On POSIX alone
NOT_EVERYWHERE = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "posix", "syslog", "crypt", "spwd"}


@pytest.fixture(scope="module")
def setup_file() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_of_trl_ext", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_package_page_has_no_relative_link(setup_file: ModuleType) -> None:
    readme = (ROOT / "README.md").read_text()
    assert setup_file.LINK.search(readme), "there is something to do"
    for address in ("", "https://example.org/me/trl_ext"):
        page = setup_file.package_page(readme, address)
        targets = re.findall(r"\]\(([^)]+)\)", page)
        assert targets
        assert all(target.startswith(("https://", "#")) for target in targets)
        assert page.count("# ") == readme.count("# ")
    assert "(https://example.org/me/trl_ext/blob/main/docs/results/ppo_max.md)" in page
    assert "![Four adapters on one frozen base](https://example.org/me/trl_ext/raw/main/docs/images/" in page


def test_the_address_of_the_repository_has_one_place(setup_file: ModuleType) -> None:
    assert setup_file.repository() == PROJECT["tool"]["trl_ext"]["repository"].rstrip("/")
    assert set(PROJECT["project"]["dynamic"]) == {"version", "readme", "urls"}
    assert "Repository" not in setup_file.urls("")
    assert setup_file.urls("https://x.org/a")["Issues"] == "https://x.org/a/issues"


def declared() -> set[str]:
    extras = PROJECT["project"]["optional-dependencies"]
    every = [
        *PROJECT["project"]["dependencies"],
        *(each for name in ("label", "judge", "track") for each in extras[name]),
    ]
    return {re.match(r"[\w-]+", each)[0].lower().replace("-", "_") for each in every}  # type: ignore[index]


def imports(tree: ast.AST) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module).partition(".")[0])
    return found


def test_everything_that_is_imported_is_declared() -> None:
    every = set().union(*(imports(ast.parse(path.read_text())) for path in PACKAGE.rglob("*.py")))
    others = every - sys.stdlib_module_names - {"trl_ext"} - BESIDE
    assert {ANOTHER_NAME.get(name, name).lower() for name in others} <= declared()


def test_no_module_needs_posix_to_be_imported() -> None:
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        at_once = ast.Module([node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef)], [])
        assert not imports(at_once) & NOT_EVERYWHERE, path


def test_messages_name_no_file_that_a_wheel_lacks() -> None:
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        with_docstring = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        docstrings = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, with_docstring) and node.body and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                lacking = re.search(r"\b(docs|recipes|tests)/[\w/]+\.\w+|\bconstraints\.txt", node.value)
                assert lacking is None, f"{path}:{node.lineno}: {lacking and lacking[0]}"
