"""The model card of a published reward model."""

from typing import TYPE_CHECKING

from trl_ext.cards import card_header, course_table, whole_card
from trl_ext.reward.metrics import result_rows

if TYPE_CHECKING:
    from trl_ext.reward.trainer import RewardModelTrainer

COLUMNS = ("step", "loss", "accuracy", "margin", "mean_reward", "learning_rate")
TAGS = ("reward-model", "rlhf", "lora", "trl", "trl_ext")


def model_card(
    trainer: "RewardModelTrainer",
    model_name: str | None = None,
    dataset_name: str | None = None,
    tags: str | list[str] | None = None,
) -> str:
    """Markdown with a Hub header: base, how to load, evaluation, the stored scale, options, the course of the run."""
    base = str(trainer.model.get_base_model().name_or_path)
    scale = trainer.model.scale
    evaluation = ["It has not been evaluated."]
    if trainer.evaluation:
        rows = result_rows(trainer.evaluation)
        evaluation = ["| | |", "| --- | --- |", *(f"| {label} | {value} |" for label, value in rows)]
    body = [
        f"A reward model: a LoRA adapter and a scalar head on `{base}`, trained with trl_ext.",
        "",
        "```python",
        "from peft import AutoPeftModelForSequenceClassification",
        "",
        'model = AutoPeftModelForSequenceClassification.from_pretrained("this repository", num_labels=1)',
        "```",
        "",
        "## Evaluation",
        "",
        *evaluation,
        "",
        "## Scale of the scores",
        "",
        "Not measured: scores are raw."
        if scale is None
        else f"On {scale.count} reference responses the raw score has mean {scale.mean:.4g} and standard deviation "
        f"{scale.std:.4g}. `trl_ext.SharedBaseModel` takes them off; plain PEFT computes raw scores.",
    ]
    header = card_header(base, "text-classification", TAGS, tags, dataset_name)
    course = course_table(trainer.state.log_history, COLUMNS, "accuracy")
    return whole_card(trainer.args, header, model_name, body, course)
