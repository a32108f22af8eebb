"""Pictures of a report, as SVG that takes its colours and its type from the page around it, and the picture of a card.

No name of a user's is drawn: matplotlib would read `$` as mathematics. Legends are written by the page, as text.
"""

import html
import io
import math
import re
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from trl_ext.report.loading import RunFiles, load_run
from trl_ext.report.panels import Panel

POINTS, BESIDE, PATH = 300, 60, 25  # of one curve; of more, neighbours are drawn together
SIZE, WIDE = (4.0, 2.25), (5.6, 3.4)
INSIDE = (0.125, 0.195, 0.86, 0.73)  # of the figure; a layout that is measured would take half of the time
# Colours that the page replaces: `svg_text`. Six are for series, as in page.css
INK, FAINT, ALARM, ACT, BEST = "#010203", "#010204", "#010205", "#010206", "#010207"
SERIES = tuple(f"#0a000{i}" for i in range(1, 7))
CLASSES = {INK: "--ink", FAINT: "--rule", ALARM: "--alarm", ACT: "--act", BEST: "--best"}
CLASSES |= {color: f"--s{i}" for i, color in enumerate(SERIES, start=1)}
DASHES = ("solid", (0, (4, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
RC: Any = {"svg.fonttype": "none", "axes.formatter.useoffset": False, "axes.unicode_minus": True}
MARKED = 20  # alarms that get a number


@dataclass
class Legend:
    """One curve as the page explains it: number of its colour and of its dashes, whether it is points, its name."""

    color: int
    dash: int
    points: bool
    label: str


@dataclass
class Drawn:
    """One panel, drawn.

    Attributes:
        panel: What is shown.
        svg: The picture.
        legend: Of its curves; empty where there is one only.
        notes: What a reader has to know of the drawing.
    """

    panel: Panel
    svg: str
    legend: list[Legend]
    notes: list[str]


def thin(points: Sequence[tuple[int, float]], most: int = POINTS) -> tuple[np.ndarray, ...]:
    """Of a long curve the mean of each of at most `most` groups of neighbours, with its smallest and largest value.

    Returns:
        step, mean, smallest, largest; those of a short curve are its points.
    """
    steps, values = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    if len(points) <= most:
        return steps, values, values, values
    parts = np.array_split(np.arange(len(points)), most)
    means = np.array([values[part].mean() for part in parts])
    low, high = (np.array([reduce(values[part]) for part in parts]) for reduce in (np.min, np.max))
    return np.array([steps[part].mean() for part in parts]), means, low, high


def draw(panel: Panel, runs: Sequence[RunFiles]) -> Drawn:
    """One panel, of one run or of several over each other; of several the colour is the run's."""
    figure, axis = _figure(SIZE)
    legend: list[Legend] = []
    notes: list[str] = []
    if panel.stacked and len(runs) == 1:
        _stack(axis, panel, runs[0], legend)
    else:
        _lines(axis, panel, runs, legend, notes)
    if len(runs) == 1:
        _range(axis, panel, runs[0])
        _alarms(axis, runs[0])
    targets = {panel.line(run.configuration) for run in runs}
    for target in (each for each in targets if each is not None):
        axis.axhline(target, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), alpha=0.7)
    _axes(axis, panel)
    axis.set_xlabel("optimizer step")
    return Drawn(panel, svg_text(figure, f"{panel.title}: {panel.caption}"), legend if len(legend) > 1 else [], notes)


def _figure(size: tuple[float, float]) -> tuple[Figure, Axes]:
    """A figure that lets the page's ground through."""
    figure = Figure(figsize=size, facecolor="none")
    return figure, figure.add_axes(INSIDE, facecolor="none")


def _lines(axis: Axes, panel: Panel, runs: Sequence[RunFiles], legend: list[Legend], notes: list[str]) -> None:
    many = len(runs) > 1
    for r, run in enumerate(runs):
        for s, (name, label) in enumerate(panel.series.items()):
            points = run.values(name)
            if not points:
                continue
            color, dash = (r, s) if many else (s, 0)
            steps, means, low, high = thin(points, BESIDE if many else POINTS)
            if len(steps) < len(points):
                shade: dict[str, Any] = {"alpha": 0.1 if many else 0.18, "linewidth": 0}
                axis.fill_between(steps, low, high, color=SERIES[color % 6], **shade)
                note = f"Of more than {len(steps)} logged values {len(steps)} means are drawn; the shade is from the "
                notes += [f"{note}smallest to the largest of each."] if not notes else []
            marker = "." if len(steps) == 1 else ""
            line: dict[str, Any] = {
                "color": SERIES[color % 6],
                "linewidth": 1.5,
                "linestyle": DASHES[dash % 4],
                "marker": marker,
            }
            axis.plot(steps, means, **line)
            name = run.name if len(panel.series) == 1 else f"{run.name}: {label}"
            legend.append(Legend(color % 6, dash % 4, False, name if many else label))
        for s, (name, label) in enumerate(panel.evaluated.items()):
            points = run.values(name)
            if not points:
                continue
            color = r if many else s
            steps, means, _, _ = thin(points)
            marks: dict[str, Any] = {"marker": "o", "markersize": 4.5, "linestyle": "none", "markeredgewidth": 1.2}
            axis.plot(steps, means, color=SERIES[color % 6], markerfacecolor="none", **marks)
            legend.append(Legend(color % 6, 0, True, f"{run.name}: {label}" if many else label))


def _stack(axis: Axes, panel: Panel, run: RunFiles, legend: list[Legend]) -> None:
    rows: dict[int, dict[str, float]] = {}
    for name in panel.series:
        for step, value in run.values(name):
            rows.setdefault(step, {})[name] = value
    if not rows:
        return
    steps = sorted(rows)
    columns = {name: thin([(step, rows[step].get(name, 0.0)) for step in steps]) for name in panel.series}
    x = next(iter(columns.values()))[0]
    colors = [SERIES[i % 6] for i in range(len(columns))]
    axis.stackplot(x, *(column[1] for column in columns.values()), colors=colors, alpha=0.75, linewidth=0)
    legend.extend(Legend(i % 6, 0, False, label) for i, label in enumerate(panel.series.values()))


def _range(axis: Axes, panel: Panel, run: RunFiles) -> None:
    """Shade where the first series should be, as far as the curves reach."""
    first = next(iter(panel.series), None)
    band = panel.band(run.configuration, [value for _, value in run.values(first)]) if first else None
    if band is None:
        return
    low, high = axis.get_ylim()
    bottom, top = (low if band[0] is None else band[0]), (high if band[1] is None else band[1])
    axis.axhspan(bottom, top, color=SERIES[2], alpha=0.1, linewidth=0, zorder=0)
    axis.set_ylim(min(low, bottom), max(high, top))


def _alarms(axis: Axes, run: RunFiles) -> None:
    """Vertical lines: alarms and acts of the guard, numbered as in the list, and the policy that was kept."""
    for number, alarm in enumerate(run.alarms[:MARKED], start=1):
        if not isinstance(alarm.get("step"), int):
            continue
        color = ACT if alarm.get("act") else ALARM
        axis.axvline(alarm["step"], color=color, linewidth=0.9, alpha=0.9)
        text: dict[str, Any] = {"transform": axis.get_xaxis_transform(), "ha": "center", "va": "bottom", "fontsize": 7}
        axis.text(alarm["step"], 1.0, str(number), color=color, **text)
    best = run.info.get("best_policy")
    if isinstance(best, dict) and isinstance(best.get("step"), int | float):
        axis.axvline(best["step"], color=BEST, linewidth=1.1, linestyle=(0, (1, 2)))


def _axes(axis: Axes, panel: Panel) -> None:
    if panel.zero:
        low, high = axis.get_ylim()
        drawn = axis.dataLim.y0  # where the axis ends below it by a margin alone, it begins at 0
        axis.set_ylim(0.0 if drawn >= 0 else low, high if axis.dataLim.y1 > 0 else 1.0)
    _plain(axis)


def _plain(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    for spine in axis.spines.values():
        spine.set_color(FAINT)
    axis.grid(axis="y", color=FAINT, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.tick_params(colors=INK, labelsize=8, length=0, pad=4)
    axis.xaxis.label.set(color=INK, fontsize=8)
    axis.yaxis.label.set(color=INK, fontsize=8)
    axis.yaxis.set_major_locator(MaxNLocator(5))
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))


def short(value: float) -> str:
    """A number in a few signs: 0.25, 12,000, 3e-5."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "-"
    if abs(value) >= 1e7 or abs(value) < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def reward_against_kl(runs: Sequence[RunFiles]) -> Drawn | None:
    """The course of each run as reward over KL, a light point at its beginning; None where one of them is missing."""
    figure, axis = _figure(WIDE)
    legend: list[Legend] = []
    for r, run in enumerate(runs):
        rows = [(line["kl"], line["reward"]) for line in run.metrics if _both(line, "kl", "reward")]
        held_out = [
            (line["eval_kl"], line["eval_reward"]) for line in run.metrics if _both(line, "eval_kl", "eval_reward")
        ]
        color = SERIES[r % 6]
        if rows:
            dots, path = (_means(np.array(rows), most) for most in (POINTS, max(1, min(PATH, len(rows) // 4))))
            strength: Any = np.linspace(0.15, 0.75, len(dots))
            axis.scatter(dots[:, 0], dots[:, 1], s=10, c=[color] * len(dots), alpha=strength, linewidths=0)
            axis.plot(path[:, 0], path[:, 1], color=color, linewidth=1.6)
            legend.append(
                Legend(
                    r % 6,
                    0,
                    False,
                    run.name
                    if len(runs) > 1
                    else "rollout batches, the first ones light; means of neighbours as a line",
                )
            )
        if held_out:
            kl, reward = zip(*held_out, strict=True)
            marks: dict[str, Any] = {"marker": "o", "markersize": 6, "linestyle": "none", "markeredgewidth": 1.5}
            axis.plot(kl, reward, color=color, markerfacecolor="none", **marks)
            label = "evaluations on held-out prompts"
            legend.append(Legend(r % 6, 0, True, f"{run.name}: {label}" if len(runs) > 1 else label))
    if not legend:
        return None
    caption = (
        "What was gained, and how far the policy had to go for it. Better runs are up and to the left. Reward that "
        "grows slower than the square root of the KL has little left to find."
    )
    return _over_kl(figure, axis, caption, legend)


def _over_kl(figure: Figure, axis: Axes, caption: str, legend: list[Legend]) -> Drawn:
    """The axes of reward over KL, and the picture with its caption."""
    _plain(axis)
    axis.xaxis.set_major_locator(MaxNLocator(6))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axis.set(xlabel="KL from the reference, nats a completion", ylabel="reward")
    panel = Panel("Reward against KL", {}, caption)
    return Drawn(panel, svg_text(figure, f"{panel.title}: {caption}"), legend, [])


@dataclass(frozen=True)
class Point:
    """A policy in the picture of reward against KL; intervals are (low, high) or None."""

    name: str
    kl: float
    kl_interval: tuple[float, float] | None
    reward: float
    reward_interval: tuple[float, float] | None


def draw_points(points: Sequence[Point]) -> Drawn | None:
    """Policies as reward over KL with their intervals, the first one, the reference, as a cross; None for none."""
    if not points:
        return None
    figure, axis = _figure(WIDE)
    _points(axis, points, [INK, *SERIES])
    caption = (
        "What each policy gained, and how far it went for it; lines are 95 % intervals over the prompts, the cross is "
        "the reference. Better policies are up and to the left."
    )
    legend = [Legend((i - 1) % 6, 0, True, point.name) for i, point in enumerate(points) if i]
    return _over_kl(figure, axis, caption, legend)


def write_points(points: Sequence[Point], path: Path) -> None:
    """The same as a PNG, with the names in it; nothing for no points."""
    if not points:
        return
    figure = Figure(figsize=WIDE, layout="constrained")
    axis = figure.subplots()
    _points(axis, points, ["#20262b", "#2f6690", "#c8553d", "#3a7d44", "#8a5a9e", "#b0820f", "#54707f"])
    axis.set(xlabel="KL from the reference, nats a completion", ylabel="reward")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(handles, [_plain_name(label) for label in labels], frameon=False, fontsize=8)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a script that the font has not
        figure.savefig(path, dpi=130)


def _plain_name(name: str) -> str:
    """A name for a legend of matplotlib's: short, of signs that can be seen, none of them mathematics."""
    return "".join(sign if sign.isprintable() else " " for sign in name[:60]).replace("$", r"\$")


def _points(axis: Axes, points: Sequence[Point], colors: Sequence[str]) -> None:
    for i, point in enumerate(points):
        sides = []
        for value, interval in ((point.kl, point.kl_interval), (point.reward, point.reward_interval)):
            low, high = interval or (value, value)
            sides.append([[max(value - low, 0.0)], [max(high - value, 0.0)]])
        marks: dict[str, Any] = {"fmt": "o" if i else "x", "markersize": 6, "linewidth": 1.2, "label": point.name}
        axis.errorbar(point.kl, point.reward, xerr=sides[0], yerr=sides[1], color=colors[i % len(colors)], **marks)


def _means(rows: np.ndarray, most: int) -> np.ndarray:
    """(N, 2) -> means of at most so many groups of neighbours."""
    return np.array([part.mean(0) for part in np.array_split(rows, most if len(rows) > most else len(rows))])


def _both(line: Mapping[str, Any], *names: str) -> bool:
    return all(isinstance(line.get(name), int | float) for name in names)


def svg_text(figure: Figure, description: str) -> str:
    """A figure as an `<svg>` element for a page: its colours are variables of the page's, its type is the page's."""
    out = io.StringIO()
    salt = f"{zlib.crc32(description.encode()):08x}"
    with matplotlib.rc_context(RC | {"svg.hashsalt": salt}):
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    for color, variable in CLASSES.items():
        text = text.replace(color, f"var({variable})")
    # One name space for all pictures of a page
    prefix = f"p{salt}-"
    text = re.sub(r'\bid="', f'id="{prefix}', text)
    text = re.sub(r"url\(#", f"url(#{prefix}", text)
    text = re.sub(r'xlink:href="#', f'xlink:href="#{prefix}', text)
    label = html.escape(description, quote=True)
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1).strip()


def write_picture(folder: Path, path: Path) -> None:
    """The learning curve of a run as a PNG for its card: reward, and KL where there is one; nothing without them."""
    run = load_run(folder)
    named = {"reward": "reward", "kl": "KL from the reference, nats", "accuracy": "accuracy"}
    named |= {"ranking_accuracy": "ranking accuracy", "loss": "loss"}
    shown = [name for name in named if run.values(name)][:2]
    if not shown:
        return
    figure = Figure(figsize=(4.2 * len(shown), 2.8), layout="constrained")
    for axis, name in zip(np.atleast_1d(figure.subplots(1, len(shown))), shown, strict=True):
        steps, means, low, high = thin(run.values(name))
        axis.plot(steps, means, color="#2f6690", linewidth=1.6)
        axis.fill_between(steps, low, high, color="#2f6690", alpha=0.2, linewidth=0)
        held_out = run.values(f"eval_{name}")
        if held_out:
            axis.plot(*zip(*held_out, strict=True), "o", color="#c8553d", markersize=5, label="held-out")
            axis.legend(frameon=False)
        axis.set(title=named[name], xlabel="optimizer step")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    figure.savefig(path, dpi=110)
