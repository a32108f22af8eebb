"""Configuration of PPO-Max: RLOO's, plus one field for every trick.

Deviations from Zheng et al. 2023 (arXiv 2307.04964): the reward clip is 0.8, the value in the second paper's released
runs; the horizon of the adaptive KL controller is given in rollout batches by default, since its 10,000 episodes belong
to a batch of 512.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from transformers.training_args import OptimizerNames
from trl import RLOOConfig

from trl_ext.ops.ensemble import ENSEMBLE_MODES
from trl_ext.ops.packing import SCORED_PER_TRAINED
from trl_ext.runs import BF16_HELP, choose_mixed_precision

REWARD_NORMALIZATIONS = ("norm", "scale", "none")
KL_CONTROLS = ("fixed", "adaptive", "penalty")
KL_ESTIMATORS = ("k1", "k2", "k3")
HORIZON_IN_BATCHES = 20
# Of `generation_kwargs`, what transformers' continuous batching applies
CONTINUOUS_BATCHING_KWARGS = {"do_sample", "max_new_tokens", "min_p", "temperature", "top_k", "top_p"}
DEFAULT_OPTIM: Any = RLOOConfig.__dataclass_fields__["optim"].default


@dataclass
class PPOMaxConfig(RLOOConfig):
    r"""
    Configuration of [`PPOMaxTrainer`]. The defaults are PPO-Max; every trick is a field that works alone.

    Fields of `RLOOConfig` keep their names and meaning: `beta` is the KL coefficient (its first value, when
    controlled), `epsilon` and `epsilon_high` the policy clip, `num_iterations` the passes over a rollout batch,
    `steps_per_generation` the micro-batches in one, `temperature`, `max_completion_length`, `reward_weights`.
    """

    # Fields of the parents with other defaults
    bf16: bool | None = field(default=None, metadata={"help": BF16_HELP})  # type: ignore[assignment]
    learning_rate: float = field(default=1e-5, metadata={"help": "Learning rate of the policy's adapter."})
    optim: OptimizerNames | str | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": f"Optimizer. Default: 'paged_adamw_8bit' for a quantised base on a CUDA card, else "
            f"'{DEFAULT_OPTIM}'."
        },
    )
    num_generations: int | None = field(
        default=1, metadata={"help": "Completions sampled per prompt. PPO's critic is the baseline, so 1 is enough."}
    )
    num_iterations: int = field(default=2, metadata={"help": "Passes over each rollout batch (PPO epochs)."})
    disable_dropout: bool = field(
        default=True,
        metadata={"help": "Switch dropout off. With it the probability ratio is noisy and the first KL is not 0."},
    )
    normalize_advantages: bool = field(
        default=True, metadata={"help": "Whiten the advantages over the response tokens of the rollout batch."}
    )

    # Generation
    per_device_generate_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Completions that one call of `generate` samples at a time: the KV cache is as large as this and "
            "not as the rollout batch. Default: the whole rollout batch at once."
        },
    )

    # Scoring
    per_device_score_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Sequences of full length that a pass of the rollout scores, shorter ones more. Default: 2 times "
            "`per_device_train_batch_size`, because without gradients a pass keeps less."
        },
    )

    # Reward
    reward_role_weight: float = field(
        default=1.0, metadata={"help": "Weight of the reward role's score; `reward_weights` weighs the functions."}
    )
    reward_ensemble: str = field(
        default="mean",
        metadata={
            "help": "How the scores of several reward adapters become one: 'mean', 'min', or 'variance', the mean less "
            "`reward_ensemble_coef` times their variance.",
            "choices": list(ENSEMBLE_MODES),
        },
    )
    reward_ensemble_coef: float = field(
        default=0.5, metadata={"help": "Weight of the variance in `reward_ensemble='variance'`."}
    )
    reward_normalization: str = field(
        default="norm",
        metadata={
            "help": "What to do with sequence scores: 'norm' subtracts the running mean and divides by the running "
            "standard deviation, 'scale' only divides, 'none' leaves them.",
            "choices": list(REWARD_NORMALIZATIONS),
        },
    )
    reward_clip: float | None = field(
        default=0.8, metadata={"help": "Clip the normalised score to +- this; null in a yaml file switches it off."}
    )
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Taken off the shaped score of a completion that the length limit cut."}
    )

    # KL
    kl_estimator: str = field(
        default="k1",
        metadata={
            "help": "Per-token KL estimate in the reward: k1, k2 or k3 of Schulman's note.",
            "choices": list(KL_ESTIMATORS),
        },
    )
    kl_control: str = field(
        default="adaptive",
        metadata={
            "help": "How beta moves: 'fixed'; 'adaptive', proportional (Ziegler et al. 2019); 'penalty', doubling and "
            "halving (Schulman et al. 2017, section 4).",
            "choices": list(KL_CONTROLS),
        },
    )
    kl_target: float = field(
        default=6.0, metadata={"help": "KL per sequence, in nats, that 'adaptive' and 'penalty' control aim at."}
    )
    kl_horizon: float | None = field(
        default=None,
        metadata={
            "help": "Horizon of 'adaptive' control, in samples; smaller reacts faster. Default: 20 rollout batches."
        },
    )

    # Advantages and losses
    gamma: float = field(default=1.0, metadata={"help": "Discount of GAE."})
    gae_lambda: float = field(default=0.95, metadata={"help": "Lambda of GAE."})
    value_lambda: float | None = field(
        default=None,
        metadata={"help": "Lambda of the returns that the critic learns; 1 is Monte Carlo. Default: `gae_lambda`."},
    )
    advantage_clip: float | None = field(
        default=None, metadata={"help": "Clip the (whitened) advantages to +- this. Off by default."}
    )
    value_clip: float | None = field(
        default=0.2, metadata={"help": "Clip of the value loss around the rollout's values; null switches it off."}
    )
    vf_coef: float = field(default=1.0, metadata={"help": "Weight of the value loss."})
    entropy_coef: float = field(default=0.0, metadata={"help": "Weight of the entropy bonus. Off by default."})
    ptx_coef: float = field(
        default=0.0, metadata={"help": "Weight of the language-model loss on `ptx_dataset` (PPO-ptx). Off by default."}
    )
    ptx_max_length: int = field(default=512, metadata={"help": "Tokens at which PPO-ptx texts are cut."})

    # Critic
    critic_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the critic. Default: 3 times `learning_rate`."}
    )
    critic_warmup_steps: int = field(
        default=20, metadata={"help": "Optimizer steps at the start that train the critic only; 0 switches it off."}
    )
    critic_warmup_explained_variance: float | None = field(
        default=None,
        metadata={
            "help": "End the warm-up early, once the critic explains this share of the returns' variance. Then "
            "`critic_warmup_steps` is the longest it may take."
        },
    )

    def __post_init__(self) -> None:
        choose_mixed_precision(self)
        self._optim_by_base = self.optim is None
        self.optim = self.optim or DEFAULT_OPTIM
        if not isinstance(self.num_generations, int) or self.num_generations < 1:
            raise ValueError(f"num_generations={self.num_generations!r} must be a whole number of at least 1.")
        try:
            super().__post_init__()
        except ValueError as error:
            # RLOO's last check wants two generations for its leave-one-out baseline. PPO has a critic.
            if self.num_generations != 1 or "at least 2 generations" not in str(error):
                raise
        self._check_numbers()
        self._check_choices()
        self._check_generation()
        if self.critic_learning_rate is None:
            self.critic_learning_rate = 3 * self.learning_rate
        if self.kl_horizon is None:
            self.kl_horizon = float(HORIZON_IN_BATCHES * (self.generation_batch_size or 1))

    @property
    def scored_at_a_time(self) -> int:
        """Sequences of full length that a pass of the rollout scores."""
        return self.per_device_score_batch_size or SCORED_PER_TRAINED * self.per_device_train_batch_size

    def choose_optim(self, quantised: bool) -> None:
        """Where no `optim` was given: paged 8-bit AdamW for a quantised base on a CUDA card. The trainer calls it."""
        if self._optim_by_base and quantised and self.device.type == "cuda":
            self.optim = OptimizerNames.PAGED_ADAMW_8BIT

    def _check_choices(self) -> None:
        for name, choices in (
            ("reward_ensemble", ENSEMBLE_MODES),
            ("reward_normalization", REWARD_NORMALIZATIONS),
            ("kl_control", KL_CONTROLS),
            ("kl_estimator", KL_ESTIMATORS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: use one of {', '.join(choices)}.")
        refused: dict[str, tuple[Any, str]] = {
            "reward_clip_range": (self.reward_clip_range, "use reward_clip, which clips after normalisation"),
            "mask_truncated_completions": (
                self.mask_truncated_completions,
                "use missing_eos_penalty; a masked completion would leave its critic untrained",
            ),
            "sync_ref_model": (self.sync_ref_model, "the reference is the frozen starting policy"),
            "use_vllm": (
                self.use_vllm,
                "TRL gives vLLM the policy by merging its adapter into the base that all roles share, and unmerging "
                "rounds, or quantises a 4-bit base anew: the reference would move at each sync. It would also send "
                "the critic's head, and 4-bit weights as they are packed, which no vLLM model has. Use transformers' "
                "generate (the default) or use_transformers_continuous_batching=True",
            ),
            "router_aux_loss_coef": (self.router_aux_loss_coef, "the auxiliary loss of experts is not supported"),
            "use_liger_kernel": (self.use_liger_kernel, "it replaces the forward passes of the roles"),
            "restore_callback_states_from_checkpoint": (
                self.restore_callback_states_from_checkpoint,
                "the state of PPO-Max is restored without it",
            ),
        }
        for name, (value, remedy) in refused.items():
            if value:
                raise ValueError(f"{name}={value!r} has no place in PPO-Max: {remedy}.")
        checkpointing: Any = (
            getattr(self, "activation_checkpointing_kwargs", None) or self.gradient_checkpointing_kwargs
        )
        if (checkpointing or {}).get("use_reentrant"):
            raise ValueError(
                "gradient_checkpointing_kwargs={'use_reentrant': True} would recompute under the wrong role: set it "
                "to False or leave it out."
            )
        assert self.steps_per_generation is not None  # RLOOConfig has set it
        if self.steps_per_generation % self.gradient_accumulation_steps:
            raise ValueError(
                f"steps_per_generation={self.steps_per_generation} must be a multiple of "
                f"gradient_accumulation_steps={self.gradient_accumulation_steps}, so that a pass over the rollout "
                "batch is a whole number of optimizer steps."
            )

    def _check_generation(self) -> None:
        """What continuous batching would leave out, with no more than a line in its log."""
        if not self.use_transformers_continuous_batching:
            return
        other = sorted(set(self.generation_kwargs or {}) - CONTINUOUS_BATCHING_KWARGS)
        options: Any = self.transformers_continuous_batching_config or {}
        left_out: dict[str, tuple[Any, str]] = {
            "repetition_penalty": (None if self.repetition_penalty == 1 else self.repetition_penalty, "set it to 1"),
            "cache_implementation": (self.cache_implementation, "leave it out; the engine has a cache of its own"),
            "generation_kwargs": (other, f"give no others than {', '.join(sorted(CONTINUOUS_BATCHING_KWARGS))}"),
            "per_device_generate_batch_size": (
                self.per_device_generate_batch_size,
                "use transformers_continuous_batching_config={'max_requests_per_batch': ...}",
            ),
            "transformers_continuous_batching_config['seed']": (
                options.get("seed"),
                "leave it out: every rollout batch would be sampled with the same random numbers. `seed` governs them",
            ),
        }
        for name, (value, remedy) in left_out.items():
            if value not in (None, []):
                raise ValueError(f"{name}={value!r} does not go with use_transformers_continuous_batching: {remedy}.")

    def _check_numbers(self) -> None:
        positive = (
            "kl_target",
            "gradient_accumulation_steps",
            "temperature",
            "ptx_max_length",
            "max_completion_length",
        )
        positive_or_none = ("reward_clip", "advantage_clip", "value_clip", "kl_horizon")
        not_negative = (
            "beta",
            "vf_coef",
            "entropy_coef",
            "ptx_coef",
            "critic_warmup_steps",
            "epsilon",
            "reward_ensemble_coef",
        )
        not_negative_or_none = ("missing_eos_penalty", "critic_learning_rate", "epsilon_high")
        remedy = {"reward_clip": "null (None) switches it off", "value_clip": "null (None) switches it off"}
        for name in (*positive, *positive_or_none):
            value = getattr(self, name)
            if value is None and name in positive_or_none:
                continue
            if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
                raise ValueError(f"{name}={value!r} must be a number above 0; {remedy.get(name, 'give one')}.")
        for name in (*not_negative, *not_negative_or_none):
            value = getattr(self, name)
            if value is None and name in not_negative_or_none:
                continue
            if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
                raise ValueError(f"{name}={value!r} must be a number of at least 0.")
        for name in ("per_device_generate_batch_size", "per_device_score_batch_size"):
            rows = getattr(self, name)
            if rows is not None and (not isinstance(rows, int) or rows < 1):
                raise ValueError(f"{name}={rows!r} must be a whole number of at least 1, or null.")
        for name in ("gamma", "gae_lambda", "value_lambda"):
            value = getattr(self, name)
            if not (value is None and name == "value_lambda") and not 0 <= value <= 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must lie between 0 and 1.")
        threshold = self.critic_warmup_explained_variance
        if threshold is not None and not threshold <= 1:
            raise ValueError(f"critic_warmup_explained_variance={threshold!r} can be at most 1.")
        if threshold is not None and self.critic_warmup_steps == 0:
            raise ValueError(
                "critic_warmup_explained_variance is set and critic_warmup_steps is 0: set the steps to the longest "
                "that the warm-up may take."
            )
