"""The configuration files that come with the package, by name: those of a run, and in `presets` those of a method."""

import difflib
from pathlib import Path

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
ACCELERATE = CONFIGS / "accelerate"


def config_names(folder: Path = CONFIGS) -> list[str]:
    """Names of the files in a folder and in its presets, without `.yaml`."""
    return sorted(path.name.removesuffix(".yaml") for path in _files(folder))


def _files(folder: Path) -> list[Path]:
    return [*folder.glob("*.yaml"), *(folder / "presets").glob("*.yaml")]


def find_config(name: str | Path, flag: str = "--config", folder: Path = CONFIGS) -> Path:
    """A yaml file by its path, or one that comes with the package by its name: qlora_8b.

    Args:
        name: Path or name.
        flag: That gave it, for the error.
        folder: Where names are looked up, and in its presets: `CONFIGS` for a run, `ACCELERATE` for accelerate's
            launcher.

    Raises:
        ValueError: There is neither; the names that there are, and the nearest.
    """
    if Path(name).is_file():
        return Path(name)
    known = config_names(folder)
    stem = Path(name).name.removesuffix(".yaml")
    found = [path for path in _files(folder) if str(name) in (path.name[:-5], f"presets/{path.name[:-5]}")]
    if found:
        return found[0]
    near = difflib.get_close_matches(stem, known, n=1)
    meant = f" Did you mean {near[0]}?" if near else ""
    raise ValueError(
        f"{flag} {name}: there is no such file, and no configuration of this name comes with trl_ext.{meant} "
        f"Give a path, or one of {', '.join(known)}."
    )
