"""How strongly several reward models prefer the chosen response, and what to do with labels that they doubt.

Source: Wang et al. 2024, "Secrets of RLHF in Large Language Models Part II: Reward Modeling" (arXiv 2401.06080),
sections 2.2 and 2.3.
"""

import copy
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from datasets import Dataset
from torch import Tensor

from trl_ext.reward.config import RewardModelConfig
from trl_ext.roles import RewardModel
from trl_ext.roles.adapters import WEIGHTS_FILE

LOGGER = logging.getLogger(__name__)
MADE_OF = "begun.json"  # in a member's folder, written before it is trained
# What a finished member hangs on beside the identity of its run, which may change in a training that goes on
OF_A_WHOLE_ONE = ("max_steps", "num_train_epochs", "normalize_rewards", "normalization_samples")
ACTIONS = ("flip", "smooth", "margin", "drop")
EXAMPLES = 3


def preference_strength(differences: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over M reward models of how much higher they score the chosen response.

        d = score(chosen) - score(rejected)
        mean_i = 1/M sum_m d_mi        std_i = sqrt(1/M sum_m (d_mi - mean_i)^2)

    Source: Wang et al. 2024, arXiv 2401.06080, equations 3 and 4.

    Args:
        differences: d, (M, N).

    Returns:
        mean and std, (N,) each.

    Raises:
        ValueError: fewer than two models, or a difference that is not finite.
    """
    if differences.ndim != 2 or len(differences) < 2:
        raise ValueError(
            f"differences must be (M, N) from at least two reward models, got {tuple(differences.shape)}: the "
            "spread of one model is no measure."
        )
    if not bool(differences.isfinite().all()):
        raise ValueError(
            "differences hold values that are not finite: a reward model has diverged. Lower its learning rate."
        )
    return differences.mean(0), differences.std(0, unbiased=False)


class Trains(Protocol):
    """What is asked of a member's trainer."""

    args: Any
    stop: Any
    identity: Any

    def own_checkpoint(self) -> str | None: ...
    def train(self, resume_from_checkpoint: str | bool | None = None) -> Any: ...
    def save_model(self) -> None: ...
    def is_world_process_zero(self) -> bool: ...


AnyTrainer = TypeVar("AnyTrainer", bound=Trains)


def is_trained(folder: str | Path) -> bool:
    """Whether a member's adapter is there and whole: its weights are written last."""
    return (Path(folder) / WEIGHTS_FILE).is_file()


def made_of(trainer: Trains, start: str | Path | None) -> dict[str, Any]:
    """What a member is made of: the identity of its run, its length and scale, and the adapter that it goes on from."""
    facts = trainer.identity.identity() | {name: getattr(trainer.args, name) for name in OF_A_WHOLE_ONE}
    if start is not None:
        path = Path(start) / WEIGHTS_FILE
        facts["start"] = hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else str(start)
    return facts


def check_member(folder: Path, facts: dict[str, Any]) -> None:
    """Check that a finished member was made of the same; of one without a record a warning says that it is not known.

    Raises:
        ValueError: It was not; names the folder and what differs.
    """
    path = folder / MADE_OF
    if not path.is_file():
        LOGGER.warning("%s is taken as it is: no %s says what it was trained on.", folder, MADE_OF)
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    different = sorted(name for name in {*found, *facts} if found.get(name) != facts.get(name))
    if different:
        raise ValueError(
            f"{folder} was trained with another {', '.join(different)}: set that back, name another output_dir, or "
            "remove this folder to train it anew."
        )


def train_ensemble(
    model: RewardModel,
    args: RewardModelConfig,
    seeds: list[int],
    make_trainer: Callable[[RewardModel, RewardModelConfig], AnyTrainer],
    starts: Sequence[str | Path] = (),
) -> Iterator[AnyTrainer]:
    """Train one reward adapter after another on one loaded base, each with its own start and order of the data.

    A member is saved to `output_dir/member_1`, ... when it is done; one that is there already is loaded instead of
    trained, so a run that was stopped goes on with the member it was in, at its newest checkpoint if it has one. What a
    member is made of is written before it is trained, and compared before it is loaded.

    Args:
        model: Its adapter is made anew for every member.
        args: Of every member, but for `seed`, `data_seed` and `output_dir`.
        seeds: One for each member.
        make_trainer: From the model and a member's arguments to its trainer.
        starts: Folders of adapters that the members go on from, one for each. Default: fresh ones.

    Yields:
        Each member's trainer, with the trained adapter on the model until the next one is asked for.

    Raises:
        ValueError: Two members would be the same, not one start for each, or a member that is there was trained on
            other rows or with other options.
    """
    if starts and len(starts) != len(seeds):
        raise ValueError(f"{len(starts)} adapters to go on from for {len(seeds)} members: give one for each.")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds={seeds}: members with the same seed are the same. Give each one its own.")
    root = Path(str(args.output_dir))
    for k, seed in enumerate(seeds, start=1):
        member = copy.deepcopy(args)
        member.seed, member.data_seed, member.output_dir = seed, seed, str(root / f"member_{k}")
        model.reset(seed)
        if starts and not is_trained(member.output_dir):
            model.load(starts[k - 1])
        trainer = make_trainer(model, member)
        folder, facts = Path(member.output_dir), made_of(trainer, starts[k - 1] if starts else None)
        if is_trained(folder):
            check_member(folder, facts)
            model.load(folder)
        else:
            if trainer.is_world_process_zero():
                folder.mkdir(parents=True, exist_ok=True)
                (folder / MADE_OF).write_text(json.dumps(facts, indent=1), encoding="utf-8")
            trainer.stop.how_to_go_on = "the same command goes on there"
            trainer.train(resume_from_checkpoint=trainer.own_checkpoint())
            trainer.save_model()
        yield trainer


@dataclass
class StrengthReport:
    """What the reward models think of the labels.

    Attributes:
        pairs: how many were judged.
        suspected: how many labels are doubted.
        threshold: mean strength below which they are.
        action: what was done about it.
        agreement: mean over pairs of the share of models on the side of their majority.
        members_right: share of pairs whose label each model agrees with.
        deciles: mean strength of each tenth of the pairs, weakest first.
        examples: the most doubted pairs, (row, mean, std).
    """

    pairs: int
    suspected: int
    threshold: float
    action: str
    agreement: float
    members_right: list[float]
    deciles: list[float]
    examples: list[tuple[int, float, float]]

    def rows(self) -> list[tuple[str, str]]:
        """(label, value) for a table."""
        return [
            ("pairs", f"{self.pairs:,}"),
            ("suspected labels", f"{self.suspected:,} ({self.suspected / self.pairs:.1%})"),
            ("mean strength below", f"{self.threshold:.3f}"),
            ("done about them", self.action),
            ("agreement of the models", f"{self.agreement:.3f}"),
            ("labels each model agrees with", ", ".join(f"{share:.3f}" for share in self.members_right)),
            ("mean strength by decile", ", ".join(f"{value:.2f}" for value in self.deciles)),
        ]


def apply_strength(
    dataset: Dataset,
    differences: Tensor,
    action: str,
    *,
    share: float | None = None,
    threshold: float = 0.0,
) -> tuple[Dataset, StrengthReport]:
    """Write the strength of every pair into the dataset, and act on the labels that are doubted.

        flip: chosen and rejected change places        drop: the pair is left out
        smooth: nothing changes; train with label_smoothing on `suspected`
        margin: nothing changes; train with margin_column="strength_mean"

    Args:
        dataset: N pairs with the columns `chosen` and `rejected`.
        differences: score(chosen) - score(rejected) by each of M models, (M, N).
        action: "flip", "smooth", "margin" or "drop".
        share: doubt this share of the labels, those with the lowest mean strength; else those below `threshold`.
        threshold: mean strength below which a label is doubted. 0: most models would have labelled it otherwise.

    Returns:
        The dataset with the columns `strength_mean`, `strength_std` and `suspected`, and a report. After "flip" the
        mean strength of a flipped pair is that of the new label, and `suspected` still says that it was flipped.

    Raises:
        ValueError: an unknown action, a share outside 0 to 1, missing columns, or differences of other pairs.
    """
    if action not in ACTIONS:
        raise ValueError(f"action={action!r} is unknown: use one of {', '.join(ACTIONS)}.")
    if share is not None and not 0 <= share < 1:
        raise ValueError(f"share={share} must lie between 0 and 1.")
    if not {"chosen", "rejected"} <= set(dataset.column_names):
        raise ValueError(
            f"the dataset has the columns {dataset.column_names}: strength is measured on chosen and rejected."
        )
    mean, std = preference_strength(differences)
    if len(mean) != len(dataset):
        raise ValueError(f"differences are of {len(mean)} pairs, the dataset has {len(dataset)}.")
    order = mean.argsort()
    if share is not None:
        count = round(share * len(mean))
        threshold = float(mean[order[count]]) if count < len(mean) else float(mean.max())
        suspected = torch.zeros(len(mean), dtype=torch.bool)
        suspected[order[:count]] = True
    else:
        suspected = mean < threshold
    sides = (differences > 0).float().mean(0)
    report = StrengthReport(
        pairs=len(mean),
        suspected=int(suspected.sum()),
        threshold=threshold,
        action=action,
        agreement=float(torch.maximum(sides, 1 - sides).mean()),
        members_right=(differences > 0).float().mean(1).tolist(),
        deciles=[float(part.mean()) for part in mean[order].tensor_split(min(10, len(mean)))],
        examples=[(i, float(mean[i]), float(std[i])) for i in order[:EXAMPLES].tolist()],
    )
    columns: dict[str, Any] = {"strength_mean": mean, "strength_std": std, "suspected": suspected}
    if action == "flip":
        columns["strength_mean"] = torch.where(suspected, -mean, mean)
    for name, values in columns.items():
        if name in dataset.column_names:
            dataset = dataset.remove_columns(name)
        dataset = dataset.add_column(name, values.tolist())
    if action == "drop":
        dataset = dataset.select((~suspected).nonzero().flatten().tolist())
    elif action == "flip":
        dataset = dataset.map(_flip_suspected, desc="flipping suspected labels")
    return dataset, report


def _flip_suspected(row: dict[str, Any]) -> dict[str, Any]:
    return {"chosen": row["rejected"], "rejected": row["chosen"]} if row["suspected"] else {}
