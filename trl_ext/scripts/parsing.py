"""Flags of the recipes: over those of a config file, over defaults; what cannot be honoured is refused by name."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from trl import TrlParser

CONFIGS = Path(__file__).resolve().parents[2] / "recipes" / "configs"


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


class FlagParser(TrlParser):
    """TRL's parser of dataclasses and a config file, which takes whole flags only and says what was given.

    Args:
        dataclass_types: Whose fields are the flags.
        description: For `--help`.
        passed_over: Dataclasses whose fields may stand in the config file too, without any effect here.
    """

    def __init__(self, dataclass_types: Sequence[Any], description: str | None, passed_over: Sequence[Any] = ()):
        super().__init__(list(dataclass_types), allow_abbrev=False)
        self.description = description
        self.passed_over = {f.name for each in passed_over for f in fields(each)}

    def parse(self, arguments: Sequence[str], default_config: Path | None = None) -> tuple[Any, ...]:
        """The dataclasses, and last what was `Given`.

        Args:
            arguments: Flags; `--config x.yaml` sets defaults for them.
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
        elif default_config is not None:
            arguments = ["--config", str(default_config), *arguments]
        *parsed, _, stray = self.parse_args_and_config(
            arguments, return_remaining_strings=True, separate_remaining_strings=True
        )
        if stray:
            raise ValueError(f"{' '.join(stray)}: no flag takes this. See --help.")
        return (*parsed, given)

    def _given(self, arguments: Sequence[str]) -> Given:
        given = Given()
        for argument in arguments:
            flag = argument.split("=", 1)[0]
            if not flag.startswith("--") or flag == "--config":
                continue
            action = self._option_string_actions.get(flag)
            if action is None:
                raise ValueError(f"{argument}: no such option{self._nearest(flag.lstrip('-'))}. See --help.")
            given[action.dest] = flag
        return given

    def _config_keys(self, arguments: Sequence[str]) -> dict[str, str]:
        position = arguments.index("--config") + 1
        if position == len(arguments):
            raise ValueError("--config needs a yaml file.")
        config, path = read_config(arguments[position], "--config"), Path(arguments[position])
        known = {action.dest for action in self._actions}
        for key in config:
            if key not in known | self.passed_over | {"env"}:
                raise ValueError(f"{key} in {path}: no such option{self._nearest(key)}.")
        return {key: f"{key} in {path}" for key in config if key in known}

    def _nearest(self, name: str) -> str:
        known = [action.dest for action in self._actions]
        near = difflib.get_close_matches(name.replace("-", "_"), known, n=1, cutoff=0.6)
        return f"; did you mean --{near[0]}" if near else ""


def read_config(path: str | Path, flag: str) -> dict[str, Any]:
    """The options in a yaml file.

    Raises:
        ValueError: There is no such file, or it holds no options; names the flag.
    """
    if not Path(path).is_file():
        raise ValueError(f"{flag} {path}: there is no such file.")
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{flag} {path} is no yaml file: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{flag} {path} must hold lines `option: value`, not {type(config).__name__}.")
    return config


def names_a_model(arguments: Sequence[str]) -> bool:
    """Whether these flags are of a run of one's own, or ask for help, and not of the embedded world."""
    return any(flag.split("=")[0] in ("--config", "--model_name_or_path", "-h", "--help") for flag in arguments)
