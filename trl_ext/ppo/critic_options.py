"""Options of 2025 and 2026 for PPO with a critic: rewards in parts, advantages, losses. All off, each works alone."""

import os
from dataclasses import dataclass, field
from typing import Annotated, Any

from trl_ext.fields import above, at_least, number, one_of, whole
from trl_ext.token_rewards import ROLE_PAYS

POLICY_OBJECTIVES = ("clip", "kl_penalty", "dis")
WARMUP_RETURNS = ("lambda", "monte_carlo")
EPSILON, PENALTY_COEF, LAMBDA = 0.2, 1.0, 0.95


@dataclass
class CriticOptions:
    """A part of `PPOMaxConfig`."""

    # Rewards
    reward_role_pays: Annotated[str, one_of(ROLE_PAYS)] = field(
        default="end",
        metadata={
            "help": "Where the reward role's score is paid: at the 'end' of a response; or at the end of each "
            "'sentence' or 'token' what the score has gained since the last one, the rest at the end.",
            "choices": list(ROLE_PAYS),
        },
    )
    reward_sigmoid: bool = field(
        default=False,
        metadata={
            "help": "Shape scores by a sigmoid around those of reference answers, the numbers in the dataset's column "
            "`reference_scores` (PAR, arXiv 2502.18770), before normalisation and clip. Off by default."
        },
    )

    # Advantages
    gae_lambda_alpha: Annotated[float | None, above(0, "null (None) switches it off")] = field(
        default=None,
        metadata={
            "help": "Lambda of the policy's advantages from the length l of each response, 1 - 1 / (alpha l), in place "
            "of `gae_lambda` (VAPO, arXiv 2504.05118, whose alpha is 0.05). Off by default."
        },
    )
    critic_warmup_returns: Annotated[str, one_of(WARMUP_RETURNS)] = field(
        default="lambda",
        metadata={
            "help": "What the critic learns in its warm-up: the returns of the rest of the run ('lambda', see "
            "`value_lambda`), or Monte-Carlo returns of the policy that stands still ('monte_carlo', the pretraining "
            "of VC-PPO, arXiv 2503.01491).",
            "choices": list(WARMUP_RETURNS),
        },
    )

    # Losses
    critic_updates: Annotated[int, whole(1)] = field(
        default=1,
        metadata={
            "help": "Updates of the critic for each one of the policy: of so many passes over a rollout batch the "
            "policy takes part in the first. Divides `num_iterations`."
        },
    )
    critic_freeze_attention: bool = field(
        default=False,
        metadata={"help": "Leave the critic's adapter in the attention layers as it starts (SAO, arXiv 2607.07508)."},
    )
    best_lm_coef: Annotated[float, at_least(0)] = field(
        default=0.0,
        metadata={
            "help": "Weight of minus the log-likelihood of the best-scored answers of a rollout batch (VAPO, whose "
            "weight is 0.1). Off by default."
        },
    )
    best_lm_score: Annotated[float | None, number()] = field(
        default=None,
        metadata={"help": "The raw score from which on an answer is one of the best. Needed with `best_lm_coef`."},
    )


def under_deepspeed(args: Any) -> bool:
    """Whether accelerate or the configuration asks for it."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true" or bool(args.deepspeed)


def under_fsdp(args: Any) -> bool:
    """Whether accelerate or the configuration asks for it."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" or bool(args.fsdp)


def check_critic_options(args: Any) -> None:
    """Options of which one needs or excludes another.

    Args:
        args: `PPOMaxConfig`, after RLOO's own checks.

    Raises:
        ValueError: What does not go together, and what to change.
    """
    _check_policy_objective(args)
    if args.num_iterations % args.critic_updates:
        raise ValueError(
            f"critic_updates={args.critic_updates} must divide num_iterations={args.num_iterations}, the passes over a "
            f"rollout batch, of which the policy takes part in one in {args.critic_updates}. Set num_iterations to "
            f"{args.critic_updates * max(args.num_iterations // args.critic_updates, 1)}."
        )
    if args.critic_updates > 1 and under_deepspeed(args):
        raise ValueError(
            f"critic_updates={args.critic_updates} does not go with DeepSpeed, whose optimizer would step the policy "
            "where it waits for the critic: set it to 1, or use data parallelism or FSDP2."
        )
    if args.gae_lambda_alpha is not None and args.gae_lambda != LAMBDA:
        raise ValueError(
            f"gae_lambda={args.gae_lambda:g} does nothing with gae_lambda_alpha={args.gae_lambda_alpha:g}, which gives "
            "each response a lambda of its own: leave one of them out. value_lambda is the critic's."
        )
    if (args.best_lm_coef > 0) != (args.best_lm_score is not None):
        raise ValueError(
            f"best_lm_coef={args.best_lm_coef:g} and best_lm_score={args.best_lm_score} go together: give both, the "
            "weight and the raw score from which on an answer is one of the best (1 for a reward of 0 and 1), or "
            "neither."
        )
    if args.reward_sigmoid and args.reward_role_pays != "end":
        raise ValueError(
            f"reward_sigmoid=True shapes the score of a whole response, and reward_role_pays={args.reward_role_pays!r} "
            "pays it in parts: set one of them."
        )
    if args.reward_role_pays != "end" and args.gamma != 1:
        raise ValueError(
            f"reward_role_pays={args.reward_role_pays!r} pays differences of a score, which change no policy's return "
            f"with gamma=1 only, and gamma is {args.gamma:g}: set one of them back."
        )
    if args.critic_warmup_returns != "lambda" and args.critic_warmup_steps == 0:
        raise ValueError(
            f"critic_warmup_returns={args.critic_warmup_returns!r} does nothing with critic_warmup_steps=0: raise that."
        )


def _check_policy_objective(args: Any) -> None:
    if args.policy_objective != "kl_penalty":
        if args.kl_penalty_coef != PENALTY_COEF:
            raise ValueError(
                f"kl_penalty_coef={args.kl_penalty_coef:g} does nothing with policy_objective="
                f"{args.policy_objective!r}: set that to 'kl_penalty', or leave the coefficient out."
            )
        return
    if args.update_kl_target == 0:
        raise ValueError(
            "policy_objective='kl_penalty' moves its coefficient by the KL of each update, and update_kl_target is "
            "0: set a target, or policy_objective='clip'."
        )
    for name, default in (("epsilon", EPSILON), ("epsilon_high", None)):
        if getattr(args, name) != default:
            raise ValueError(
                f"{name}={getattr(args, name)} does nothing with policy_objective='kl_penalty', which clips no "
                "ratio: leave it out, or set policy_objective='clip'."
            )
