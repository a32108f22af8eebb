"""What a stage of `trl-ext rlhf` is made of: written before it begins, compared when the same command goes on."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trl_ext.roles.adapters import CONFIG_FILE, SCALE_FILE, SCALING_FIELDS, WEIGHTS_FILE
from trl_ext.run_identity import digest_of
from trl_ext.scripts.running import write_json

STAGE, BEGUN = "stage.json", "begun.json"
ENDED_EARLY = "ended_early"  # in stage.json: what became of the stage, and no fact that it is made of
REMEDY = "give those of then, name another --output_dir, or remove this folder and those of later rounds."


def done(folder: Path, facts: Mapping[str, Any]) -> bool:
    """Whether a stage is there, made of the same.

    Args:
        folder: Of the stage.
        facts: What it hangs on.

    Raises:
        ValueError: It is there, made of something else; names what.
    """
    path = folder / STAGE
    if not path.is_file():
        return False
    _compare(folder, json.loads(path.read_text(encoding="utf-8")), facts, "was made")
    return True


def begin(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write down what a stage is made of before anything of it is; one that was begun must have been made of the same.

    Raises:
        ValueError: It was begun with something else, or holds a training of which nothing is known.
    """
    path = folder / BEGUN
    if path.is_file():
        _compare(folder, json.loads(path.read_text(encoding="utf-8")), facts, "was begun")
        return
    trained = [each for name in (WEIGHTS_FILE, "checkpoint-*") for each in sorted(folder.glob(f"**/{name}"))]
    if trained and not (folder / STAGE).is_file():
        raise ValueError(
            f"{folder} holds {trained[0].relative_to(folder)}, and no {BEGUN} says what it was made of: remove this "
            "folder, or name another --output_dir."
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, _plain(facts))


def finish(folder: Path, facts: Mapping[str, Any], ended_early: str | None = None) -> None:
    """Write down that a stage is done, last of all, and why it ended before its last step if it has."""
    write_json(folder / STAGE, _plain(facts) | ({} if ended_early is None else {ENDED_EARLY: ended_early}))


def ended_early(folder: Path) -> str | None:
    """Why a stage that is done ended before its last step; None: it has not."""
    path = folder / STAGE
    return json.loads(path.read_text(encoding="utf-8")).get(ENDED_EARLY) if path.is_file() else None


def differing_facts(found: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    """Names of the facts that are not the same; of a fact with parts those of the parts."""
    wanted, names = _plain(facts), []
    for name in sorted({*found, *wanted}):
        before, now = found.get(name), wanted.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            names += [f"{name}: {part}" for part in differing_facts(before, now)]
        elif before != now:
            names.append(name)
    return names


def _compare(folder: Path, found: Mapping[str, Any], facts: Mapping[str, Any], how: str) -> None:
    names = differing_facts({name: value for name, value in found.items() if name != ENDED_EARLY}, facts)
    if names:
        raise ValueError(f"{folder} {how} with other settings ({', '.join(names)}): {REMEDY}")


def _plain(facts: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(facts, default=str))


def digest(folder: Path) -> str:
    """Of all that an adapter computes with: weights, scaling, the scale of a reward; of one on the Hub its id."""
    if not (folder / WEIGHTS_FILE).is_file():
        return str(folder)
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    scaling = json.dumps([config.get(name) for name in SCALING_FIELDS])
    scale = folder / SCALE_FILE
    parts = ((folder / WEIGHTS_FILE).read_bytes(), scaling.encode(), scale.read_bytes() if scale.is_file() else b"")
    return digest_of(parts)


def model_facts(work: Any) -> dict[str, Any]:
    """What every stage hangs on: the flags of base and adapters, options of the chat template, and the seed."""
    training = work.training
    options = {name: getattr(training, name) for name in ("seed", "chat_template_kwargs", "model_init_kwargs")}
    return asdict(work.model_args) | options
