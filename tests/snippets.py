"""What the pages of the documentation tell a reader to type: blocks, commands, Python, checked without running them.

A command is read by the parser of the program that it starts, and then nothing is run. Python is compiled; what it
imports is imported, what it calls is compared with the signature, and a name that comes from nowhere is found.
"""

import argparse
import ast
import builtins
import importlib
import importlib.util
import inspect
import re
import shlex
import sys
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", flags=re.M | re.S)
INLINE = re.compile(r"`([^`]+)`")
# How a line begins that is a command
PROGRAMS = "trl-ext|trl|python|accelerate|torchrun|pytest|pip|mkdocs|trackio|tensorboard"
HEADS = rf"(?:{PROGRAMS}|\S+/python|\S+/pip|[A-Z_]+=\S+) "
# Programs of others, which take what they take
FOREIGN = ("trackio", "tensorboard", "ruff", "mypy", "pre-commit", "git", "cd")
# What functions of ours with `**kwargs` hand on to transformers
HANDED_ON = {"dtype", "device_map", "attn_implementation", "quantization_config", "revision", "trust_remote_code"}
LAUNCHERS = ("accelerate", "torchrun")


@dataclass(frozen=True)
class Block:
    """A piece of a page: its kind (the word behind the fence), its text, its first line."""

    kind: str
    text: str
    line: int


def blocks(page: str) -> list[Block]:
    """Fenced blocks, in order."""
    return [Block(m[2], m[3], page[: m.start()].count("\n") + 2) for m in FENCE.finditer(page)]


def commands(page: str) -> list[str]:
    """Commands in `bash` blocks, in blocks that are indented, and within a sentence, each without its comment."""
    found = [line for block in blocks(page) if block.kind == "bash" for line in joined(block.text)]
    rest = FENCE.sub("", page)
    found += [line for line in joined(indented(rest)) if re.match(HEADS, line)]
    prose = "\n".join(line for line in rest.splitlines() if not line.startswith("    "))
    for span in INLINE.findall(prose):
        span = " ".join(span.split())
        if re.match(HEADS, span):
            found.append(span)
    return [part.strip() for line in found for part in line.split("&&")]


def indented(text: str) -> str:
    """Lines that are indented by four and more; empty ones for the others."""
    return "\n".join(line.strip() if line.startswith("    ") else "" for line in text.splitlines())


def joined(text: str) -> Iterator[str]:
    """Lines, those that end with a backslash with the next one; without comments."""
    for line in re.sub(r"\s*\\\n\s*", " ", text).splitlines():
        line = re.sub(r"(^|\s+)# .*$", "", line).strip()
        if line:
            yield line


# ---------------------------------------------------------------------- commands


class _ParsedError(Exception):
    """The parser has read its flags: what would run now is not run."""


