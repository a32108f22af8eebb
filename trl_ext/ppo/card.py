"""The model card of a published PPO-Max policy."""

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from trl_ext.ppo.config import PPOMaxConfig

if TYPE_CHECKING:
    from trl_ext.ppo.trainer import PPOMaxTrainer

# Settings of a machine or a folder, not of the method
NOT_METHOD = {"output_dir", "logging_dir", "run_name", "report_to", "hub_token", "hub_model_id", "push_to_hub"}
COLUMNS = ("step", "reward", "kl", "beta", "perplexity", "completions/mean_length", "explained_variance")
ROWS = 12


def model_card(trainer: "PPOMaxTrainer") -> str:
    """Markdown with a Hub header: base, method, the options that differ from their defaults, the course of the run."""
    model = trainer.model
    base = model.get_base_model().name_or_path
    others = [role.value for role in model._roles if role.value != "policy"]
    header = ["---", f"base_model: {base}", "library_name: peft", "pipeline_tag: text-generation", "tags:"]
    header += [f"- {tag}" for tag in ("ppo", "rlhf", "lora", "trl", "trl_ext")] + ["---"]
    body = [
        f"# {str(trainer.args.output_dir).rstrip('/').split('/')[-1]}",
        "",
        f"A LoRA adapter on `{base}`, trained by PPO-Max "
        "([arXiv 2307.04964](https://huggingface.co/papers/2307.04964)) with trl_ext.",
        "",
        "```python",
        "from peft import AutoPeftModelForCausalLM",
        "",
        'policy = AutoPeftModelForCausalLM.from_pretrained("this repository")',
        "```",
        "",
        f"Beside the policy: {', '.join(f'`{name}/`' for name in others)}.",
        "",
        "## Options that differ from the default",
        "",
        "| option | value |",
        "| --- | --- |",
        *(f"| `{name}` | {value} |" for name, value in changed_options(trainer.args).items()),
        "",
        "## The run",
        "",
        *_course(trainer.state.log_history),
    ]
    return "\n".join([*header, "", *body, ""])


def changed_options(args: PPOMaxConfig) -> dict[str, Any]:
    """Fields whose value is not the default of `PPOMaxConfig`, without those of the machine."""
    changed = {}
    for field in fields(args):
        value = getattr(args, field.name)
        if (
            field.init
            and field.name not in NOT_METHOD
            and value != field.default
            and isinstance(value, bool | int | float | str)
        ):
            changed[field.name] = value
    return changed


def _course(history: list[dict[str, Any]]) -> list[str]:
    """A table of at most ROWS log entries, evenly spaced, the last one included."""
    entries = [entry for entry in history if "reward" in entry]
    if not entries:
        return ["No step was logged."]
    last = len(entries) - 1
    picked = sorted({round(i * last / max(ROWS - 1, 1)) for i in range(ROWS)}) if last >= ROWS else range(last + 1)
    lines = ["| " + " | ".join(COLUMNS) + " |", "| " + " | ".join("---" for _ in COLUMNS) + " |"]
    for i in picked:
        lines.append("| " + " | ".join(_number(entries[i].get(name)) for name in COLUMNS) + " |")
    return lines


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
