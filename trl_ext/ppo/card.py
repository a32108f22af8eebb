"""The model card of a published PPO-Max policy."""

from collections.abc import Sequence
from typing import Any

from trl_ext.report.cards import card_header, course_table, whole_card

COLUMNS = ("step", "reward", "kl", "beta", "perplexity", "completions/mean_length", "explained_variance")
TAGS = ("ppo", "rlhf", "lora", "trl", "trl_ext")


def model_card(
    base: str,
    others: Sequence[str],
    args: Any,
    history: Sequence[dict[str, Any]],
    model_name: str | None = None,
    dataset_name: str | None = None,
    tags: str | list[str] | None = None,
) -> str:
    """Markdown with a Hub header: base, method, the options that differ from their defaults, the course of the run.

    Args:
        base: Hub id or folder of the base.
        others: Names of the adapters saved beside the policy.
        args: Configuration of the run.
        history: Its logs.
        model_name, dataset_name, tags: As in `Trainer.create_model_card`.
    """
    body = [
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
    ]
    header = card_header(base, "text-generation", TAGS, tags, dataset_name)
    course = course_table(history, COLUMNS, "reward")
    return whole_card(args, header, model_name, body, course)
