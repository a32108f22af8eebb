"""What model cards have in common: a Hub header, the options that differ from the default, the course of the run."""

from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

# Settings of a machine or a folder, not of the method
NOT_METHOD = {"output_dir", "logging_dir", "run_name", "report_to", "hub_token", "hub_model_id", "push_to_hub"}
NOT_METHOD |= {"vllm_server_url", "vllm_adapter_dir", "vllm_timeout", "vllm_wait"}
ROWS = 12


def write_card(folder: str | Path, card: str) -> None:
    """Make a card the README of a folder."""
    path = Path(folder) / "README.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(card, encoding="utf-8")


def whole_card(args: Any, header: list[str], title: str | None, body: list[str], course: list[str]) -> str:
    """What a method says of its model, between a header and what every card ends with; title: default, the folder."""
    lines = [*header, "", f"# {title or Path(str(args.output_dir)).name}", "", *body, ""]
    lines += ["## Options that differ from the default", "", *options_table(args), "", "## The run", "", *course, ""]
    return "\n".join(lines)


def card_header(
    base: str, pipeline_tag: str, tags: Iterable[str], more_tags: str | list[str] | None, dataset_name: str | None
) -> list[str]:
    """Lines of the YAML header; the base is left out where it is a folder, which the Hub refuses."""
    more_tags = [more_tags] if isinstance(more_tags, str) else more_tags or []
    lines = ["---", "library_name: peft", f"pipeline_tag: {pipeline_tag}"]
    if base and not Path(base).is_dir():
        lines.append(f"base_model: {base}")
    if dataset_name:
        lines += ["datasets:", f"- {dataset_name}"]
    return [*lines, "tags:", *(f"- {tag}" for tag in dict.fromkeys([*tags, *more_tags])), "---"]


def options_table(args: Any) -> list[str]:
    """Lines of a table of the fields whose value is not the default."""
    options = changed_options(args)
    return ["| option | value |", "| --- | --- |", *(f"| `{name}` | {value} |" for name, value in options.items())]


def changed_options(args: Any) -> dict[str, Any]:
    """Fields of a configuration whose value is not the default, None as "null", without those of the machine."""
    changed = {}
    for field in fields(args):
        value = getattr(args, field.name)
        plain = value is None or isinstance(value, bool | int | float | str)
        if field.init and plain and field.name not in NOT_METHOD and value != field.default:
            changed[field.name] = "null" if value is None else value
    return changed


def course_table(history: Sequence[dict[str, Any]], columns: Sequence[str], required: str) -> list[str]:
    """Lines of a table of at most ROWS log entries with `required`, evenly spaced, the last one included."""
    entries = [entry for entry in history if required in entry]
    if not entries:
        return ["No step was logged."]
    last = len(entries) - 1
    picked = sorted({round(i * last / max(ROWS - 1, 1)) for i in range(ROWS)}) if last >= ROWS else range(last + 1)
    lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    for i in picked:
        lines.append("| " + " | ".join(_number(entries[i].get(name)) for name in columns) + " |")
    return lines


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
