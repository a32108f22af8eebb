"""The model card of a published PPO-Max policy."""

from typing import TYPE_CHECKING

from trl_ext.cards import card_header, course_table, whole_card

if TYPE_CHECKING:
    from trl_ext.ppo.trainer import PPOMaxTrainer

COLUMNS = ("step", "reward", "kl", "beta", "perplexity", "completions/mean_length", "explained_variance")
TAGS = ("ppo", "rlhf", "lora", "trl", "trl_ext")


def model_card(
    trainer: "PPOMaxTrainer",
    model_name: str | None = None,
    dataset_name: str | None = None,
    tags: str | list[str] | None = None,
) -> str:
    """Markdown with a Hub header: base, method, the options that differ from their defaults, the course of the run."""
    model = trainer.model
    base = model.get_base_model().name_or_path
    others = [name for name, role in model._adapters.items() if role.value != "policy"]
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
    course = course_table(trainer.state.log_history, COLUMNS, "reward")
    return whole_card(trainer.args, header, model_name, body, course)
