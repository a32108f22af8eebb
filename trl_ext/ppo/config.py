"""Configuration of PPO-Max: RLOO's, plus one field for every trick.

Deviations from Zheng et al. 2023 (arXiv 2307.04964): the reward clip is 0.8, the value in the second paper's released
runs; the horizon of the adaptive KL controller is given in rollout batches by default, since its 10,000 episodes belong
to a batch of 512.
"""

import warnings
from dataclasses import dataclass, field
from typing import Annotated, Any

from transformers.training_args import OptimizerNames
from trl import RLOOConfig

from trl_ext.fields import above, at_least, at_most, between, check_fields, check_schedule, number, one_of, whole
from trl_ext.generation.vllm_options import VLLMRolloutOptions
from trl_ext.ops.ensemble import check_weights
from trl_ext.ops.packing import SCORED_PER_TRAINED
from trl_ext.ppo.critic_options import (
    LAMBDA,
    PENALTY_COEF,
    POLICY_OBJECTIVES,
    CriticOptions,
    check_critic_options,
    under_fsdp,
)
from trl_ext.ppo.ensemble_options import EnsembleOptions
from trl_ext.ppo.kl_options import KLOptions, check_kl_options, choose_kl_options
from trl_ext.ppo.refusals import HARMLESS, check_options
from trl_ext.ppo.rewards import BASELINES, SCORE_MODES
from trl_ext.runs import BF16_HELP, choose_mixed_precision

WARMUP_ROLLOUTS, WARMUP_SHARE = 5, 10
GUARD_ACTS = ("raise_beta", "step_back", "stop")
OFF = "null (None) switches it off"
DEFAULT_OPTIM: Any = RLOOConfig.__dataclass_fields__["optim"].default


