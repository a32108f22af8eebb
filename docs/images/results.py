"""Draws compare.png, tinystories.png and memory.png from the tables of the pages: `python docs/images/results.py`.

The first two show reward against KL at equal samples. The axis of the KL is its square root: what
lies on a straight line pays the same price for its reward.
"""

import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

INK, RULE, OURS = "#2d3748", "#e2e8f0", "#2b6cb0"
COLORS = ("#718096", "#c05621", "#2f855a", "#6b46c1", "#b7791f", "#b83280", "#0987a0")
DOCS = Path(__file__).resolve().parents[1]
# Where a name stands from its point, where the right of it is taken
PLACES = {"best of n": (-4, 9), "DPO (TRL)": (-8, -16), "RLOO (TRL)": (9, -5)}
PLACES |= {"RRHF online, no KL": (-9, 7), "RRHF online, KL": (-9, 7)}
TICKS = (0, 1, 2.5, 5, 10, 20, 40, 80)


def rows(page: str, title: str) -> list[list[str]]:
    """Cells of the table whose header begins so."""
    text = (DOCS / page).read_text().split(f"\n| {title} |")[1]
    table = re.match(r".*\n\| ---.*\n((?:\|.*\n)+)", text)
    assert table is not None, f"{page}: no table that begins with {title}"
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[1].splitlines()]


def numbers(cell: str) -> list[float]:
    """`0.47 (0.45 to 0.49)` -> mean, smallest, largest."""
    return [float(number) for number in re.findall(r"-?\d+\.?\d*", cell)]


def panel(width: float, height: float) -> tuple[plt.Figure, Axes]:
    figure, axis = plt.subplots(figsize=(width, height), layout="constrained")
    axis.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
    axis.grid(color=RULE, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    for spine in axis.spines.values():
        spine.set_color(RULE)
    axis.tick_params(colors=INK, length=0)
    axis.set_xlabel("KL from the start, nats a completion (axis: square root)", color=INK)
    axis.set_ylabel("reward", color=INK)
    return figure, axis


def finish(figure: plt.Figure, axis: Axes, largest: float, name: str) -> None:
    axis.set_xticks([tick for tick in TICKS if tick <= largest], [f"{t:g}" for t in TICKS if t <= largest])
    axis.set_xlim(0, largest)
    figure.savefig(Path(__file__).with_name(name), dpi=130)
    plt.close(figure)


def compare() -> None:
    """Eight methods: the mean of three seeds, and from the smallest to the largest."""
    figure, axis = panel(8, 4.6)
    for i, (method, reward, kl, *_) in enumerate(rows("results/rrhf.md", "method")):
        (y, y0, y1), (x, x0, x1) = numbers(reward), numbers(kl)
        color = OURS if method == "PPO-Max" else COLORS[i % len(COLORS)]
        axis.plot([x0, x1], [y, y], color=color, linewidth=1.5)
        axis.plot([x, x], [y0, y1], color=color, linewidth=1.5)
        axis.plot([x], [y], "o", color=color, markersize=8, clip_on=False)
        offset = PLACES.get(method, (9, 5))
        axis.annotate(
            method,
            (x, y),
            offset,
            textcoords="offset points",
            ha="right" if offset[0] < 0 else "left",
            color=color,
            size=10,
            weight="bold" if method == "PPO-Max" else "normal",
        )
    finish(figure, axis, 95, "compare.png")


def tinystories() -> None:
    """PPO-Max and TRL's RLOO over a grid of settings, and the best that any policy can have."""
    figure, axis = panel(8, 4.6)
    table = rows("results/ppo_max.md", "method | seed | rate, beta")
    for name, label, color, marker in (
        ("PPO-Max", "PPO-Max, defaults (3 seeds)", OURS, "o"),
        ("RLOO", "RLOO of TRL 1.16: nine settings of rate and beta", COLORS[1], "s"),
    ):
        points = [(float(row[4]), float(row[3])) for row in table if row[0].startswith(name)]
        axis.plot(*zip(*points, strict=True), marker, color=color, markersize=8, linestyle="none", label=label)
    best = next(float(row[5]) for row in table if row[0].startswith("PPO-Max"))
    start = 0.147
    kl = np.linspace(0, 60, 400)
    axis.plot(kl, start + 0.207 * np.sqrt(kl), "--", color=COLORS[0], label="no policy is above this (sampled up to 4)")
    axis.plot(kl, start + best * np.sqrt(kl), ":", color=OURS, label=f"a gain of {best:g} for each root of a nat")
    axis.plot([0], [start], "D", color=INK, markersize=7, label="before", clip_on=False)
    axis.set_ylim(0.1, 0.8)
    axis.legend(frameon=False, labelcolor=INK, loc="lower right")
    finish(figure, axis, 60, "tinystories.png")


def memory() -> None:
    """What each phase needs, by the plan, and what cards have."""
    table = rows("memory.md", "shape | base")
    figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
    phases = ("load", "generate", "score", "update")
    for i, phase in enumerate(phases):
        at = np.arange(len(table)) + 0.19 * (i - 1.5)
        axis.bar(at, [float(row[3 + i]) for row in table], 0.17, color=(OURS, *COLORS)[i], label=phase)
    for card in (8, 12):
        axis.axhline(card, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
        axis.text(len(table) - 0.55, card + 0.15, f"a card of {card} GB", color=INK, ha="right", size=9)
    axis.set_xticks(range(len(table)), [row[0] for row in table])
    axis.set_ylim(0, 13)
    axis.set_ylabel("GiB, predicted", color=INK)
    axis.spines[["top", "right"]].set_visible(False)
    for spine in axis.spines.values():
        spine.set_color(RULE)
    axis.tick_params(colors=INK, length=0)
    axis.legend(frameon=False, labelcolor=INK, ncols=4, loc="upper left", bbox_to_anchor=(0, 0.9))
    figure.savefig(Path(__file__).with_name("memory.png"), dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    compare()
    tinystories()
    memory()
