"""Several policies on the same held-out prompts: a table with paired intervals, a picture, a page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_ext.report.curves import Point, draw_points, short, write_points
from trl_ext.report.intervals import FEWEST, KL, RESAMPLES, Change, changes
from trl_ext.report.lines import Line, as_json, write_whole
from trl_ext.report.loading import RunFiles, is_number
from trl_ext.report.page import LONGEST, MOST_RUNS, SHOWN, cut, environment, figures
from trl_ext.report.samples import text_of

REFERENCE = "reference"
REWARD = "reward"
REWARDS = ("reward_funcs", "reward adapter")  # in `run.json`: what has scored


@dataclass(frozen=True)
class Policy:
    """What one policy wrote to held-out prompts.

    Attributes:
        name: As tables call it.
        samples: key -> sample, as in `samples.jsonl`.
    """

    name: str
    samples: Mapping[str, Line]


@dataclass(frozen=True)
class Comparison:
    """Policies on the prompts that all of them have answered.

    Attributes:
        policies: Of the first one the others' changes are measured, and on pairs of answers to the same prompt.
        beside: The same changes from the second policy, of those after it; None for fewer than three.
        changes: For each policy but the first, by its name.
        notes: What a reader has to know, in words.
    """

    policies: list[Policy]
    changes: dict[str, list[Change]]
    beside: dict[str, list[Change]]
    notes: list[str]

    @property
    def keys(self) -> list[str]:
        """Of the prompts."""
        return list(self.policies[0].samples)


def compare_policies(policies: Sequence[Policy], notes: Sequence[str] = ()) -> Comparison:
    """Measure every policy's change from the first one, and from the second where there are more.

    Args:
        policies: At least two, of different names; the first is the reference.
        notes: See `Comparison`.

    Raises:
        ValueError: Fewer or more than can be shown, or no prompt that all have answered.
    """
    if not 2 <= len(policies) <= MOST_RUNS + 1:
        raise ValueError(f"{len(policies) - 1} policies: compare 1 to {MOST_RUNS} with their reference.")
    keys = [key for key in policies[0].samples if all(key in each.samples for each in policies)]
    if not keys:
        names = ", ".join(each.name for each in policies)
        raise ValueError(
            f"{names} have no held-out prompts in common. Name prompts that all of them answer now: --dataset_name."
        )
    kept = [Policy(each.name, {key: each.samples[key] for key in keys}) for each in policies]
    first, second = kept[0], kept[1]
    left_out = max(len(each.samples) for each in policies) - len(keys)
    notes = [*notes, *([f"{left_out} prompts that not all have answered are left out."] if left_out else [])]
    if len(keys) < FEWEST:
        notes.append(f"{len(keys)} prompts are too few for intervals.")
    found = {each.name: changes(first.samples, each.samples) for each in kept[1:]}
    beside = {each.name: changes(second.samples, each.samples) for each in kept[2:]}
    return Comparison(kept, found, beside, notes)


def policies_of_runs(runs: Sequence[RunFiles], names: Sequence[str]) -> tuple[list[Policy], list[str]]:
    """What runs wrote at their last whole evaluation, and the first one's start as reference; and notes.

    Raises:
        ValueError: A run without an evaluation before and after.
    """
    pairs = []
    for run in runs:
        pair = run.whole_evaluations()
        if pair is None:
            raise ValueError(
                f"{run.folder} holds no evaluation before and after its training. Name prompts to evaluate it on now: "
                "--dataset_name."
            )
        pairs.append(pair)
    policies = [Policy(REFERENCE, pairs[0][0])]
    policies += [Policy(name, pair[1]) for name, pair in zip(names, pairs, strict=True)]
    notes = []
    known = [run.info.get("identity") or {} for run in runs]
    if any(facts.get(each) != known[0].get(each) for facts in known for each in REWARDS):
        notes.append("The runs were scored by different rewards, so their rewards cannot be compared.")
    if any(facts.get("reference adapter") != known[0].get("reference adapter") for facts in known):
        notes.append("The runs started from different policies: each KL is from a run's own start.")
    return policies, notes


def figures_table(comparison: Comparison) -> tuple[list[str], list[tuple[str, ...]]]:
    """Head and rows for a console: each figure of each policy, and its interval below it; of one policy the change."""
    head = ["", *(policy.name for policy in comparison.policies)]
    by_policy = [{change.name: change for change in found} for found in comparison.changes.values()]
    rows = []
    for change in next(iter(comparison.changes.values())):
        own = [found.get(change.name) for found in by_policy]
        cells = [_cell(change.before, change.before_interval)]
        cells += ["-" if each is None else _cell(each.after, each.after_interval) for each in own]
        rows.append((change.name, *cells, *([_change(change)] if len(own) == 1 else [])))
    return [*head, *(["change"] if len(by_policy) == 1 else [])], rows


def changes_tables(comparison: Comparison) -> list[tuple[str, list[str], list[tuple[str, ...]]]]:
    """Title, head and rows for a console: how several policies differ from the reference, and from their first one."""
    tables = []
    for origin, table in enumerate((comparison.changes, comparison.beside)):
        if len(comparison.changes) > 1 and table:
            by_policy = [{change.name: change for change in found} for found in table.values()]
            names = [change.name for change in next(iter(table.values()))]
            rows = [(name, *(_change(found[name]) if name in found else "-" for found in by_policy)) for name in names]
            title = f"Difference from {comparison.policies[origin].name}, on the same prompts"
            tables.append((title, ["", *table], rows))
    return tables


def _cell(value: float, interval: tuple[float, float] | None) -> str:
    return short(value) + ("" if interval is None else f"\n{short(interval[0])} to {short(interval[1])}")


def _change(change: Change) -> str:
    sign = "+" if change.change > 0 else ""
    return sign + _cell(change.change, change.interval)


def as_record(comparison: Comparison, facts: Mapping[str, Any]) -> dict[str, Any]:
    """All figures, for a JSON file.

    Args:
        facts: What else the file holds: command, settings, versions.
    """
    means: dict[str, dict[str, Any]] = {policy.name: {} for policy in comparison.policies}
    for name, found in comparison.changes.items():
        for change in found:
            means[comparison.policies[0].name][change.name] = _mean(change.before, change.before_interval)
            means[name][change.name] = _mean(change.after, change.after_interval)
    return {
        **facts,
        "prompts": len(comparison.keys),
        "interval": "95 % bootstrap over the prompts, paired for changes",
        "policies": means,
        "changes": {
            f"{name} from {comparison.policies[origin].name}": {
                change.name: {"change": change.change, "interval": change.interval} for change in found
            }
            for origin, table in enumerate((comparison.changes, comparison.beside))
            for name, found in table.items()
        },
        "notes": comparison.notes,
    }


def _mean(value: float, interval: tuple[float, float] | None) -> dict[str, Any]:
    return {"mean": value, "interval": interval}


def points_of(comparison: Comparison) -> list[Point]:
    """Each policy as KL and reward with their intervals, in order."""
    first = next(iter(comparison.changes.values()))
    start = {change.name: (change.before, change.before_interval) for change in first}
    every = [start, *({c.name: (c.after, c.after_interval) for c in found} for found in comparison.changes.values())]
    return [
        Point(policy.name, *values[KL], *values[REWARD])
        for policy, values in zip(comparison.policies, every, strict=True)
        if KL in values and REWARD in values
    ]


def write_comparison(
    comparison: Comparison, folder: Path, stem: str, title: str, facts: Mapping[str, Any]
) -> dict[str, Path]:
    """Write figures, samples, picture and page.

    Args:
        folder: Where; it is there.
        stem: Of the files' names: `<stem>.json`, `<stem>.html`, `<stem>.png`; the samples are `samples.jsonl`.
        title: Of the page.
        facts: See `as_record`; on the page too.

    Returns:
        The files, by what they hold.
    """
    paths = {kind: folder / f"{stem}.{ending}" for kind, ending in (("figures", "json"), ("page", "html"))}
    paths |= {"samples": folder / "samples.jsonl", "picture": folder / f"{stem}.png"}
    write_whole(paths["figures"], as_json(as_record(comparison, facts), indent=1) + "\n")
    lines = [{"policy": policy.name, **line} for policy in comparison.policies for line in policy.samples.values()]
    write_whole(paths["samples"], "".join(as_json(line) + "\n" for line in lines))
    write_points(points_of(comparison), paths["picture"])
    write_whole(paths["page"], render_comparison(comparison, title, facts))
    return paths


def render_comparison(comparison: Comparison, title: str, facts: Mapping[str, Any]) -> str:
    """The page as text: one HTML file that needs no network and runs no script."""
    names = [change.name for change in next(iter(comparison.changes.values()))]
    tables = [(comparison.policies[0].name, comparison.changes)]
    tables += [(comparison.policies[1].name, comparison.beside)] if comparison.beside else []
    context = {
        "title": title,
        "policies": [policy.name for policy in comparison.policies],
        "tables": [
            (origin, {name: {change.name: change for change in found} for name, found in table.items()})
            for origin, table in tables
        ],
        "names": names,
        "count": len(comparison.keys),
        "enough": len(comparison.keys) >= FEWEST,
        "resamples": RESAMPLES,
        "picture": draw_points(points_of(comparison)),
        "samples": shown_samples(comparison),
        "longest": LONGEST,
        "notes": comparison.notes,
        "facts": {name: value if isinstance(value, str) else as_json(value) for name, value in facts.items()},
    }
    return environment().get_template("comparison.html").render(context)


def shown_samples(comparison: Comparison) -> list[tuple[str, list[tuple[str, list[tuple[str, str]]]], float | None]]:
    """Prompts with each policy's text and figures, those first whose reward has changed most; and that change.

    Of several policies the change is the largest one.
    """

    def change(key: str) -> float | None:
        rewards = [policy.samples[key].get("reward") for policy in comparison.policies]
        if not all(map(is_number, rewards)):
            return None
        return max((reward - rewards[0] for reward in rewards[1:]), key=abs)  # type: ignore[operator]

    found = []
    for key in comparison.keys:
        lines = [policy.samples[key] for policy in comparison.policies]
        answers = [(cut(text_of(line.get("completion"))), figures(line)) for line in lines]
        found.append((cut(text_of(lines[0].get("prompt"))), answers, change(key)))
    found.sort(key=lambda row: -1.0 if row[2] is None else abs(row[2]), reverse=True)
    return found[:SHOWN]
