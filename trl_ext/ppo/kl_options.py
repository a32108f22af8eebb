"""How far the policy may go from its reference, from one rollout to the next, and what of its diversity it keeps."""

import warnings
from dataclasses import dataclass, field
from typing import Annotated, Any

from trl_ext.fields import above, at_least, between, one_of
from trl_ext.ops.kl import KL_ESTIMATORS
from trl_ext.ppo.critic_options import under_deepspeed

HORIZON_IN_BATCHES = 20
UPDATES_TO_TARGET = 64
DIVERSITY = 0.85
KL_CONTROLS = ("pi", "fixed", "adaptive", "penalty")
LARGEST_BATCH_IN_HORIZONS = 5  # from which on one step of `AdaptiveKL` could make beta 0


@dataclass
class KLOptions:
    """A part of `PPOMaxConfig`."""

    kl_estimator: Annotated[str, one_of(KL_ESTIMATORS)] = field(
        default="k1",
        metadata={
            "help": "Per-token KL estimate in the reward: k1, k2 or k3 of Schulman's note.",
            "choices": list(KL_ESTIMATORS),
        },
    )
    kl_control: Annotated[str, one_of(KL_CONTROLS)] = field(
        default="pi",
        metadata={
            "help": "How beta moves: 'pi', proportional and integral, which reaches the target without passing it by "
            "much; 'fixed'; 'adaptive', the integral alone (Ziegler et al. 2019); 'penalty', which moves the KL "
            "penalty of the reward by doubling and halving. For a KL in the loss see `policy_objective`.",
            "choices": list(KL_CONTROLS),
        },
    )
    kl_target: Annotated[float, above(0)] = field(
        default=6.0, metadata={"help": "KL per sequence, in nats, that beta is moved to hold, unless it is 'fixed'."}
    )
    update_kl_target: Annotated[float | None, at_least(0)] = field(
        default=None,
        metadata={
            "help": "How far one update may take the policy: KL per sequence, in nats, between the policy that sampled "
            "a rollout batch and the policy after it. The learning rate changes from update to update to reach it, a "
            "step that goes too far is shortened, and the critic's steps are watched likewise; 0 switches all of it "
            "off. Default: `kl_target` / 64, and 0 under DeepSpeed, which steps the optimizer by itself."
        },
    )
    kl_horizon: Annotated[float | None, above(0)] = field(
        default=None,
        metadata={
            "help": "Horizon of 'adaptive' control alone, in samples; smaller is faster. Default: 20 rollout batches."
        },
    )
    diversity_target: Annotated[float | None, between(0, 0.95)] = field(
        default=None,
        metadata={
            "help": "Share of its first distinct-2 that the policy keeps: what it loses counts as KL, all of "
            "`kl_target` at this share, but no more than 1.9 times the KL itself, so that the KL still ends above half "
            f"of `kl_target`. Default: {DIVERSITY} with `kl_control='pi'`, else 0, which switches it off."
        },
    )


def choose_kl_options(args: Any) -> None:
    """Set what was left open, and refuse what another option makes idle.

    Args:
        args: `PPOMaxConfig`, after RLOO's own checks.

    Raises:
        ValueError: What does not go together, and what to change.
    """
    if args.kl_control != "adaptive" and args.kl_horizon is not None:
        raise ValueError(
            f"kl_horizon={args.kl_horizon:g} is that of kl_control='adaptive', and kl_control is "
            f"{args.kl_control!r}: leave it out, or set kl_control='adaptive'."
        )
    if args.kl_control == "adaptive" and args.kl_horizon is None:
        args.kl_horizon = float(HORIZON_IN_BATCHES * (args.generation_batch_size or 1))
    moves = args.beta > 0 and args.kl_control != "fixed"
    if args.diversity_target is None:
        args.diversity_target = DIVERSITY if args.beta > 0 and args.kl_control == "pi" else 0.0
    elif args.diversity_target > 0 and not moves:
        raise ValueError(
            f"diversity_target={args.diversity_target:g} moves beta, and beta={args.beta:g} with "
            f"kl_control={args.kl_control!r} stays: leave it out, or set kl_control='pi' and a beta above 0."
        )
    _choose_update_kl_target(args)


def _choose_update_kl_target(args: Any) -> None:
    """DeepSpeed holds the weights that are stepped, and steps them inside backward: no step can be shortened."""
    deepspeed = under_deepspeed(args)
    if args.update_kl_target is None:
        args.update_kl_target = 0.0 if deepspeed else args.kl_target / UPDATES_TO_TARGET
        if deepspeed and args.process_index == 0:
            warnings.warn(
                "Under DeepSpeed the size of updates is not held (update_kl_target=0): a learning rate that is too "
                "high can destroy the policy. Data parallelism and FSDP2 hold it.",
                stacklevel=5,
            )
    elif deepspeed and args.update_kl_target > 0:
        raise ValueError(
            f"update_kl_target={args.update_kl_target:g} does not go with DeepSpeed, which steps the optimizer by "
            "itself, on weights of its own: set it to 0, or use data parallelism or FSDP2."
        )


def check_kl_options(args: Any) -> None:
    """Options each of which is fine alone.

    Args:
        args: `PPOMaxConfig`, its KL options chosen.

    Raises:
        ValueError: What does not go together, and what to change.
    """
    if args.update_kl_target > args.kl_target:
        raise ValueError(
            f"update_kl_target={args.update_kl_target:g} is above kl_target={args.kl_target:g}: one update would "
            f"pass the target of the run. Lower it; the default is kl_target / {UPDATES_TO_TARGET}."
        )
    horizon = args.kl_horizon if args.beta > 0 else None
    if horizon is not None and LARGEST_BATCH_IN_HORIZONS * horizon <= args.generation_batch_size:
        raise ValueError(
            f"kl_horizon={args.kl_horizon:g} is too short for rollout batches of {args.generation_batch_size} "
            f"samples: beta could become 0 or negative. It must be above "
            f"{args.generation_batch_size / LARGEST_BATCH_IN_HORIZONS:g}; "
            f"the default is {HORIZON_IN_BATCHES} rollout batches."
        )
