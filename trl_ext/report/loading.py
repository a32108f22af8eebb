"""Reading what a run has left, whole or not."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl_ext.report.lines import FORMAT, METRICS, RUN, SAMPLES, Line, read_lines
from trl_ext.report.samples import latest_of


@dataclass
class RunFiles:
    """What lies in the folder of a run.

    Attributes:
        folder: Where.
        info: `run.json`; empty where it is missing.
        metrics: Lines of `metrics.jsonl`, in order.
        evaluations: step -> key -> sample (`samples.latest_of`).
        training: Samples of the training, in order.
        pairs: Test pairs of a reward model with both scores, in order.
        notes: What is missing or broken, in words for a reader.
    """

    folder: Path
    info: dict[str, Any] = field(default_factory=dict)
    metrics: list[Line] = field(default_factory=list)
    evaluations: dict[int, dict[str, Line]] = field(default_factory=dict)
    training: list[Line] = field(default_factory=list)
    pairs: list[Line] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The last part of the folder's name."""
        return self.folder.resolve().name

    @property
    def configuration(self) -> dict[str, Any]:
        """Of the run, and the other flags of its command; empty where it is not known."""
        found = [self.info.get(name) for name in ("options", "configuration")]
        return {name: value for part in found if isinstance(part, dict) for name, value in part.items()}

    @property
    def names(self) -> set[str]:
        """Of everything that was logged with a number."""
        return {name for line in self.metrics for name, value in line.items() if is_number(value)}

    @property
    def alarms(self) -> list[dict[str, Any]]:
        """Of the guard, in order."""
        return [alarm for line in self.metrics for alarm in line.get("alarms", []) if isinstance(alarm, dict)]

    def values(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of a metric, in order of the steps."""
        found = [(line["step"], line[name]) for line in self.metrics if is_number(line.get(name)) and "step" in line]
        return sorted(found, key=lambda point: point[0])

    def whole_evaluations(self) -> tuple[dict[str, Line], dict[str, Line], int, int] | None:
        """Samples before and after, by key, and their steps; None where there are not two whole evaluations."""
        whole = {s: rows for s, rows in self.evaluations.items() if not any(row.get("part") for row in rows.values())}
        if len(whole) < 2:
            return None
        first, last = min(whole), max(whole)
        return whole[first], whole[last], first, last


def is_number(value: Any) -> bool:
    """Whether a value can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def load_run(folder: str | Path) -> RunFiles:
    """What a run has left in its `output_dir`.

    Raises:
        ValueError: There is no such folder, or it holds neither `metrics.jsonl` nor `run.json`; or they are of a later
            version.
    """
    folder = Path(folder)
    if folder.is_file() and folder.name in (METRICS, SAMPLES, RUN):
        folder = folder.parent
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder. Give the output_dir of a run.")
    run = RunFiles(folder)
    if not any((folder / name).is_file() for name in (METRICS, RUN)):
        raise ValueError(
            f"{folder} holds neither {METRICS} nor {RUN}: no training has been written down there. Give the output_dir "
            "of a run of this version."
        )
    run.info = _info(run)
    run.metrics = _lines(run, METRICS, "There are no curves.")
    samples = _lines(run, SAMPLES, "There are no samples, and no intervals before and after.")
    run.evaluations = latest_of(samples)
    run.training = [line for line in samples if line.get("kind") == "training"]
    scores = ("chosen_score", "rejected_score")
    run.pairs = [p for p in samples if p.get("kind") == "pair" and all(is_number(p.get(name)) for name in scores)]
    if run.info.get("outcome") == "running":
        run.notes.append("The run has not written its end: it is going on, or it was killed.")
    return run


def _info(run: RunFiles) -> dict[str, Any]:
    path = run.folder / RUN
    if not path.is_file():
        run.notes.append(f"{RUN} is missing: command, configuration and versions are not known.")
        return {}
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        run.notes.append(f"{RUN} cannot be read ({error}): command, configuration and versions are not known.")
        return {}
    if not isinstance(info, dict):
        run.notes.append(f"{RUN} holds no facts: command, configuration and versions are not known.")
        return {}
    if isinstance(info.get("format"), int) and info["format"] > FORMAT:
        raise ValueError(f"{path} is of format {info['format']}, this version reads {FORMAT}: install a newer trl_ext.")
    return info


def _lines(run: RunFiles, name: str, consequence: str) -> list[Line]:
    path = run.folder / name
    if not path.is_file():
        run.notes.append(f"{name} is missing. {consequence}")
        return []
    found, broken = read_lines(path)
    if broken:
        some = ", ".join(map(str, broken[:5])) + (", ..." if len(broken) > 5 else "")
        run.notes.append(f"{name}: {len(broken)} broken line{'s' * (len(broken) > 1)} left out ({some}).")
    if not found and name == METRICS:  # where nothing is evaluated there are no samples
        run.notes.append(f"{name} is empty. {consequence}")
    return found
