"""The report: one HTML file, by Jinja2, which needs no network and runs no script.

Every text of a model, a dataset or a user is escaped as text by the template engine, and a policy in the page forbids
scripts and anything from elsewhere.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup, escape

from trl_ext.report.curves import draw, reward_against_kl, short
from trl_ext.report.intervals import KL, RESAMPLES, Change, changes
from trl_ext.report.lines import Line, write_whole
from trl_ext.report.loading import RunFiles, is_number, load_run
from trl_ext.report.panels import panels_of
from trl_ext.report.samples import text_of

SHOWN, TRAINING_SHOWN = 40, 40  # samples in the browser, and completions of the training
LONGEST = 3000  # characters of a text in it
OUTCOME = ("Before and after", "Evaluation")  # of policies, of reward models alone
MOST_RUNS = 6  # as many as there are colours
# Control characters are shown as signs; line breaks and tabs do what they do
# and those that turn the direction of a text, which would let it read as another one
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]")


@dataclass
class Sample:
    """A held-out prompt and what was written to it, for the browser.

    Attributes:
        prompt: As text.
        answers: (when, text, figures), in order of the steps.
        change: Of the reward, from the first to the last; None where one has none.
    """

    prompt: str
    answers: list[tuple[str, str, list[tuple[str, str]]]]
    change: float | None


def write_page(folders: Sequence[str | Path], path: str | Path) -> Path:
    """Write a report of one run, or of several in comparison.

    Args:
        folders: The `output_dir` of each run.
        path: Of the HTML file.

    Raises:
        ValueError: A folder without a run, too many runs, or one run twice.
    """
    if not 1 <= len(folders) <= MOST_RUNS:
        raise ValueError(f"{len(folders)} runs: a report is of 1 to {MOST_RUNS}.")
    resolved = [Path(folder).resolve() for folder in folders]
    if len(set(resolved)) < len(resolved):
        twice = next(folder for folder in resolved if resolved.count(folder) > 1)
        raise ValueError(f"{twice} is named twice: name each run once.")
    write_whole(Path(path), render([load_run(folder) for folder in folders]))
    return Path(path)


def render(runs: Sequence[RunFiles]) -> str:
    """The page of one run, or of several, as text."""
    pictures = [draw(panel, runs) for panel in _panels(runs)]
    frontier = reward_against_kl(runs)
    context = {
        "runs": [_facts(run, i) for i, run in enumerate(runs)],
        "many": len(runs) > 1,
        "outcome_title": OUTCOME[all(run.info.get("method") == "Reward" for run in runs)],
        "pictures": pictures,
        "thinned": list(dict.fromkeys(note for picture in pictures for note in picture.notes)),
        "frontier": frontier,
        "last": last_values(runs),
        "differences": differences(runs) if len(runs) > 1 else [],
        "shared": shared_prompts(runs) if len(runs) > 1 else [],
        "resamples": RESAMPLES,
        "longest": LONGEST,
    }
    return environment().get_template("report.html").render(context)


def environment() -> Environment:
    """The template engine of every page: it escapes, and knows the words below."""
    made = Environment(
        loader=PackageLoader("trl_ext.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "words": words,
        "last_part": last_part,
        "number": number,
        "visible": visible,
        "interval": interval,
        "when": when,
    }
    return made


def _panels(runs: Sequence[RunFiles]) -> list[Any]:
    found: dict[str, Any] = {}
    for run in runs:
        for panel in panels_of(str(run.info.get("method", "")), run.names, run.configuration):
            known = found.get(panel.title)
            if known is None or len(panel.series) > len(known.series):
                found[panel.title] = panel
    return list(found.values())


def _facts(run: RunFiles, index: int) -> dict[str, Any]:
    """What the template says of a run."""
    samples = browser(run)
    pair = run.whole_evaluations()
    found_changes = changes(pair[0], pair[1]) if pair else []
    return {
        "name": run.name,
        "color": index,
        "info": run.info,
        "notes": run.notes,
        "tiles": tiles(run, found_changes),
        "alarms": run.alarms,
        "changes": found_changes,
        "evaluated": {"before": pair[2], "after": pair[3]} if pair else None,
        "samples": samples[:SHOWN],
        "all_samples": len(samples),
        "training": [_training_sample(line) for line in _spread(run.training, TRAINING_SHOWN)],
        "all_training": len(run.training),
        "pairs": most_wrong(run),
        "all_pairs": len(run.pairs),
        "evaluation": judgement(run),
        "options": options(run),
        "duration": duration(run.info),
    }


LAST = {
    "reward": "reward",
    "kl": "KL",
    "completions/mean_length": "length, tokens",
    "explained_variance": "explained variance",
    "ranking_accuracy": "ranking accuracy",
    "accuracy": "accuracy",
    "loss": "loss",
    "peak_memory_gib": "peak memory, GiB",
}


def last_values(runs: Sequence[RunFiles]) -> list[tuple[str, list[str]]]:
    """The last logged value of each run, of the metrics that any has: label, and values in the order of the runs."""
    found = []
    for name, label in LAST.items():
        values = [run.values(name) for run in runs]
        if any(values):
            found.append((label, [number(points[-1][1]) if points else number(None) for points in values]))
    return found


TILES = {"reward": "reward, held-out", KL: "KL, nats"}


def tiles(run: RunFiles, found_changes: Sequence[Change]) -> list[tuple[str, str, str]]:
    """The few figures that a reader looks for first: (label, value, what it was before)."""
    found = []
    for row in found_changes:
        if row.name in TILES:
            found.append((TILES[row.name], number(row.after), f"before {number(row.before)}"))
    if not any(label.startswith("reward") for label, _, _ in found):
        for name, label in (
            ("reward", "reward, last"),
            ("accuracy", "accuracy, last"),
            ("ranking_accuracy", "ranking"),
        ):
            points = run.values(name)
            if points:
                found.append((label, number(points[-1][1]), f"first {number(points[0][1])}"))
                break
    steps = run.info.get("steps")
    if isinstance(steps, dict):
        found.append(("optimizer steps", number(steps.get("done")), f"of {number(steps.get('planned'))}"))
    took = duration(run.info)
    if took:
        found.append(("time", took, ""))
    memory = run.info.get("memory")
    if isinstance(memory, dict) and is_number(memory.get("measured_gib")):
        planned = memory.get("planned_gib")
        found.append(("peak memory", f"{memory['measured_gib']:.2f} GiB", f"planned {planned:.2f}" if planned else ""))
    if run.info.get("method") == "PPO-Max":
        found.append(("alarms", str(len(run.alarms)), "of the guard"))
    return found


def duration(info: dict[str, Any]) -> str:
    """Time that the sessions of a run took, those that have an end."""
    seconds = 0.0
    for session in info.get("sessions") or []:
        try:
            times = [datetime.fromisoformat(session[key]) for key in ("started", "ended")]
        except (KeyError, TypeError, ValueError):  # it was killed, or goes on
            continue
        seconds += (times[1] - times[0]).total_seconds()
    if seconds <= 0:
        return ""
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if hours < 2 else f"{hours:.1f} h"


def browser(run: RunFiles) -> list[Sample]:
    """Held-out prompts with everything that was written to them, those first whose reward has changed most."""
    rows: dict[str, list[tuple[int, Line]]] = {}
    for step, samples in run.evaluations.items():
        for key, line in samples.items():
            rows.setdefault(key, []).append((step, line))
    last = max(run.evaluations, default=0)
    found = []
    for lines in rows.values():
        rewards = [line.get("reward") for _, line in lines]
        known = len(lines) > 1 and is_number(rewards[0]) and is_number(rewards[-1])
        answers = []
        for step, line in lines:
            name = "before" if step == 0 else "after" if step == last else f"step {step:,}"
            answers.append((name, cut(text_of(line.get("completion"))), figures(line)))
        change = rewards[-1] - rewards[0] if known else None  # type: ignore[operator]
        found.append(Sample(cut(text_of(lines[0][1].get("prompt"))), answers, change))
    return sorted(found, key=lambda sample: -1.0 if sample.change is None else abs(sample.change), reverse=True)


def figures(line: Line) -> list[tuple[str, str]]:
    """The numbers of a sample, for its heading."""
    found = [("reward", line.get("reward")), ("KL", line.get("kl")), ("tokens", line.get("tokens"))]
    rewards = line.get("rewards")
    if isinstance(rewards, dict) and len(rewards) > 1:
        found[1:1] = [(name, value) for name, value in rewards.items() if name != "reward"]
    shown = [(name, number(value)) for name, value in found if is_number(value)]
    return [*shown, ("cut", "yes")] if line.get("truncated") is True else shown


def most_wrong(run: RunFiles) -> list[dict[str, Any]]:
    """Test pairs of a reward model, those first whose rejected response it prefers most."""
    pairs = sorted(run.pairs, key=lambda pair: pair["chosen_score"] - pair["rejected_score"])[:SHOWN]
    return [
        {name: cut(text_of(pair.get(name))) for name in ("prompt", "chosen", "rejected")}
        | {"lead": pair["chosen_score"] - pair["rejected_score"]}
        | {f"{name}_score": number(pair[f"{name}_score"]) for name in ("chosen", "rejected")}
        for pair in pairs
    ]


def judgement(run: RunFiles) -> list[tuple[str, str]]:
    """Rows of the evaluation of a reward model: what it is, and its value as text."""
    rows = run.info.get("evaluation")
    pairs = [row for row in rows if isinstance(row, list) and len(row) == 2] if isinstance(rows, list) else []
    return [(str(label), str(value)) for label, value in pairs]


def _training_sample(line: Line) -> dict[str, Any]:
    texts = {name: cut(text_of(line.get(name))) for name in ("prompt", "completion")}
    return {"step": line.get("step"), "figures": figures(line), **texts}


def _spread(lines: Sequence[Line], most: int) -> list[Line]:
    """At most so many, evenly spread."""
    count = min(most, len(lines))
    return [lines[i * len(lines) // count] for i in range(count)]


def options(run: RunFiles) -> dict[str, list[tuple[str, str, str]]]:
    """Configuration beside defaults, (name, value, default): what was changed, what the run chose, and the rest."""
    defaults = run.info.get("defaults")
    defaults = defaults if isinstance(defaults, dict) else {}
    found: dict[str, list[tuple[str, str, str]]] = {"changed": [], "chosen": [], "same": []}
    for name, value in sorted(run.configuration.items()):
        if name not in defaults:
            kind, default = ("same", "") if value in (None, [], {}) else ("chosen", "")
        else:
            default = shown(defaults[name])
            kind = "same" if value == defaults[name] else "chosen" if defaults[name] is None else "changed"
        found[kind].append((name, shown(value), default))
    return found


def differences(runs: Sequence[RunFiles]) -> list[tuple[str, list[str]]]:
    """Options in which runs differ: name, and the value of each."""
    names = sorted({name for run in runs for name in run.configuration})
    rows = [(name, [shown(run.configuration.get(name)) for run in runs]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1 and name not in ("output_dir", "run_name")]


def shared_prompts(runs: Sequence[RunFiles]) -> list[tuple[str, list[tuple[str, list[tuple[str, str]]]]]]:
    """Prompts that the last evaluation of every run has: the prompt, and of each run text and figures.

    Those first on which the rewards of the runs differ most.
    """
    last = [run.evaluations[max(run.evaluations)] if run.evaluations else {} for run in runs]
    keys = [key for key in last[0] if all(key in samples for samples in last)]

    def spread(key: str) -> float:
        rewards = [samples[key].get("reward") for samples in last]
        known = [reward for reward in rewards if is_number(reward)]
        return max(known) - min(known) if known else 0.0  # type: ignore[type-var, operator]

    found = []
    for key in sorted(keys, key=spread, reverse=True)[:SHOWN]:
        answers = [(cut(text_of(samples[key].get("completion"))), figures(samples[key])) for samples in last]
        found.append((cut(text_of(last[0][key].get("prompt"))), answers))
    return found


# ---------------------------------------------------------------------- words of the page


def visible(text: Any) -> str:
    """A text whose control characters can be seen, and which fits any encoding."""

    def seen(match: re.Match[str]) -> str:
        code = ord(match[0])
        return chr(0x2400 + code) if code < 32 else f"[U+{code:04X}]"

    return CONTROL.sub(seen, str(text)).encode("utf-8", "replace").decode()


def last_part(name: str) -> str:
    """Of a folder its own name; a Hub id stays as it is."""
    return Path(name).name if Path(name).is_absolute() else name


def words(text: str) -> Markup:
    """A text of this package's, in which `this` is code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def cut(text: str) -> str:
    """A text of a length that a page can hold many of."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} [...]"


def shown(value: Any) -> str:
    """The value of an option as text."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def number(value: Any) -> str:
    """A figure in a few signs; a dash where there is none."""
    return short(value) if is_number(value) else "-"


def interval(pair: tuple[float, float] | None) -> str:
    """An interval as text; nothing where there is none."""
    return "" if pair is None else f"{short(pair[0])} to {short(pair[1])}"


def when(moment: Any) -> str:
    """A moment as `2026-01-31 17:05 UTC`."""
    try:
        return datetime.fromisoformat(str(moment)).strftime("%Y-%m-%d %H:%M UTC")
    except ValueError:
        return ""
