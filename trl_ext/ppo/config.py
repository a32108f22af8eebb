"""Configuration of PPO-Max: RLOO's, plus one field for every trick.

Deviations from Zheng et al. 2023 (arXiv 2307.04964): the reward clip is 0.8, the value in the second paper's released
runs; the horizon of the adaptive KL controller is given in rollout batches by default, since its 10,000 episodes belong
to a batch of 512.
"""

from dataclasses import dataclass, field
from typing import Any

from transformers.training_args import OptimizerNames
from trl import RLOOConfig

from trl_ext.ops.ensemble import ENSEMBLE_MODES
from trl_ext.ops.kl import KL_ESTIMATORS
from trl_ext.ops.packing import SCORED_PER_TRAINED
from trl_ext.ppo.validation import KL_CONTROLS, REWARD_NORMALIZATIONS, check_config
from trl_ext.runs import BF16_HELP, choose_mixed_precision

HORIZON_IN_BATCHES = 20
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
        check_config(self)
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
