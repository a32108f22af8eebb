"""Configuration of RRHF: the `Trainer`'s, plus its loss, its data, and the online variants."""

from dataclasses import dataclass, field
from typing import Annotated, Any

from transformers import TrainingArguments

from trl_ext.fields import above, above_to, at_least, check_fields, check_schedule, each, number, whole
from trl_ext.generation.vllm_options import VLLMOptions, check_vllm_options
from trl_ext.runs import BF16_HELP, choose_mixed_precision


@dataclass
class RRHFConfig(VLLMOptions, TrainingArguments):
    r"""
    Configuration of [`RRHFTrainer`]. The defaults are the paper's loss (Yuan et al. 2023, arXiv 2304.05302), offline.

    A batch is `per_device_train_batch_size` prompts, each with all its responses.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs", "chat_template_kwargs"]

    # Fields of the parent with other defaults, as in TRL
    learning_rate: float = field(
        default=5e-4,
        metadata={"help": "Learning rate of the policy's adapter. LoRA takes about ten times that of full weights."},
    )
    logging_steps: float = field(
        default=10, metadata={"help": "Log every so many optimizer steps; below 1, this share of all steps."}
    )
    gradient_checkpointing: bool = field(
        default=True, metadata={"help": "Recompute activations in backward: less memory, some time."}
    )
    bf16: bool | None = field(default=None, metadata={"help": BF16_HELP})  # type: ignore[assignment]
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay False: reward functions read the dataset's other columns."}
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Options of the base's `from_pretrained` (dtype, attn_implementation, revision, ...)."},
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Options of the chat template, such as {'enable_thinking': false}."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Let the model bring code of its own."})
    disable_dropout: bool = field(
        default=True, metadata={"help": "Switch dropout off. With it the first KL to the reference is not 0."}
    )
    write_report: bool = field(default=True, metadata={"help": "Write report.html and learning_curve.png at the end."})

    # Loss
    rank_coef: Annotated[float, at_least(0)] = field(default=1.0, metadata={"help": "Weight of the ranking loss."})
    sft_coef: Annotated[float, at_least(0)] = field(
        default=1.0, metadata={"help": "Weight of the negative log-likelihood of each prompt's best response."}
    )
    length_penalty: Annotated[float, at_least(0)] = field(
        default=1.0,
        metadata={"help": "Responses are ranked by the sum of their log-probabilities / length ** length_penalty."},
    )
    margin: Annotated[float, at_least(0)] = field(
        default=0.0, metadata={"help": "By how much a better response must lead, in nats, to cost nothing."}
    )
    sft_token_mean: bool = field(
        default=False, metadata={"help": "Mean over the best response's tokens; the paper's is their sum."}
    )
    beta: Annotated[float, at_least(0)] = field(
        default=0.0,
        metadata={"help": "Weight of the KL to the reference (k3 estimate per response token). 0 needs no reference."},
    )

    # Data
    max_length: Annotated[int | None, whole(2)] = field(
        default=None,
        metadata={"help": "Tokens of prompt and response; longer responses are cut. Default: 1024, or the positions."},
    )
    share_prompts: bool = field(
        default=True, metadata={"help": "Compute a prompt once for all its responses, where the model allows it."}
    )
    dataset_num_proc: Annotated[int | None, whole(1)] = field(
        default=None, metadata={"help": "Processes that tokenise the datasets."}
    )

    # Online variants
    online_every_steps: Annotated[int | None, whole(1)] = field(
        default=None,
        metadata={
            "help": "Sample the responses of the coming prompts from the current policy every so many optimizer steps "
            "(the paper's OP-k)."
        },
    )
    online_every_pass: bool = field(
        default=False,
        metadata={
            "help": "Sample all responses from the current policy before every pass over the prompts (the paper's "
            "IP-n, n = num_train_epochs)."
        },
    )
    num_online_responses: Annotated[int, whole(2)] = field(
        default=4, metadata={"help": "Responses sampled per prompt, at least 2."}
    )
    online_keep_best: bool = field(
        default=False,
        metadata={"help": "Rank the dataset's best response of each prompt along with the sampled ones."},
    )
    temperature: Annotated[float, above(0)] = field(default=1.0, metadata={"help": "Temperature of online sampling."})
    top_p: Annotated[float, above_to(0, 1, "1 switches it off")] = field(
        default=1.0, metadata={"help": "Nucleus of online sampling; 1 switches it off."}
    )
    max_completion_length: Annotated[int, whole(1)] = field(
        default=256, metadata={"help": "Longest response sampled online, in tokens."}
    )
    generation_batch_size: Annotated[int, whole(1)] = field(
        default=64, metadata={"help": "Responses sampled and scored at once."}
    )
    reward_weights: Annotated[list[float] | None, each(number())] = field(
        default=None, metadata={"help": "Weight of each of `reward_funcs` in online scores. Default: 1 each."}
    )
    reward_role_weight: Annotated[float, number()] = field(
        default=1.0, metadata={"help": "Weight of the reward role's score, if the model has one, in online scores."}
    )

    @property
    def online(self) -> bool:
        """Whether responses are sampled during training."""
        return self.online_every_steps is not None or self.online_every_pass

    def __post_init__(self) -> None:
        check_fields(self)
        choose_mixed_precision(self)
        super().__post_init__()
        check_schedule(self)
        if self.rank_coef == 0 and self.sft_coef == 0:
            raise ValueError("rank_coef=0 and sft_coef=0 leave nothing to learn: set one of them above 0.")
        self._check_choices()

    def _check_choices(self) -> None:
        check_vllm_options(self)
        if self.online_every_steps is not None and self.online_every_pass:
            raise ValueError(
                f"online_every_steps={self.online_every_steps} and online_every_pass=True are two variants: set one."
            )
        refused: dict[str, tuple[Any, str]] = {
            "remove_unused_columns": (self.remove_unused_columns, "it would drop the responses; set it to False"),
            "use_liger_kernel": (self.use_liger_kernel, "it replaces the forward passes of the roles; set it to False"),
            "label_smoothing_factor": (self.label_smoothing_factor, "the best response is imitated as it is; set it 0"),
            "online_keep_best": (
                self.online_keep_best and not self.online,
                "it belongs to the online variants; set online_every_steps or online_every_pass",
            ),
            "vllm_server_url": (
                self.vllm_server_url and not self.online,
                "it samples for the online variants; set online_every_steps or online_every_pass",
            ),
        }
        for name, (value, remedy) in refused.items():
            if value:
                raise ValueError(f"{name}={getattr(self, name)!r} has no place in this run: {remedy}.")
        checkpointing: Any = self.gradient_checkpointing_kwargs or {}
        if checkpointing.get("use_reentrant"):
            raise ValueError(
                "gradient_checkpointing_kwargs={'use_reentrant': True} would recompute under the wrong role: set it "
                "to False or leave it out."
            )
