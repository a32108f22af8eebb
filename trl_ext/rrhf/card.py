"""The model card of a published RRHF policy."""

from collections.abc import Sequence
from typing import Any

from trl_ext.report.cards import card_header, course_table, whole_card

OFFLINE_COLUMNS = ("step", "loss", "rank_loss", "sft_loss", "ranking_accuracy", "perplexity_best")
ONLINE_COLUMNS = ("step", "loss", "reward", "reward_best", "kl", "ranking_accuracy", "perplexity_best")
TAGS = ("rrhf", "rlhf", "lora", "trl", "trl_ext")


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
    columns, key = (ONLINE_COLUMNS, "reward") if args.online else (OFFLINE_COLUMNS, "rank_loss")
    sampled = "sampled from the current policy and " if args.online else ""
    body = [
        f"A LoRA adapter on `{base}`, trained with trl_ext by RRHF "
        f"([arXiv 2304.05302](https://huggingface.co/papers/2304.05302)) on responses {sampled}ranked by a reward.",
        "",
        "```python",
        "from peft import AutoPeftModelForCausalLM",
        "",
        'policy = AutoPeftModelForCausalLM.from_pretrained("this repository")',
        "```",
        *(["", f"Beside the policy: {', '.join(f'`{name}/`' for name in others)}."] if others else []),
    ]
    header = card_header(base, "text-generation", TAGS, tags, dataset_name)
    course = course_table(history, columns, key)
    return whole_card(args, header, model_name, body, course)
