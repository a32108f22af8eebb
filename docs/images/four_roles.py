"""Draws docs/images/four_roles.png: `python docs/images/four_roles.py`."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

ROLES = [
    ("policy", "trained", "starts from the SFT adapter,\nsamples and is tuned", "#2b6cb0"),
    ("reference", "frozen", "copy of the starting policy\n(none if that is fresh)", "#718096"),
    ("reward", "frozen", "adapter + scalar head\nfrom RewardTrainer", "#718096"),
    ("critic", "trained", "starts from the reward\nadapter and head", "#c05621"),
]
figure, axis = plt.subplots(figsize=(9, 3.6), layout="constrained")
axis.set(xlim=(0, 12), ylim=(0, 5))
axis.axis("off")


def box(x: float, y: float, width: float, height: float, color: str, alpha: float = 1.0) -> None:
    patch = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.05,rounding_size=0.12", fc=color, ec="none")
    patch.set_alpha(alpha)
    axis.add_patch(patch)


box(0.2, 0.2, 11.6, 1.1, "#2d3748")
axis.text(6, 0.75, "one frozen base, loaded once (4-bit if asked)", color="white", ha="center", va="center", size=13)
for i, (name, state, text, color) in enumerate(ROLES):
    x = 0.2 + i * 2.95
    box(x, 1.6, 2.75, 2.3, color, 0.15)
    box(x, 3.25, 2.75, 0.65, color)
    axis.text(x + 1.375, 3.57, f"{name}  ({state})", ha="center", va="center", size=11, color="white", weight="bold")
    axis.text(x + 1.375, 2.75, "LoRA adapter", ha="center", va="center", size=10)
    axis.text(x + 1.375, 2.1, text, ha="center", va="center", size=9, color="#2d3748")
axis.text(6, 4.55, "with model.role(Role.CRITIC): ...   one switch, gradients untouched", ha="center", size=11,
          family="monospace", color="#2d3748")  # fmt: skip
figure.savefig(Path(__file__).with_suffix(".png"), dpi=130)
