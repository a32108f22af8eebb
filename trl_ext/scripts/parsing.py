"""Flags of the recipes: over those of a config file, over defaults; what cannot be honoured is refused by name."""

import argparse
import difflib
import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl import TrlParser

from trl_ext.scripts.catalogue import COMMANDS, render
from trl_ext.scripts.configs import find_config

# Flags of accelerate's launcher that people know, for errors that name the nearest
LAUNCHER = (
    *("num_processes", "config_file", "mixed_precision", "gpu_ids", "multi_gpu", "cpu", "num_machines"),
    *("machine_rank", "main_process_ip", "main_process_port", "use_fsdp", "use_deepspeed"),
)


class Given(dict[str, str]):
    """Names of the options that a user set -> where, as errors call it: "--lora_r", or "lora_r in x.yaml"."""

    def refuse(self, names: Iterable[str], why: str) -> None:
        """Stop where one of these was set.

        Raises:
            ValueError: Those that were, and why they cannot be honoured.
        """
        found = [self[name] for name in names if name in self]
        if found:
            raise ValueError(f"{', '.join(found)}: {why}")

    def on_command_line(self) -> "Given":
        """Those that are not from the config file, which may serve several runs."""
        return Given({name: where for name, where in self.items() if where.startswith("--")})


class PrintPage(argparse.Action):
    """`--help`: the page of a command, and the end."""

    def __init__(self, option_strings: Sequence[str], dest: str, command: str, help: str | None = None):
        super().__init__(option_strings, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, nargs=0, help=help)
        self.command = command

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(render(self.command))
        parser.exit()


class FlagParser(TrlParser):
    """TRL's parser of dataclasses and a config file, which takes whole flags only and says what was given.

    Args:
        dataclass_types: Whose fields are the flags.
        command: Of `trl-ext`: its page is what `--help` prints; `--help-all` prints every flag.
        passed_over: Dataclasses whose fields may stand in the config file too, without any effect here.
    """

    def __init__(self, dataclass_types: Sequence[Any], command: str, passed_over: Sequence[Any] = ()):
        super().__init__(list(dataclass_types), allow_abbrev=False, add_help=False, prog=f"trl-ext {command}")
        self.usage = "%(prog)s [--flag value ...]"
        self.command = command
        if COMMANDS[command].page is None:
            self.description = sys.modules[COMMANDS[command].module].__doc__
            self.add_argument("-h", "--help", action="help", help="Show every flag.")
        else:
            self.add_argument("-h", "--help", action=PrintPage, command=command, help="Show the flags most used.")
            self.add_argument("--help-all", action="help", help="Show every flag.")
        self.passed_over = {f.name for each in passed_over for f in fields(each)}

    def parse(self, arguments: Sequence[str], default_config: Path | None = None) -> tuple[Any, ...]:
        """The dataclasses, and last what was `Given`.

        Args:
            arguments: Flags; `--config x.yaml`, or the name of a file that comes with the package, sets their defaults.
            default_config: Taken where none is named; its keys do not count as given.

        Raises:
            ValueError: A flag or a key that there is not, with the nearest one that there is; a config file that cannot
                be read; a value without a flag; or a field that its dataclass refuses.
        """
        # TrlParser sees the file only if it is an argument of its own
        arguments = [
            part for flag in arguments for part in (flag.split("=", 1) if flag.startswith("--config=") else [flag])
        ]
        given = self._given(arguments)
        if "--config" in arguments:
            given = Given(self._config_keys(arguments) | given)
            position = arguments.index("--config") + 1
            found = str(find_config(arguments[position]))
            arguments = [*arguments[:position], found, *arguments[position + 1 :]]
        elif default_config is not None:
            arguments = ["--config", str(default_config), *arguments]
        try:
            *parsed, _, stray = self.parse_args_and_config(
                arguments, return_remaining_strings=True, separate_remaining_strings=True
            )
        except ValueError as error:  # also of a dataclass of a library: it is about what was given
            raise ValueError(str(error)) from error
        if stray:
            raise ValueError(f"{' '.join(stray)}: no flag takes this. See --help.")
        return (*parsed, given)

    def error(self, message: str) -> NoReturn:
        """End as argparse does, without the list of all flags."""
        self.exit(2, f"{self.prog}: error: {message}. See --help.\n")

    def _given(self, arguments: Sequence[str]) -> Given:
        given = Given()
        for argument in arguments:
            flag = argument.split("=", 1)[0]
            if not flag.startswith("--") or flag == "--config":
                continue
            action = self._option_string_actions.get(flag)
            if action is None:
                if flag.lstrip("-").replace("-", "_") in LAUNCHER and COMMANDS[self.command].launched:
                    how = f"`trl-ext {self.command} {flag} ...`, or give it to `accelerate launch`, before the recipe"
                    raise ValueError(f"{argument}: a flag of accelerate's launcher. Use {how}.")
                raise ValueError(f"{argument}: no such option{self._nearest(flag.lstrip('-'))}. See --help.")
            given[action.dest] = flag
        return given

    def _config_keys(self, arguments: Sequence[str]) -> dict[str, str]:
        position = arguments.index("--config") + 1
        if position == len(arguments):
            raise ValueError("--config needs a yaml file, or the name of one.")
        config, path = read_config(arguments[position], "--config"), arguments[position]
        known = {action.dest for action in self._actions}
        for key in config:
            if key not in known | self.passed_over | {"env"}:
                raise ValueError(f"{key} in {path}: no such option{self._nearest(key)}.")
        return {key: f"{key} in {path}" for key in config if key in known}

    def _nearest(self, name: str) -> str:
        known = [action.dest for action in self._actions]
        if COMMANDS[self.command].launched:
            known += LAUNCHER
        near = difflib.get_close_matches(name.replace("-", "_"), known, n=1, cutoff=0.6)
        return f"; did you mean --{near[0]}" if near else ""


def read_config(path: str | Path, flag: str) -> dict[str, Any]:
    """The options in a yaml file, by its path or name.

    Raises:
        ValueError: There is no such file, or it holds no options; names the flag.
    """
    path = find_config(path, flag)
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{flag} {path} is no yaml file: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{flag} {path} must hold lines `option: value`, not {type(config).__name__}.")
    return config


def names_a_model(arguments: Sequence[str]) -> bool:
    """Whether these flags are of a run of one's own, or ask for help, and not of the embedded world."""
    return any(
        flag.split("=")[0] in ("--config", "--model_name_or_path", "-h", "--help", "--help-all") for flag in arguments
    )