class Commands:
    """Reads commands with the parsers of what they start.

    Args:
        root: Of the repository.
        monkeypatch: Undoes what is replaced.
    """

    def __init__(self, root: Path, monkeypatch: Any):
        self.root = root
        self.patch = monkeypatch

    def check(self, command: str) -> None:
        """Read a command.

        Raises:
            AssertionError, ValueError, SystemExit: What is wrong with it.
        """
        words = shlex.split(command)
        while re.fullmatch(r"[A-Z][A-Z_0-9]*=\S*", words[0]):
            words = words[1:]
        program = Path(words[0]).name
        if program == "trl-ext":
            self.ours(words[1:])
        elif program in LAUNCHERS or program in ("python", "python3"):
            self.script(words)
        elif program == "pip":
            self.pip(words[1:])
        elif program == "pytest":
            self.pytest(words[1:])
        elif program == "trl":
            self.trl(words[1:])
        elif words[0] == ".":  # activates an environment
            assert len(words) == 2, command
        elif (self.root / words[0]).is_file():
            assert len(words) == 1, command
        elif program == "mkdocs":
            assert words[1] in ("build", "serve"), command
        else:
            assert program in FOREIGN, f"{command}: this test knows no program {program!r}"

    def ours(self, words: list[str]) -> None:
        """`trl-ext NAME --flag value ...`."""
        from trl_ext.scripts.catalogue import COMMANDS
        from trl_ext.scripts.launching import LauncherFlags

        name = words[0]
        if name == "COMMAND":  # the page of the command itself
            return
        assert name in COMMANDS, f"there is no command {name}"
        words = words[1:]
        if COMMANDS[name].launched:
            words = LauncherFlags().split(words)[1]
        module = importlib.import_module(COMMANDS[name].module)
        if words in ([], ["--help"], ["--help-all"]):  # [] is its name, in a sentence
            return
        self.parse(module.parse, words)

    def parse(self, parse: Callable[[list[str]], Any], words: list[str]) -> None:
        """Flags, each whole and known; and their values, unless `...` says that there are more."""
        parser = self.parser_of(parse, [])
        known = {*parser._option_string_actions, "--config"}
        for word in words:
            if word.startswith("--") and word != "--":
                assert word.split("=")[0] in known, f"{word}: no such flag of {parser.prog}"
        if "..." not in words and not {"RUN", "NAME"} & set(words[:1]):
            # a card's optimizer is refused where there is none
            words = [*words, *(["--optim=adamw_torch"] if "--optim" in known and "--optim" not in words else [])]
            try:
                parse(words)
            except ValueError as error:
                if "name the folder of a run" not in str(error):  # what a page names is not here
                    raise

    def parser_of(self, parse: Callable[[list[str]], Any], words: list[str]) -> argparse.ArgumentParser:
        """The parser, caught where it begins to read."""
        caught: list[argparse.ArgumentParser] = []

        def catch(parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
            caught.append(parser)
            raise _ParsedError

        with self.patch.context() as patch:
            patch.setattr(argparse.ArgumentParser, "parse_known_args", catch)
            try:
                parse(words)
            except _ParsedError:
                return caught[-1]
        raise AssertionError(f"{parse.__module__} asks no parser")

    def every_flag(self) -> set[str]:
        """Flags of all commands of `trl-ext`."""
        from trl_ext.scripts.catalogue import COMMANDS

        modules = [importlib.import_module(command.module) for command in COMMANDS.values()]
        return {flag for module in modules for flag in self.parser_of(module.parse, [])._option_string_actions}

    def script(self, words: list[str]) -> None:
        """`accelerate launch`, `torchrun` or `python`, and a file of the repository or a module."""
        if words in (["accelerate", "launch"], ["accelerate", "config"]):
            return
        at = next((i for i, word in enumerate(words) if word.endswith(".py") or word == "-m"), None)
        assert at is not None, f"{' '.join(words)}: what does it start?"
        if words[at] == "-m":
            module, rest = words[at + 1], words[at + 2 :]
            if module == "trl_ext":
                self.ours(rest)
            else:
                assert importlib.util.find_spec(module) is not None or module == "build", module
            return
        path, rest = self.root / words[at], words[at + 1 :]
        assert path.is_file(), words[at]
        if path.parent.name == "recipes":
            self.ours([re.search(r'run\("([\w-]+)"', path.read_text())[1], *rest])  # type: ignore[index]
        elif rest and "def main(" in path.read_text():
            self.program(path, rest)

    def program(self, path: Path, words: list[str]) -> None:
        """A script with a `main()` that reads `sys.argv`."""
        spec = importlib.util.spec_from_file_location(f"snippet_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        self.patch.setitem(sys.modules, spec.name, module)
        self.patch.syspath_prepend(str(path.parent))
        self.patch.setattr(sys, "argv", [str(path), *words])
        spec.loader.exec_module(module)
        read = argparse.ArgumentParser.parse_known_args

        def stop(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
            for word in words:
                assert not word.startswith("--") or word in parser._option_string_actions, f"{path.name}: {word}"
            if "..." not in words:
                read(parser, *args, **kwargs)
            raise _ParsedError

        with self.patch.context() as patch:
            patch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
            try:
                module.main()
            except _ParsedError:
                return
        raise AssertionError(f"{path.name} has run")

    def pip(self, words: list[str]) -> None:
        """`pip install`: extras and constraints that there are."""
        import tomllib

        assert words[0] == "install"
        extras = tomllib.loads((self.root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for i, word in enumerate(words):
            for names in re.findall(r"^\.\[(.+)\]$", word):
                assert set(names.split(",")) <= set(extras), f"{word}: extras are {sorted(extras)}"
            if word == "-c":
                assert (self.root / words[i + 1]).is_file(), words[i + 1]

    def pytest(self, words: list[str]) -> None:
        """`pytest`: files and markers that there are."""
        settings = (self.root / "pyproject.toml").read_text()
        for i, word in enumerate(words):
            if word == "-m":
                assert f'"{words[i + 1]}: ' in settings, f"no marker {words[i + 1]}"
            elif word.startswith("tests"):
                assert (self.root / word.split("::")[0]).exists(), word

    def trl(self, words: list[str]) -> None:
        """TRL's own command: `trl sft`."""
        module = importlib.import_module(f"trl.scripts.{words[0].replace('-', '_')}")
        known = module.make_parser()._option_string_actions
        for word in words[1:]:
            assert not word.startswith("--") or word in known, f"trl {words[0]}: no flag {word}"


# ---------------------------------------------------------------------- Python


class Python(ast.NodeVisitor):
    """Reads the Python of a page, block by block; what one block defines the next one knows.

    Args:
        given: Names that stand for a reader's own things.
    """

    def __init__(self, given: frozenset[str] = frozenset()):
        self.objects: dict[str, Any] = {}  # imported
        self.kinds: dict[str, type] = {}  # variable -> class
        self.names: set[str] = {*dir(builtins), *given}
        self.wrong: list[str] = []

    def check(self, block: str) -> list[str]:
        """What is wrong with a block."""
        self.wrong = []
        self.visit(ast.parse(block))
        return self.wrong

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            module = importlib.import_module(alias.name)
            bound = alias.asname or alias.name.partition(".")[0]
            self.define(bound, module if alias.asname else importlib.import_module(bound))

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        module = importlib.import_module(str(node.module))
        for alias in node.names:
            if not hasattr(module, alias.name):
                self.wrong.append(f"{node.module} has no {alias.name}")
                continue
            self.define(alias.asname or alias.name, getattr(module, alias.name))

    def define(self, name: str, value: Any) -> None:
        self.names.add(name)
        self.objects[name] = value

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.names.add(node.name)
        outside = set(self.names)
        arguments = node.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
        self.names |= {argument.arg for argument in every if argument is not None}
        for statement in node.body:
            self.visit(statement)
        self.names = outside | {node.name}

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        kind = self.kind_of(node.value)
        for target in node.targets:
            for name in ast.walk(target):
                if isinstance(name, ast.Name):
                    self.names.add(name.id)
                    self.objects.pop(name.id, None)
                    self.kinds.pop(name.id, None)
            if isinstance(target, ast.Name) and kind is not None:
                self.kinds[target.id] = kind

    def visit_With(self, node: ast.With) -> None:
        for item in node.items:
            self.visit(item.context_expr)
            if isinstance(item.optional_vars, ast.Name):
                self.names.add(item.optional_vars.id)
        for statement in node.body:
            self.visit(statement)

    def visit_For(self, node: ast.For) -> None:
        self.visit(node.iter)
        self.names |= {name.id for name in ast.walk(node.target) if isinstance(name, ast.Name)}
        for statement in node.body:
            self.visit(statement)

    def comprehension(self, node: Any) -> None:
        for part in node.generators:
            self.visit(part.iter)
            self.names |= {name.id for name in ast.walk(part.target) if isinstance(name, ast.Name)}
            for test in part.ifs:
                self.visit(test)
        for field in ("elt", "key", "value"):
            if hasattr(node, field):
                self.visit(getattr(node, field))

    def visit(self, node: ast.AST) -> Any:
        """As the base class does; comprehensions define their names before they use them."""
        return self.comprehension(node) if hasattr(node, "generators") else super().visit(node)

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self.names |= {argument.arg for argument in node.args.args}
        self.visit(node.body)

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load) and node.id not in self.names:
            self.wrong.append(f"line {node.lineno}: {node.id} comes from nowhere")

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.generic_visit(node)
        owner = self.owner_of(node.value)
        if owner is not None and not hasattr(owner, node.attr) and not _set_by_itself(owner, node.attr):
            self.wrong.append(f"line {node.lineno}: {getattr(owner, '__name__', owner)} has no {node.attr}")

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        function = self.callee_of(node.func)
        if function is None:
            return
        try:
            signature = inspect.signature(function)
        except ValueError:  # of a built-in
            return
        starred = any(isinstance(argument, ast.Starred) for argument in node.args)
        elided = any(isinstance(argument, ast.Constant) and argument.value is ... for argument in node.args)
        named = {keyword.arg: None for keyword in node.keywords if keyword.arg is not None}
        handed_on = set(named) - set(signature.parameters)
        if str(getattr(function, "__module__", "")).startswith("trl_ext") and handed_on - HANDED_ON:
            self.wrong.append(f"line {node.lineno}: {ast.unparse(node.func)} has no {sorted(handed_on - HANDED_ON)}")
        partly = starred or elided or len(named) < len(node.keywords)
        method = isinstance(node.func, ast.Attribute) and self.kind_of(node.func.value) is not None
        bound = method and _is_plain(self.kind_of(node.func.value), node.func.attr)
        values = [None] * (len(node.args) - starred - elided + bound)
        try:
            (signature.bind_partial if partly else signature.bind)(*values, **named)
        except TypeError as error:
            self.wrong.append(f"line {node.lineno}: {ast.unparse(node.func)}: {error}")

    def owner_of(self, node: ast.expr) -> Any:
        """The module or class that an attribute is looked up in."""
        known = self.callee_of(node)
        return (
            known if known is not None and (inspect.ismodule(known) or inspect.isclass(known)) else self.kind_of(node)
        )

    def callee_of(self, node: ast.expr) -> Any:
        """What a name, or names with dots between, stand for."""
        if isinstance(node, ast.Name):
            return self.objects.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self.owner_of(node.value)
            return getattr(owner, node.attr, None) if owner is not None else None
        return None

    def kind_of(self, node: ast.expr) -> type | None:
        """The class of what an expression makes: of a class that is called, or by the annotation of a function."""
        if isinstance(node, ast.Name):
            return self.kinds.get(node.id)
        if not isinstance(node, ast.Call):
            return None
        made = self.callee_of(node.func)
        if inspect.isclass(made):
            return made
        module = getattr(made, "__module__", None) or ""
        if not (callable(made) and module.startswith("trl_ext")):
            return None
        try:
            returned = typing.get_type_hints(made).get("return")
        except NameError:  # a type that is imported for type checkers alone
            return None
        return returned if inspect.isclass(returned) and returned is not type(None) else None


def _set_by_itself(owner: Any, name: str) -> bool:
    """Whether a class gives its instances an attribute: `self.name = ...` or an annotation."""
    if not inspect.isclass(owner):
        return False
    for each in owner.__mro__[:-1]:
        if name in getattr(each, "__annotations__", {}):
            return True
        try:
            source = inspect.getsource(each)
        except (OSError, TypeError):
            continue
        if re.search(rf"\bself\.{name}\b\s*(:[^=\n]+)?=", source):
            return True
    return False


def _is_plain(owner: Any, name: str) -> bool:
    """Whether a method takes `self` when it is looked up in its class."""
    return inspect.isfunction(inspect.getattr_static(owner, name, None))
