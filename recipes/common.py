"""What the recipes share: reward functions by name, a progress bar, tables and pictures."""

import copy
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import ProgressCallback


def load_reward_function(spec: str) -> str | Callable[..., Any]:
    """`path/to/file.py:function` as that function; anything else as the id of a sequence-classification model.

    Raises:
        ValueError: No such file or function.
    """
    file, _, name = spec.rpartition(":")
    if not file.endswith(".py"):
        return spec
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"--reward_funcs {spec}: there is no file {path.resolve()}.")
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[path.stem] = module
    module_spec.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        raise ValueError(f"--reward_funcs {spec}: {path} has no function {name!r}.")
    return getattr(module, name)


def quantization_of(model_args: Any, training: Any = None) -> Any:
    """`BitsAndBytesConfig` of the flags `--load_in_4bit`, `--use_bnb_nested_quant`, ...; None without them.

    A 4-bit base computes in `--dtype`; without one, or with "auto", in what the run does (`bf16`, `fp16` or float32),
    or, where no `training` is given, in what the card does best.
    """
    import torch
    from trl import get_quantization_config

    from trl_ext.ops.precision import best_dtype

    if model_args.dtype in (None, "auto"):
        dtype = best_dtype()
        if training is not None:
            dtype = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32
        model_args = copy.copy(model_args)
        model_args.dtype = dtype
    return get_quantization_config(model_args)


class ProgressWithMetrics(ProgressCallback):
    """Transformers' progress bar, with the metrics that matter beside it instead of every metric below it."""

    def __init__(self, shown: dict[str, str]):
        super().__init__()
        self.shown = shown

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs:
            values = {label: f"{logs[key]:.3g}" for key, label in self.shown.items() if logs.get(key) is not None}
            if values:
                self.training_bar.set_postfix(values)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on the console."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def plot_run(history: list[dict[str, Any]], panels: dict[str, dict[str, str]], path: Path) -> None:
    """Draw logged metrics against the optimizer step: `panels` is title -> metric -> label."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3), layout="constrained")
    for axis, (title, metrics) in zip(axes, panels.items(), strict=True):
        for metric, label in metrics.items():
            points = [(entry["step"], entry[metric]) for entry in history if entry.get(metric) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), label=label)
        axis.set(title=title, xlabel="optimizer step")
        axis.grid(alpha=0.3)
        if len(metrics) > 1:
            axis.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