@dataclass
class PPOMaxConfig(CriticOptions, KLOptions, EnsembleOptions, VLLMRolloutOptions, RLOOConfig):
    r"""
    Configuration of [`PPOMaxTrainer`]. The defaults are PPO-Max; every trick is a field that works alone.

    Fields of `RLOOConfig` keep their names and meaning: `beta` is the KL coefficient (its first value, when
    controlled), `epsilon` and `epsilon_high` the policy clip, `num_iterations` the passes over a rollout batch,
    `steps_per_generation` the micro-batches in one, `temperature`, `max_completion_length`, `reward_weights`.
    """

    # Fields of the parents with other defaults
    bf16: bool | None = field(default=None, metadata={"help": BF16_HELP})  # type: ignore[assignment]
    learning_rate: float = field(
        default=1e-4,
        metadata={
            "help": "Learning rate of the policy's adapter, where it starts: `update_kl_target` changes it until an "
            "update has the size asked for."
        },
    )
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
    num_completions_to_print: int | None = field(
        default=3, metadata={"help": "Completions printed at each log with log_completions; none: all."}
    )
    disable_dropout: bool = field(
        default=True,
        metadata={"help": "Switch dropout off. With it the probability ratio is noisy and the first KL is not 0."},
    )
    normalize_advantages: bool = field(
        default=True, metadata={"help": "Whiten the advantages over the response tokens of the rollout batch."}
    )

    # Generation
    per_device_generate_batch_size: Annotated[int | None, whole(1)] = field(
        default=None,
        metadata={
            "help": "Completions that one call of `generate` samples at a time: the KV cache is as large as this and "
            "not as the rollout batch. Default: the whole rollout batch at once."
        },
    )

    # Scoring
    per_device_score_batch_size: Annotated[int | None, whole(1)] = field(
        default=None,
        metadata={
            "help": "Sequences of full length that a pass of the rollout scores, shorter ones more. Default: 2 times "
            "`per_device_train_batch_size`, because without gradients a pass keeps less."
        },
    )

    # Reward
    reward_role_weight: Annotated[float, number()] = field(
        default=1.0, metadata={"help": "Weight of the reward role's score; `reward_weights` weighs the functions."}
    )
    reward_normalization: Annotated[str, one_of(SCORE_MODES)] = field(
        default="norm",
        metadata={
            "help": "What to do with sequence scores: 'norm' subtracts the running mean and divides by the running "
            "standard deviation, 'scale' only divides, 'none' leaves them.",
            "choices": list(SCORE_MODES),
        },
    )
    reward_clip: Annotated[float | None, above(0, OFF)] = field(
        default=0.8, metadata={"help": "Clip the normalised score to +- this; null in a yaml file switches it off."}
    )
    missing_eos_penalty: Annotated[float | None, at_least(0)] = field(
        default=None, metadata={"help": "Taken off the shaped score of a completion that the length limit cut."}
    )

    # Advantages and losses
    gamma: Annotated[float, between(0, 1)] = field(default=1.0, metadata={"help": "Discount of GAE."})
    gae_lambda: Annotated[float, between(0, 1)] = field(default=LAMBDA, metadata={"help": "Lambda of GAE."})
    value_lambda: Annotated[float | None, between(0, 1)] = field(
        default=None,
        metadata={"help": "Lambda of the returns that the critic learns; 1 is Monte Carlo. Default: the policy's."},
    )
    advantage_clip: Annotated[float | None, above(0, OFF)] = field(
        default=None, metadata={"help": "Clip the (whitened) advantages to +- this. Off by default."}
    )
    policy_objective: Annotated[str, one_of(POLICY_OBJECTIVES)] = field(
        default="clip",
        metadata={
            "help": "The policy's loss: 'clip' of the ratio (`epsilon`); 'kl_penalty', PPO-Penalty: the KL to the "
            "policy that sampled takes its place, with a coefficient that doubles or halves after an update whose KL "
            "is 1.5 times off `update_kl_target` (Schulman et al. 2017, section 4); 'dis': tokens with a ratio outside "
            "[1 - `epsilon`, 1 + `epsilon_high`] contribute nothing (SAO, arXiv 2607.07508).",
            "choices": list(POLICY_OBJECTIVES),
        },
    )
    kl_penalty_coef: Annotated[float, above(0)] = field(
        default=PENALTY_COEF, metadata={"help": "Where the coefficient of `policy_objective='kl_penalty'` starts."}
    )
    value_clip: Annotated[float | None, above(0, OFF)] = field(
        default=0.2, metadata={"help": "Clip of the value loss around the rollout's values; null switches it off."}
    )
    vf_coef: Annotated[float, at_least(0)] = field(default=1.0, metadata={"help": "Weight of the value loss."})
    entropy_coef: Annotated[float, at_least(0)] = field(
        default=0.0, metadata={"help": "Weight of the entropy bonus. Off by default."}
    )
    ptx_coef: Annotated[float, at_least(0)] = field(
        default=0.0, metadata={"help": "Weight of the language-model loss on `ptx_dataset` (PPO-ptx). Off by default."}
    )
    ptx_max_length: Annotated[int, whole(2)] = field(
        default=512, metadata={"help": "Tokens at which PPO-ptx texts are cut."}
    )

    # Critic
    critic_learning_rate: Annotated[float | None, at_least(0)] = field(
        default=None, metadata={"help": "Learning rate of the critic. Default: 3 times `learning_rate`."}
    )
    critic_warmup_steps: Annotated[int | None, whole(0)] = field(
        default=None,
        metadata={
            "help": "Optimizer steps at the start that train the critic only; 0 switches it off. Default: those of 5 "
            "rollout batches, and no more than a tenth of the run."
        },
    )
    critic_warmup_explained_variance: Annotated[float | None, at_most(1)] = field(
        default=0.2,
        metadata={
            "help": "End the warm-up early, once the critic explains this share of the returns' variance; null "
            "switches it off. `critic_warmup_steps` is the longest that it may take."
        },
    )
    critic_baseline: Annotated[str, one_of(BASELINES)] = field(
        default="explained",
        metadata={
            "help": "The baseline of advantages: 'always' the critic; 'explained': the critic where it explains "
            "some of the variance of a rollout batch, else the batch's mean return (EVPO, arXiv 2604.19485).",
            "choices": list(BASELINES),
        },
    )

    write_report: bool = field(default=True, metadata={"help": "Write report.html and learning_curve.png at the end."})

    # Guard
    guard: bool = field(
        default=True,
        metadata={
            "help": "Watch the policy for the ways in which it collapses without a word (documentation: tuning): "
            "alarms in the log and as metrics `guard/...`, and what `guard_acts` allows."
        },
    )
    guard_acts: list[str] = field(
        default_factory=lambda: list(GUARD_ACTS),
        metadata={
            "help": "What the guard may do where an alarm stays, in this order: 'raise_beta', 'step_back' to the last "
            "good policy, 'stop'. An empty list: nothing but alarms.",
        },
    )
    keep_best_policy: bool | None = field(
        default=None,
        metadata={
            "help": "End with the policy whose mean reward on the evaluation set was the highest, of those with a KL "
            "of at most 4/3 `kl_target`. Default: where the run is evaluated on its way, without "
            "`load_best_model_at_end`."
        },
    )

    def __post_init__(self) -> None:
        check_fields(self)
        choose_mixed_precision(self)
        self._optim_by_base = self.optim is None
        self.optim = self.optim or DEFAULT_OPTIM
        try:
            super().__post_init__()
        except ValueError as error:
            # RLOO's last check wants two generations for its leave-one-out baseline. PPO has a critic.
            if self.num_generations != 1 or "at least 2 generations" not in str(error):
                raise
        check_schedule(self)
        if self.critic_learning_rate is None:
            self.critic_learning_rate = 3 * self.learning_rate
        choose_kl_options(self)
        evaluated = self.eval_strategy != "no"
        if self.keep_best_policy is None:
            self.keep_best_policy = evaluated and not self.load_best_model_at_end
        self._check_guard(evaluated)
        self._check_what_goes_together()
        check_options(self)

    @property
    def scored_at_a_time(self) -> int:
        """Sequences of full length that a pass of the rollout scores."""
        return self.per_device_score_batch_size or SCORED_PER_TRAINED * self.per_device_train_batch_size

    def choose_optim(self, quantised: bool) -> None:
        """Where no `optim` was given: paged 8-bit AdamW for a quantised base on a CUDA card. The trainer calls it.

        Not under FSDP, whose split weights it cannot step.
        """
        if self._optim_by_base and quantised and not under_fsdp(self) and self.device.type == "cuda":
            self.optim = OptimizerNames.PAGED_ADAMW_8BIT

    def _check_guard(self, evaluated: bool) -> None:
        unknown = [act for act in self.guard_acts if act not in GUARD_ACTS]
        if unknown:
            raise ValueError(f"guard_acts={self.guard_acts!r} must be of {', '.join(GUARD_ACTS)}.")
        if self.keep_best_policy and not evaluated:
            raise ValueError(
                "keep_best_policy=True needs evaluations, and eval_strategy is 'no': set eval_strategy='steps', or "
                "leave keep_best_policy out."
            )
        if self.keep_best_policy and self.load_best_model_at_end:
            raise ValueError(
                "keep_best_policy=True and load_best_model_at_end=True would both choose the policy: set one of them."
            )

    def at_border(self, step: int, steps: int) -> bool:
        """Whether the update of a rollout batch is over after so many optimizer steps, of so many in the run."""
        return step % self.steps_per_update == 0 or step >= steps

    def _check_what_goes_together(self) -> None:
        """Options each of which is fine alone."""
        check_weights(self.reward_ensemble_weights, self.reward_ensemble)
        assert self.steps_per_generation is not None  # RLOOConfig has set it
        if self.steps_per_generation % self.gradient_accumulation_steps:
            raise ValueError(
                f"steps_per_generation={self.steps_per_generation} must be a multiple of "
                f"gradient_accumulation_steps={self.gradient_accumulation_steps}, so that a pass over the rollout "
                "batch is a whole number of optimizer steps."
            )
        check_kl_options(self)
        check_critic_options(self)
        if self.max_steps >= 1:
            self.check_critic_warmup(self.max_steps)

    def warmup_of_critic(self, steps: int) -> int:
        """Optimizer steps that the critic is trained alone, of so many in the run."""
        if self.critic_warmup_steps is not None:
            return self.critic_warmup_steps
        rollouts = min(WARMUP_ROLLOUTS, steps // (WARMUP_SHARE * self.steps_per_update))
        return rollouts * self.steps_per_update

    @property
    def steps_per_update(self) -> int:
        """Optimizer steps that a rollout batch is trained for."""
        return self.num_iterations * self.steps_per_generation // self.gradient_accumulation_steps  # type: ignore[operator]

    def check_critic_warmup(self, steps: int) -> None:
        """Check that a run of so many optimizer steps trains its policy, and longer than that warms up.

        The trainer calls it where `max_steps` does not say how many they are.

        Raises:
            ValueError: It does not.
        """
        left = steps - self.warmup_of_critic(steps)
        if left == steps and self.critic_warmup_returns != "lambda":
            raise ValueError(
                f"critic_warmup_returns={self.critic_warmup_returns!r} is for the critic's warm-up, and a run of "
                f"{steps} optimizer steps has none: set critic_warmup_steps, or train longer."
            )
        if left <= 0:
            raise ValueError(
                f"critic_warmup_steps={self.critic_warmup_steps} takes all of the {steps} optimizer steps: the policy "
                "would never be trained. Lower it (0 switches it off), or train longer."
            )
        warmup = self.get_warmup_steps(left)
        if warmup >= left and warmup > 0:
            raise ValueError(
                f"warmup_steps={self.warmup_steps:g} warms the learning rate up for {warmup} optimizer steps, and the "
                f"policy has {left} after critic_warmup_steps={self.critic_warmup_steps}. Lower one, or train longer."
            )

    def warn_about_off_policy_sampling(self) -> None:
        """Warn about options that sample from another distribution than the one whose ratio PPO clips."""
        used = {"top_p": self.top_p < 1, "top_k": bool(self.top_k), "min_p": bool(self.min_p)}
        used["repetition_penalty"] = self.repetition_penalty != 1
        given: Any = self.generation_kwargs or {}
        names = [name for name, on in used.items() if on] + [name for name in given if name not in HARMLESS]
        if names:
            warnings.warn(
                f"{', '.join(names)} change the distribution that completions are sampled from, but not the "
                "log-probabilities of PPO: the data is off-policy. Only `temperature` is accounted for.",
                stacklevel=3,
            )
