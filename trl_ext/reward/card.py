"""The model card of a published reward model."""

from collections.abc import Mapping, Sequence
from typing import Any

from trl_ext.report.cards import card_header, course_table, whole_card
from trl_ext.reward.metrics import result_rows

COLUMNS = ("step", "loss", "accuracy", "margin", "mean_reward", "learning_rate")
TAGS = ("reward-model", "rlhf", "lora", "trl", "trl_ext")


def model_card(
    base: str,
    scale: Any,
    results: Mapping[str, Any],
    args: Any,
    history: Sequence[dict[str, Any]],
    model_name: str | None = None,
    dataset_name: str | None = None,
    tags: str | list[str] | None = None,
) -> str:
    """Markdown with a Hub header: base, how to load, evaluation, the stored scale, options, the course of the run.

    Args:
        base: Hub id or folder of the base.
        scale: `RewardScale` of the scores, or None where it was not measured.
        results: Of `reward.metrics.evaluate_pairs`; empty where nothing was evaluated.
        args: Configuration of the run.
        history: Its logs.
        model_name, dataset_name, tags: As in `Trainer.create_model_card`.
    """
    evaluation = ["It has not been evaluated."]
    if results:
        rows = result_rows(dict(results))
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
    course = course_table(history, COLUMNS, "accuracy")
    return whole_card(args, header, model_name, body, course)
