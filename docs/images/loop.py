"""Draws docs/images/loop.png: `python docs/images/loop.py`."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

TRAINED, FROZEN, CRITIC, INK = "#2b6cb0", "#718096", "#c05621", "#2d3748"
figure, axis = plt.subplots(figsize=(9, 4.4), layout="constrained")
axis.set(xlim=(0, 12), ylim=(-0.8, 6))
axis.axis("off")


def box(x: float, y: float, title: str, text: str, color: str, width: float = 2.5) -> None:
    patch = {"boxstyle": "round,pad=0.05,rounding_size=0.12", "ec": "none"}
    axis.add_patch(FancyBboxPatch((x, y), width, 1.3, fc=color, alpha=0.15, **patch))
    axis.add_patch(FancyBboxPatch((x, y + 0.85), width, 0.45, fc=color, **patch))
    axis.text(x + width / 2, y + 1.07, title, ha="center", va="center", size=11, color="white", weight="bold")
    axis.text(x + width / 2, y + 0.4, text, ha="center", va="center", size=9, color=INK)


def arrow(start: tuple[float, float], end: tuple[float, float], text: str = "", bend: float = 0.0) -> None:
    style = {"arrowstyle": "-|>", "color": INK, "lw": 1.3, "connectionstyle": f"arc3,rad={bend}"}
    axis.annotate("", xy=end, xytext=start, arrowprops=style)
    if text:
        axis.text((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 0.12, text, ha="center", size=9, color=INK)


box(0.1, 2.3, "policy", "writes a completion\nto each prompt", TRAINED)
box(4.3, 4.4, "reward", "one score\na completion", FROZEN)
box(4.3, 2.3, "reference", "log-probability\nof each token", FROZEN)
box(4.3, 0.2, "critic", "value\nof each token", CRITIC)
box(8.9, 3.4, "token rewards", "score on the last token\n- beta * KL on every token", INK, 3.0)
box(8.9, 1.1, "advantages", "better or worse than\nthe critic expected (GAE)", INK, 3.0)
arrow((2.75, 3.3), (4.2, 5.0))
arrow((2.75, 2.95), (4.2, 2.95), "completions")
arrow((2.75, 2.6), (4.2, 0.9))
arrow((6.9, 5.0), (8.8, 4.3))
arrow((6.9, 2.95), (8.8, 3.8), "KL")
arrow((6.9, 0.9), (8.8, 1.5))
arrow((10.4, 3.3), (10.4, 2.5))
arrow((8.8, 1.2), (6.9, 0.6), bend=-0.25)
axis.text(7.95, 0.05, "value loss\ntrains the critic", ha="center", size=9, color=CRITIC)
axis.plot([10.4, 10.4, 1.3], [1.0, -0.5, -0.5], color=TRAINED, lw=1.3)
axis.annotate("", xy=(1.3, 2.2), xytext=(1.3, -0.52), arrowprops={"arrowstyle": "-|>", "color": TRAINED, "lw": 1.3})
axis.text(5.5, -0.42, "clipped policy loss trains the policy", ha="center", size=9, color=TRAINED)
figure.savefig(Path(__file__).with_suffix(".png"), dpi=130)
