"""Configuration of a reward model: TRL's, plus a field for every loss term and for what is stored with the adapter."""

from dataclasses import dataclass, field
from typing import Annotated, Any

from trl import RewardConfig

from trl_ext.fields import at_least, check_fields, check_schedule, from_to_below, one_of, whole
from trl_ext.runs import BF16_HELP, choose_mixed_precision

SMOOTHED = ("all", "suspected")


@dataclass
class RewardModelConfig(RewardConfig):
    r"""
    Configuration of [`RewardModelTrainer`]. Fields of `RewardConfig` keep their names and meaning, among them
    `center_rewards_coefficient` and `max_length`. Without any of ours set, the loss is the plain pairwise one.
    """

    _VALID_DICT_FIELDS = [*RewardConfig._VALID_DICT_FIELDS, "chat_template_kwargs"]

    bf16: bool | None = field(default=None, metadata={"help": BF16_HELP})  # type: ignore[assignment]
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Stays off: the collator needs the columns that tokenizing has made."}
    )
    write_report: bool = field(default=True, metadata={"help": "Write report.html and learning_curve.png at the end."})

    # Loss
    margin: Annotated[float, at_least(0)] = field(
        default=0.0, metadata={"help": "By how much the preferred score should lead, for all pairs."}
    )
    margin_column: str | None = field(
        default=None,
        metadata={
            "help": "Dataset column with a margin for each pair, added to `margin`; `strength_mean` is the measured "
            "preference strength. Default: `margin`, where the dataset has such a column."
        },
    )
    soft_label_column: str | None = field(
        default=None,
        metadata={
            "help": "Dataset column with the probability that the chosen response is the better one, as several "
            "annotators give it. Default: `soft_label`, where the dataset has such a column."
        },
    )
    label_smoothing: Annotated[
        float, from_to_below(0, 0.5, "at 0.5 the labels say nothing, above it they mean the opposite")
    ] = field(default=0.0, metadata={"help": "Probability that a label is wrong, from 0 to below 0.5."})
    label_smoothing_on: Annotated[str, one_of(SMOOTHED)] = field(
        default="all",
        metadata={
            "help": "Smooth 'all' labels, or those of pairs whose column `suspected` is true.",
            "choices": list(SMOOTHED),
        },
    )
    lm_coef: Annotated[float, at_least(0)] = field(
        default=0.0,
        metadata={
            "help": "Weight of the imitation term: the LM loss of the preferred response under the frozen LM head."
        },
    )

    # Data
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Options of the chat template, where prompts are conversations."}
    )

    # Computation
    share_prompts: bool = field(
        default=True,
        metadata={"help": "Compute what the responses to a prompt have in common once, where the model can take it."},
    )

    # What is stored with the adapter
    normalize_rewards: bool = field(
        default=True,
        metadata={
            "help": "After training, store mean and standard deviation of the score on reference responses beside the "
            "adapter. A reward role takes them off; plain PEFT computes raw scores."
        },
    )
    normalization_samples: Annotated[int, whole(2, "normalize_rewards=False switches the normalisation off")] = field(
        default=512, metadata={"help": "How many reference responses the mean and the standard deviation are taken of."}
    )

    def __post_init__(self) -> None:
        check_fields(self)
        choose_mixed_precision(self)
        super().__post_init__()
        check_schedule(self)
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns=True would remove what the collator needs: leave it False.")
        if self.pad_to_multiple_of is not None:
            raise ValueError(
                f"pad_to_multiple_of={self.pad_to_multiple_of} has no effect on packed rows: leave it None."
            )
