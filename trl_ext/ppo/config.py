"""Configuration of PPO-Max: RLOO's, plus one field for every trick.

Deviations from Zheng et al. 2023 (arXiv 2307.04964): the reward clip is 0.8, the value in the second paper's released
runs; the horizon of the adaptive KL controller is given in rollout batches by default, since its 10,000 episodes belong
to a batch of 512.
"""

import os
import warnings
from dataclasses import dataclass, field
from typing import Annotated, Any

from transformers import GenerationConfig
from transformers.training_args import OptimizerNames
from trl import RLOOConfig

from trl_ext.fields import above, at_least, at_most, between, check_fields, check_schedule, number, one_of, whole
from trl_ext.ops.ensemble import ENSEMBLE_MODES
from trl_ext.ops.kl import KL_ESTIMATORS
from trl_ext.ops.packing import SCORED_PER_TRAINED
from trl_ext.ppo.rewards import SCORE_MODES
from trl_ext.runs import BF16_HELP, choose_mixed_precision

HORIZON_IN_BATCHES = 20
KL_CONTROLS = ("fixed", "adaptive", "penalty")
OFF = "null (None) switches it off"
# Of `generation_kwargs`: what has a field of its own, or comes from elsewhere
HAVE_THEIR_PLACE = {
    "temperature": "the field temperature",
    "top_p": "the field top_p",
    "top_k": "the field top_k",
    "min_p": "the field min_p",
    "repetition_penalty": "the field repetition_penalty",
    "cache_implementation": "the field cache_implementation",
    "max_new_tokens": "the field max_completion_length",
    "max_length": "the field max_completion_length",
    "num_return_sequences": "the field num_generations",
    "eos_token_id": "the tokenizer's eos_token and the base's generation_config",
    "pad_token_id": "the tokenizer's pad_token",
    "bos_token_id": "the tokenizer's bos_token",
    "disable_compile": "nothing: TRL sets it",
    "return_dict_in_generate": "nothing: token ids are all that is read",
}
# What leaves the distribution of the completions as it is
HARMLESS = {"use_cache", "cache_config", "prompt_lookup_num_tokens", "max_matching_ngram_size", "renormalize_logits"}
# What transformers' continuous batching applies
CONTINUOUS_BATCHING_KWARGS = {"do_sample"}
LARGEST_BATCH_IN_HORIZONS = 5  # from which on one step of `AdaptiveKL` could make beta 0
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
    reward_ensemble: Annotated[str, one_of(ENSEMBLE_MODES)] = field(
        default="mean",
        metadata={
            "help": "How the scores of several reward adapters become one: 'mean', 'min', or 'variance', the mean less "
            "`reward_ensemble_coef` times their variance.",
            "choices": list(ENSEMBLE_MODES),
        },
    )
    reward_ensemble_coef: Annotated[float, at_least(0)] = field(
        default=0.5, metadata={"help": "Weight of the variance in `reward_ensemble='variance'`."}
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

    # KL
    kl_estimator: Annotated[str, one_of(KL_ESTIMATORS)] = field(
        default="k1",
        metadata={
            "help": "Per-token KL estimate in the reward: k1, k2 or k3 of Schulman's note.",
            "choices": list(KL_ESTIMATORS),
        },
    )
    kl_control: Annotated[str, one_of(KL_CONTROLS)] = field(
        default="adaptive",
        metadata={
            "help": "How beta moves: 'fixed'; 'adaptive', proportional (Ziegler et al. 2019); 'penalty', doubling and "
            "halving (Schulman et al. 2017, section 4).",
            "choices": list(KL_CONTROLS),
        },
    )
    kl_target: Annotated[float, above(0)] = field(
        default=6.0, metadata={"help": "KL per sequence, in nats, that 'adaptive' and 'penalty' control aim at."}
    )
    kl_horizon: Annotated[float | None, above(0)] = field(
        default=None,
        metadata={
            "help": "Horizon of 'adaptive' control, in samples; smaller reacts faster. Default: 20 rollout batches."
        },
    )

    # Advantages and losses
    gamma: Annotated[float, between(0, 1)] = field(default=1.0, metadata={"help": "Discount of GAE."})
    gae_lambda: Annotated[float, between(0, 1)] = field(default=0.95, metadata={"help": "Lambda of GAE."})
    value_lambda: Annotated[float | None, between(0, 1)] = field(
        default=None,
        metadata={"help": "Lambda of the returns that the critic learns; 1 is Monte Carlo. Default: `gae_lambda`."},
    )
    advantage_clip: Annotated[float | None, above(0, OFF)] = field(
        default=None, metadata={"help": "Clip the (whitened) advantages to +- this. Off by default."}
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
    critic_warmup_steps: Annotated[int, whole(0)] = field(
        default=20, metadata={"help": "Optimizer steps at the start that train the critic only; 0 switches it off."}
    )
    critic_warmup_explained_variance: Annotated[float | None, at_most(1)] = field(
        default=None,
        metadata={
            "help": "End the warm-up early, once the critic explains this share of the returns' variance. Then "
            "`critic_warmup_steps` is the longest it may take."
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
        if self.kl_horizon is None:
            self.kl_horizon = float(HORIZON_IN_BATCHES * (self.generation_batch_size or 1))
        self._check_what_goes_together()
        self._check_inherited_options()
        self._check_generation_kwargs()
        self._check_continuous_batching()

    @property
    def scored_at_a_time(self) -> int:
        """Sequences of full length that a pass of the rollout scores."""
        return self.per_device_score_batch_size or SCORED_PER_TRAINED * self.per_device_train_batch_size

    def choose_optim(self, quantised: bool) -> None:
        """Where no `optim` was given: paged 8-bit AdamW for a quantised base on a CUDA card. The trainer calls it.

        Not under FSDP, whose split weights it cannot step.
        """
        split = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" or bool(self.fsdp)
        if self._optim_by_base and quantised and not split and self.device.type == "cuda":
            self.optim = OptimizerNames.PAGED_ADAMW_8BIT

    def _check_what_goes_together(self) -> None:
        """Options each of which is fine alone."""
        assert self.steps_per_generation is not None  # RLOOConfig has set it
        if self.steps_per_generation % self.gradient_accumulation_steps:
            raise ValueError(
                f"steps_per_generation={self.steps_per_generation} must be a multiple of "
                f"gradient_accumulation_steps={self.gradient_accumulation_steps}, so that a pass over the rollout "
                "batch is a whole number of optimizer steps."
            )
        if self.critic_warmup_explained_variance is not None and self.critic_warmup_steps == 0:
            raise ValueError(
                "critic_warmup_explained_variance is set and critic_warmup_steps is 0: set the steps to the longest "
                "that the warm-up may take."
            )
        if self.max_steps >= 1:
            self.check_critic_warmup(self.max_steps)
        shortest = LARGEST_BATCH_IN_HORIZONS * self.kl_horizon  # type: ignore[operator]
        if self.kl_control == "adaptive" and self.beta > 0 and shortest <= self.generation_batch_size:  # type: ignore[operator]
            raise ValueError(
                f"kl_horizon={self.kl_horizon:g} is too short for rollout batches of {self.generation_batch_size} "
                f"samples: beta could become 0 or negative. It must be above "
                f"{self.generation_batch_size / LARGEST_BATCH_IN_HORIZONS:g}; "  # type: ignore[operator]
                f"the default is {HORIZON_IN_BATCHES} rollout batches."
            )

    def check_critic_warmup(self, steps: int) -> None:
        """Check that a run of so many optimizer steps trains its policy, and longer than that warms up.

        The trainer calls it where `max_steps` does not say how many they are.

        Raises:
            ValueError: It does not.
        """
        left = steps - self.critic_warmup_steps
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

    def _check_inherited_options(self) -> None:
        """Options of TRL and transformers that PPO-Max cannot honour."""
        refused: dict[str, str] = {
            "reward_clip_range": "use reward_clip, which clips after normalisation",
            "mask_truncated_completions": "use missing_eos_penalty; a masked completion would leave its "
            "critic untrained",
            "sync_ref_model": "the reference is the frozen starting policy; set it to False",
            "use_vllm": "TRL gives vLLM the policy by merging its adapter into the base that all roles share, and "
            "unmerging rounds, or quantises a 4-bit base anew: the reference would move at each sync. It would also "
            "send the critic's head, and 4-bit weights as they are packed, which no vLLM model has. Use transformers' "
            "generate (the default) or use_transformers_continuous_batching=True",
            "router_aux_loss_coef": "the auxiliary loss of experts is not supported; set it to 0",
            "use_liger_kernel": "it replaces the forward passes of the roles; set it to False",
            "restore_callback_states_from_checkpoint": "the state of PPO-Max is restored without it; set it to False",
        }
        for name, remedy in refused.items():
            if getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)!r} has no place in PPO-Max: {remedy}.")
        checkpointing: Any = (
            getattr(self, "activation_checkpointing_kwargs", None) or self.gradient_checkpointing_kwargs
        )
        if (checkpointing or {}).get("use_reentrant"):
            raise ValueError(
                "gradient_checkpointing_kwargs={'use_reentrant': True} would recompute under the wrong role: set it "
                "to False or leave it out."
            )

    def _check_generation_kwargs(self) -> None:
        """What has a field of its own bypasses it here: log-probabilities and warnings follow the field."""
        given: Any = self.generation_kwargs or {}
        known = vars(GenerationConfig()).keys()
        for name, value in given.items():
            if name in HAVE_THEIR_PLACE:
                raise ValueError(
                    f"generation_kwargs={{{name!r}: {value!r}}} would bypass what governs it: use "
                    f"{HAVE_THEIR_PLACE[name]}."
                )
            if name.startswith("_") or name not in known:
                raise ValueError(
                    f"generation_kwargs={{{name!r}: {value!r}}}: GenerationConfig of transformers has no such option. "
                    "Correct its name, or drop it."
                )

    def _check_continuous_batching(self) -> None:
        """What continuous batching would leave out, with no more than a line in its log."""
        if not self.use_transformers_continuous_batching:
            return
        kwargs: Any = self.generation_kwargs or {}
        options: Any = self.transformers_continuous_batching_config or {}
        left_out: dict[str, tuple[Any, str]] = {
            "repetition_penalty": (None if self.repetition_penalty == 1 else self.repetition_penalty, "set it to 1"),
            "cache_implementation": (self.cache_implementation, "leave it out; the engine has a cache of its own"),
            "generation_kwargs": (
                sorted(set(kwargs) - CONTINUOUS_BATCHING_KWARGS),
                f"give no others than {', '.join(sorted(CONTINUOUS_BATCHING_KWARGS))}",
            ),
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
