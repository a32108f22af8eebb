"""Several preference sets as one, whole or by weight; every row says which set it comes from."""

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

# Columns that a set of the mixture may lack -> what its rows have in their place; NaN is refused where it is used
FILLED = {"soft_label": 1.0, "margin": 0.0, "strength": float("nan")}


def join_datasets(datasets: "Mapping[str, Dataset]") -> "Dataset":
    """All rows of preference sets, one set after the other.

    Args:
        datasets: Name -> rows, as `load_preferences` returns them.

    Returns:
        The rows with the column `source`, the name of the set, whatever stood there before.

    Raises:
        ValueError: No set, or columns that do not go together.
    """
    from datasets import concatenate_datasets

    if not datasets:
        raise ValueError("there are no sets to join: give at least one.")
    first = next(iter(datasets.values()))
    columns = sorted({name for rows in datasets.values() for name in rows.column_names if name in FILLED})
    needed = [name for name in first.column_names if name not in FILLED and name != "source"]
    parts = []
    for name, rows in datasets.items():
        own = [column for column in rows.column_names if column not in FILLED and column != "source"]
        if sorted(own) != sorted(needed) or any(rows.features[c] != first.features[c] for c in needed):
            raise ValueError(
                f"the set {name} has the columns {own}, the first one {needed}, or texts where that has messages: "
                "convert both alike."
            )
        for column in columns:
            if column not in rows.column_names:
                rows = rows.add_column(column, [FILLED[column]] * len(rows))
        rows = rows.remove_columns([c for c in rows.column_names if c == "source"])
        parts.append(rows.add_column("source", [name] * len(rows)).select_columns([*needed, *columns, "source"]))
    return concatenate_datasets(parts)


def mix_datasets(datasets: "Mapping[str, Dataset]", weights: Mapping[str, float], seed: int = 0) -> "Dataset":
    """A mixture of preference sets, as of a helpful and a harmless one.

        n_k = floor(N w_k / sum_j w_j),    N the largest with which no set gives a row twice

    Args:
        datasets: Name -> rows, as `load_preferences` returns them.
        weights: Name -> w, above 0: how much of the mixture comes from it.
        seed: Of which rows are taken, and of their order.

    Returns:
        As `join_datasets`, shuffled.

    Raises:
        ValueError: A weight that is none, other names, columns that do not go together, or a set that would be left
            without a row.
    """
    if set(datasets) != set(weights) or not datasets:
        raise ValueError(
            f"the mixture has the sets {sorted(datasets)} and the weights {sorted(weights)}: one for each."
        )
    for name, weight in weights.items():
        if not 0 < weight < float("inf"):
            raise ValueError(f"the weight of {name} in the mixture is {weight}: give a number above 0.")
    total = sum(weights.values())
    size = min(len(rows) * total / weights[name] for name, rows in datasets.items())
    rng, taken = random.Random(f"mixture-{seed}"), {}
    for name, rows in datasets.items():
        count = int(size * weights[name] / total + 1e-9)
        if count < 1:
            raise ValueError(f"the set {name} would have no row in the mixture: raise its weight, {weights[name]}.")
        taken[name] = rows.select(rng.sample(range(len(rows)), count))
    mixed = join_datasets(taken)
    return mixed.select(rng.sample(range(len(mixed)), len(mixed)))
