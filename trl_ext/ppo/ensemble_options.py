"""How the scores of several reward adapters become one."""

from dataclasses import dataclass, field
from typing import Annotated

from trl_ext.fields import at_least, each, one_of
from trl_ext.ops.ensemble import ENSEMBLE_MODES


@dataclass
class EnsembleOptions:
    """Options of a reward role with several adapters."""

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
    reward_ensemble_weights: Annotated[list[float] | None, each(at_least(0))] = field(
        default=None,
        metadata={
            "help": "Weight of each reward adapter in 'mean' and 'variance', in their order, as of a helpful and a "
            "harmless one. Default: all the same."
        },
    )
