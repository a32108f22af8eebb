"""The model card of a published reward model."""

from collections.abc import Mapping
from typing import Any

from trl_ext.report.cards import CardFacts, CardKind, loading, whole_card
from trl_ext.reward.metrics import result_rows

KIND = CardKind(
    pipeline_tag="text-classification",
    tags=("reward-model", "rlhf", "lora", "trl", "trl_ext"),
    matters=(
        "learning_rate",
        "max_steps",
        "num_train_epochs",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "max_length",
        "margin",
        "label_smoothing",
        "lm_coef",
        "center_rewards_coefficient",
    ),
    columns=("step", "loss", "accuracy", "margin", "mean_reward", "learning_rate"),
    required="accuracy",
)


def model_card(facts: CardFacts, scale: Any, results: Mapping[str, Any]) -> str:
    """Markdown with a Hub header: base, how to load, evaluation, the stored scale, options, the course of the run.

    Args:
        facts: Of the run.
        scale: `RewardScale` of the scores, or None where it was not measured.
        results: Of `reward.metrics.evaluate_pairs`; empty where nothing was evaluated.
    """
    evaluation = ["It has not been evaluated."]
    if results:
        rows = result_rows(dict(results))
        evaluation = ["| | |", "| --- | --- |", *(f"| {label} | {value} |" for label, value in rows)]
    body = [
        f"A reward model: a LoRA adapter and a scalar head on `{facts.base_name}`, trained with trl_ext.",
        "",
        *loading(facts, scorer=True),
        "",
        "## Scale of the scores",
        "",
        "Not measured: scores are raw."
        if scale is None
        else f"On {scale.count} reference responses the raw score has mean {scale.mean:.4g} and standard deviation "
        f"{scale.std:.4g}. `trl_ext.SharedBaseModel` takes them off; plain PEFT computes raw scores.",
    ]
    accuracy = results.get("accuracy")
    measured = [("accuracy", float(accuracy))] if isinstance(accuracy, int | float) else []
    return whole_card(facts, KIND, body, "preferences between responses, in the data", evaluation, measured)
