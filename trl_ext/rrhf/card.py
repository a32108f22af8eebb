"""The model card of a published RRHF policy."""

from typing import TYPE_CHECKING

from trl_ext.cards import card_header, course_table, whole_card

if TYPE_CHECKING:
    from trl_ext.rrhf.trainer import RRHFTrainer

OFFLINE_COLUMNS = ("step", "loss", "rank_loss", "sft_loss", "ranking_accuracy", "perplexity_best")
ONLINE_COLUMNS = ("step", "loss", "reward", "reward_best", "kl", "ranking_accuracy", "perplexity_best")
TAGS = ("rrhf", "rlhf", "lora", "trl", "trl_ext")


def model_card(
    trainer: "RRHFTrainer",
    model_name: str | None = None,
    dataset_name: str | None = None,
    tags: str | list[str] | None = None,
) -> str:
    """Markdown with a Hub header: base, method, the options that differ from their defaults, the course of the run."""
    model, args = trainer.model, trainer.args
    base = model.get_base_model().name_or_path
    others = [name for name, role in model._adapters.items() if role.value != "policy"]
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
    course = course_table(trainer.state.log_history, columns, key)
    return whole_card(args, header, model_name, body, course)
