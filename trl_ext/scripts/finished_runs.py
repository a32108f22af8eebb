"""Folders of finished runs that are evaluated: which are some, what lies in them, how tables call them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trl_ext.report.comparison import REFERENCE
from trl_ext.report.lines import METRICS, RUN

OWN_REWARD = "reward"  # folders of a run's reward adapters: reward, reward_2, ...


def is_run(folder: str) -> bool:
    """Whether a folder is one that a training has written itself down in."""
    return (Path(folder) / RUN).is_file()


def reward_folders(folder: Path) -> list[Path]:
    """A run's own reward adapters in the order of the ensemble: reward, reward_2, ..., reward_10."""
    numbered = {path.name.removeprefix(f"{OWN_REWARD}_"): path for path in folder.glob(f"{OWN_REWARD}_*")}
    later = [numbered[number] for number in sorted((n for n in numbered if n.isdecimal()), key=int)]
    return [path for path in (folder / OWN_REWARD, *later) if path.is_dir()]


def check_no_run(folder: str) -> None:
    """Check that an evaluation is not written over what a training has left: both write samples.jsonl.

    Raises:
        ValueError: It would be.
    """
    if any((Path(folder) / name).is_file() for name in (RUN, METRICS)):
        raise ValueError(
            f"--output_dir {folder} is the folder of a run, whose samples would be lost. Name another one."
        )


def names_of(policies: Sequence[str]) -> list[str]:
    """The last part of each, or all of it where two have the same, or the reference has it."""
    last = [Path(each).resolve().name if Path(each).is_dir() else each for each in policies]
    whole = [str(Path(each).resolve()) if each == REFERENCE else each for each in policies]
    taken = [*last, REFERENCE]
    return [long if taken.count(name) > 1 else name for long, name in zip(whole, last, strict=True)]


def in_world(known: dict[str, Any], recipe: Any) -> bool:
    """Whether a run was one in the embedded world, and its prompts and rewards are asked for."""
    named = (recipe.dataset_name, recipe.dataset_test_name, recipe.dataset_test_split)
    return "world_scale" in known and known.get("model_name_or_path") is None and not any(named)
