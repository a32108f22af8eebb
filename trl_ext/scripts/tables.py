"""What recipes show: tables on the console, in which texts are texts, and pictures of a run's logs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from trl_ext.text import message_text


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = True) -> None:
    """A table on the console, its columns but the first `numbers`. Brackets and colons in its texts are no markup."""
    table = Table(title=Text(title, style="bold"), title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(Text(column), justify="right" if numbers and i else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)


def print_pairs(prompts: Sequence[Any], first: Sequence[str], second: Sequence[str], what: str) -> None:
    """What was written before and after, side by side, a table for each prompt; `what` names a text."""
    for prompt, old, new in zip(prompts, first, second, strict=True):
        print_table(f"prompt: {last_text(prompt)}", ("", what), [("before", old), ("after", new)], numbers=False)


def last_text(prompt: Any) -> str:
    """A prompt, or the last message of one, as a text to show."""
    return (prompt if isinstance(prompt, str) else message_text(prompt[-1:])).strip()


def before_and_after(
    labels: Sequence[tuple[str, str, str]], before: dict[str, float], after: dict[str, float]
) -> list[tuple[str, ...]]:
    """Rows of a table: label, value before, value after.

    Args:
        labels: (label, key of the value, key of its standard deviation or "").
        before, after: Metrics; "-" stands for one that is missing.
    """
    rows = []
    for label, key, std in labels:
        cells = []
        for metrics in (before, after):
            cell = f"{metrics[key]:.3f}" if key in metrics else "-"
            cells.append(f"{cell} ± {metrics[std]:.3f}" if std in metrics else cell)
        rows.append((label, *cells))
    return rows


def plot_run(history: list[dict[str, Any]], panels: dict[str, dict[str, str]], path: Path, marker: str = "") -> None:
    """Draw logged metrics against the optimizer step: `panels` is title -> metric -> label, `marker` of its points."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3), layout="constrained")
    for axis, (title, metrics) in zip(axes, panels.items(), strict=True):
        for metric, label in metrics.items():
            points = [(entry["step"], entry[metric]) for entry in history if entry.get(metric) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), label=label, marker=marker)
        axis.set(title=title, xlabel="optimizer step")
        axis.grid(alpha=0.3)
        if len(metrics) > 1 and axis.lines:
            axis.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
