"""What a run leaves in its folder: `metrics.jsonl`, `samples.jsonl`, `run.json`, and the report made of them.

One process writes, the main one. After a kill the files hold what had happened; a run that goes on from a checkpoint
first removes what came after it.
"""

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from trl_ext.checkpoints import explained_writing
from trl_ext.report import machine
from trl_ext.report.lines import (
    CURVE,
    FORMAT,
    METRICS,
    PLAIN,
    REPORT,
    RUN,
    SAMPLES,
    JsonLines,
    Line,
    as_json,
    read_lines,
    strict,
    write_whole,
)
from trl_ext.report.samples import EVALUATED, is_moment, keyed, some_of

LOGGER = logging.getLogger(__name__)


class RunRecorder(TrainerCallback):
    """Writes a run down while it goes on, and its report when it ends.

    Add it last: it writes what the other callbacks have done.

    Args:
        args: Configuration of the run, with `write_report`.
        method: "PPO-Max", "RRHF", "Reward".
        base: Id or folder of the base.
        identity: Gives what else makes the run: data, rewards, frozen adapters (`RunIdentity.facts` and `.adapters`).
        outcome: Gives what is known of its course: `alarms`, each with `step` and `alarm`; `stopped`, why it was ended.
        signal: Gives the number of the signal that has ended training; 0: none.
    """

    def __init__(
        self,
        args: Any,
        method: str,
        base: str,
        identity: Callable[[], dict[str, Any]],
        outcome: Callable[[], dict[str, Any]] = dict,
        signal: Callable[[], int] = lambda: 0,
    ):
        self.args, self.method, self.base = args, method, base
        self.identity, self.outcome, self.signal = identity, outcome, signal
        self.writes = args.process_index == 0
        self.folder = Path(str(args.output_dir))
        self.metrics, self.samples = JsonLines(self.folder / METRICS), JsonLines(self.folder / SAMPLES)
        self.run: dict[str, Any] = {}
        self.options: dict[str, Any] = {}  # of a command, beside the configuration: set before training
        self.begun = False  # whether there has been a training, whose files these are
        self.training = False
        self._waiting: dict[str, list[Line]] = {"metrics": [], "samples": []}  # of evaluations before it
        self._evaluated: list[Line] = []  # rows of the evaluation that goes on
        self._told: set[tuple[Any, Any]] = set()  # alarms that are in the file

    # ------------------------------------------------------------------ what trainers and recipes call

    def evaluated(self, rows: Sequence[Line]) -> None:
        """Take samples of an evaluation: `prompt`, `completion` and any figures of a row. It is over at `on_evaluate`.

        Args:
            rows: Of all processes, on the main one.
        """
        if self.writes:
            self._evaluated.extend(rows)

    def end_evaluation(self, step: int, part: bool = False) -> None:
        """Write the samples of an evaluation that is over.

        Args:
            step: Optimizer steps so far.
            part: Whether it was of a few of the prompts only, between two whole ones.
        """
        rows, self._evaluated = self._evaluated, []
        if not rows:
            return
        lines = [{"kind": "evaluation", "step": step, "part": part, **row} for row in keyed(rows)]
        if self.begun:
            with explained_writing(self.folder):
                self.samples.append(lines)
        else:
            self._waiting["samples"] = [strict(line) for line in lines]

    def sampled(self, rows: Callable[[list[int]], Sequence[Line]], count: int, step: int, stride: int) -> None:
        """Keep a few completions of a rollout batch, now and then.

        Args:
            rows: Gives those with these indices.
            count: Of completions in it, on this process.
            step: Optimizer steps so far.
            stride: Steps between two rollouts.
        """
        if self.writes and self.begun and is_moment(step, self.run["steps"]["planned"], stride):
            kept = rows(some_of(count, self.args.seed, step))
            with explained_writing(self.folder):
                self.samples.append([{"kind": "training", "step": step, **row} for row in kept])

    def scored(self, pairs: Sequence[Line], step: int) -> None:
        """Keep test pairs of a reward model: `prompt`, `chosen`, `rejected`, `chosen_score`, `rejected_score`."""
        if self.writes and self.begun:
            with explained_writing(self.folder):
                self.samples.append([{"kind": "pair", "step": step, **pair} for pair in pairs[:EVALUATED]])

    def judged(self, rows: Sequence[tuple[str, str]]) -> None:
        """Write down what an evaluation of a reward model has found, (label, value) each, and the report with it."""
        if self.writes and self.begun:
            self.run["evaluation"] = [list(row) for row in rows]
            self._write_run()
            if not self.training:
                self.write_report()

    def failed(self, error: BaseException, step: int) -> None:
        """Write down that training has ended with an error."""
        if self.writes and self.training:
            ended = isinstance(error, Exception)
            self._end("failed" if ended else "interrupted", f"{type(error).__name__}: {error}", step)
            if ended:
                self.write_report()

    def write_report(self) -> None:
        """Write the report and the picture of the course anew, where the configuration does not say no.

        It is no reason to lose a run: an error is logged.
        """
        if not (self.writes and self.begun and self.args.write_report):
            return
        from trl_ext.report.curves import write_picture  # with matplotlib, which no training needs
        from trl_ext.report.page import write_page

        try:
            write_picture(self.folder, self.folder / CURVE)
            write_page([self.folder], self.folder / REPORT)
        except Exception as error:
            LOGGER.warning(
                "%s could not be written (%s: %s). `trl-ext report %s` makes it again.",
                self.folder / REPORT,
                type(error).__name__,
                error,
                self.folder,
            )

    # ------------------------------------------------------------------ events of the training

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        identity = self.identity()  # of a sharded model every process must ask
        if not self.writes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        waiting, self._waiting = self._waiting, {"metrics": [], "samples": []}
        goes_on = state.global_step > 0
        with explained_writing(self.folder):
            if goes_on:
                metrics = of_this_run(_lines_of(self.metrics.path), state.log_history)
                samples = [s for s in _lines_of(self.samples.path) if s.get("step", 0) <= state.global_step]
            else:
                _set_aside(self.metrics.path, self.samples.path)
                metrics, samples = waiting["metrics"], waiting["samples"]
            self.metrics.begin(metrics)
            self.samples.begin(samples)
            alarms = [alarm for line in metrics for alarm in line.get("alarms", [])]
            self._told = {(alarm.get("step"), alarm.get("alarm")) for alarm in alarms}
            self.begun = self.training = True
            self._begin(state, identity, _sessions_of(self.folder / RUN) if goes_on else [])

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.writes or not state.log_history:
            return
        entry = len(state.log_history) - 1 if self.begun else None
        # Not `logs`: callbacks that print them take some out
        line = {"entry": entry, "step": state.global_step, "time": round(time.time(), 3), **state.log_history[-1]}
        if self.begun:
            told = self._new_alarms()
            with explained_writing(self.folder):
                self.metrics.append([line | ({"alarms": told} if told else {})])
        else:
            self._waiting["metrics"].append(strict(line))

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.writes:
            return
        self.end_evaluation(state.global_step)
        if self.begun and not self.training:
            self.write_report()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.writes:
            return
        stopped, number = self.outcome().get("stopped"), self.signal()
        if number:
            self._end("interrupted", f"by signal {number}; it can go on from its last checkpoint", state.global_step)
        elif stopped:
            self._end("stopped by the guard", stopped, state.global_step)
        elif state.global_step < state.max_steps:
            self._end("stopped", "a callback has ended training before its last step", state.global_step)
        else:
            self._end("finished", None, state.global_step)
        self.write_report()

    # ------------------------------------------------------------------ run.json

    def _begin(self, state: Any, identity: dict[str, Any], sessions: list[dict[str, Any]]) -> None:
        args = self.args
        sessions.append({"started": _now(), "from_step": state.global_step, "outcome": "running"})
        self.run = {
            "format": FORMAT,
            "method": self.method,
            "command": machine.this_command(),
            "base": self.base,
            "seed": args.seed,
            "outcome": "running",
            "why": None,
            "started": sessions[0]["started"],
            "ended": None,
            "steps": {"planned": state.max_steps, "done": state.global_step},
            "sessions": sessions,
            "identity": identity,
            "versions": machine.versions(),
            "hardware": machine.hardware(args.device, args.world_size),
            "memory": {"planned_gib": None, "measured_gib": None},
            "configuration": configuration_of(args),
            "options": strict(self.options),
            "defaults": defaults_of(args),
        }
        self._write_run()

    def _end(self, outcome: str, why: str | None, step: int) -> None:
        self.training = False
        self.run |= {"outcome": outcome, "why": why, "ended": _now()}
        self.run["steps"]["done"] = step
        self.run["sessions"][-1] |= {"ended": self.run["ended"], "to_step": step, "outcome": outcome, "why": why}
        planned = [
            line["memory/predicted_gib"] for line in _lines_of(self.metrics.path) if "memory/predicted_gib" in line
        ]
        measured = machine.peak_memory_gib(self.args.device)
        self.run["memory"] = {"planned_gib": planned[-1] if planned else None, "measured_gib": measured}
        self.run |= {key: value for key, value in self.outcome().items() if key.endswith("_policy")}
        self._write_run()

    def _write_run(self) -> None:
        write_whole(self.folder / RUN, as_json(self.run, indent=1) + "\n")

    def _new_alarms(self) -> list[dict[str, Any]]:
        found = []
        for alarm in self.outcome().get("alarms", []):
            name = alarm.get("step"), alarm.get("alarm")
            if name not in self._told:
                self._told.add(name)
                found.append(alarm)
        return found


