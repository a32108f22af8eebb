"""Public preference sets, read and checked row by row, as TRL's preference format; rankings the same way.

    dataset, report = load_preferences("helpful-base/train.jsonl.gz")
    print(report)  # what was read, kept and dropped, and why

A preference has the columns `prompt` (messages), `chosen` and `rejected` (one assistant message each) and perhaps
`strength`, `margin`, `soft_label` or `source`; a ranking has `prompt`, `responses` (K >= 2 texts) and `scores` (K
numbers, higher is better).

The names below are imported on first use, so that `import trl_ext.data` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .convert import ConversionReport, convert_rows, deduplicate, load_preferences
    from .mixing import join_datasets, mix_datasets
    from .reading import has_splits, load_split
    from .rows import RowError, check_preference_row, check_ranking_row
    from .sources import FORMATS

__all__ = [
    "FORMATS",
    "ConversionReport",
    "RowError",
    "check_preference_row",
    "check_ranking_row",
    "convert_rows",
    "deduplicate",
    "has_splits",
    "join_datasets",
    "load_preferences",
    "load_split",
    "mix_datasets",
]

_HOME = {
    "FORMATS": "sources",
    "ConversionReport": "convert",
    "RowError": "rows",
    "check_preference_row": "rows",
    "check_ranking_row": "rows",
    "convert_rows": "convert",
    "deduplicate": "convert",
    "has_splits": "reading",
    "join_datasets": "mixing",
    "load_preferences": "convert",
    "load_split": "reading",
    "mix_datasets": "mixing",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