def of_this_run(lines: Sequence[Line], history: Sequence[dict[str, Any]]) -> list[Line]:
    """The lines of a run that goes on: those of evaluations before it, then one for each entry of its log.

    A line that is of no entry came after the checkpoint; an entry without its line is written anew, without its time.

    Args:
        lines: Of the file.
        history: The log in the checkpoint.
    """
    known = {line["entry"]: line for line in lines if isinstance(line.get("entry"), int)}
    kept = [line for line in lines if line.get("entry") is None]
    for i, entry in enumerate(history):
        line = known.get(i, {})
        kept.append(line if line.get("step") == entry.get("step") else strict({"entry": i, **entry}))
    return kept


def configuration_of(args: Any) -> dict[str, Any]:
    """Every field of a configuration by name; secrets are masked, as `TrainingArguments` do."""
    names = {field.name for field in fields(args) if field.init}
    return {name: strict(value) for name, value in args.to_dict().items() if name in names}


def defaults_of(args: Any) -> dict[str, Any]:
    """The default of every field that has a plain one; None where the run chooses."""
    return {f.name: strict(f.default) for f in fields(args) if f.init and isinstance(f.default, PLAIN)}


def _lines_of(path: Path) -> list[Line]:
    return read_lines(path)[0] if path.is_file() else []


def _sessions_of(path: Path) -> list[dict[str, Any]]:
    """Earlier parts of a run, from a file that another process has written; one that was killed has said no more."""
    try:
        sessions = json.loads(path.read_text(encoding="utf-8"))["sessions"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    found = [dict(session) for session in sessions if isinstance(session, dict) and "started" in session]
    for session in found:
        if session.get("outcome") == "running":
            session["outcome"] = "killed"
    return found


def _set_aside(*paths: Path) -> None:
    """Keep what an earlier run has left here, under another name."""
    for path in paths:
        if path.is_file():
            path.replace(path.with_name(f"{path.name}.old"))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
