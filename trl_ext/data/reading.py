"""Datasets by name: a Hub id, a folder, or a file."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_ext.data.rows import Row, RowError, shorten
from trl_ext.data.sources import join_webgpt_pair

if TYPE_CHECKING:
    from datasets import Dataset

FILE_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


def load_split(
    source: str | Path,
    split: str = "train",
    *,
    config: str | None = None,
    data_dir: str | None = None,
    revision: str | None = None,
) -> "Dataset":
    """A split of a dataset: a Hub id, a folder of `save_to_disk` or of data files, or one file (.jsonl, .gz, ...).

    A file, and a folder with one saved dataset, have no splits: `split` is not looked at.

    Args:
        source: the id or path.
        split: which split of a Hub dataset or folder.
        config: configuration (subset) of a Hub dataset.
        data_dir: folder inside a Hub dataset, for example "helpful-base" of Anthropic/hh-rlhf.
        revision: branch, tag or commit of a Hub dataset.

    Raises:
        FileNotFoundError: a name like a file's, and no such file.
        ValueError: an unknown file format, a split that is not there, or a Hub dataset that is a script.
    """
    from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

    path = Path(source)
    if path.is_file():
        return load_dataset(_file_format(path), data_files=str(path), split="train")
    _check_not_a_missing_file(path)
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        loaded = load_from_disk(str(path))
    else:
        try:
            loaded = load_dataset(str(source), config, data_dir=data_dir, revision=revision)
        except RuntimeError as error:
            if "scripts are no longer supported" not in str(error):
                raise
            raise ValueError(
                f'dataset {source} is a script on the Hub: pass revision="refs/convert/parquet" to read its Parquet '
                "copy, with the configuration's name, if it has one, as data_dir"
            ) from error
    if isinstance(loaded, Dataset):
        return loaded
    if not isinstance(loaded, DatasetDict) or split not in loaded:
        raise ValueError(
            f"dataset {source} has the splits {list(loaded)}, not {split!r}: choose one of these (a recipe's "
            "--dataset_train_split or --dataset_test_split)"
        )
    return loaded[split]


def is_json_file(source: str | Path) -> bool:
    """Whether `source` is a JSON file, perhaps gzipped, that `read_json_rows` reads."""
    path = Path(source)
    _check_not_a_missing_file(path)
    return path.is_file() and _file_format(path) == "json"


def read_json_rows(path: str | Path) -> Iterator[Row | RowError]:
    """The rows of a .jsonl or .json file, gzipped or not: one JSON object a line, or one list of objects.

    Read here and not by `datasets`, which gives up on the whole file where one line is broken or one value has another
    type than those before. A line that is no JSON object comes out as a RowError; blank lines do not count.
    """
    path = Path(path)
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        if ".json" in path.suffixes and file.read(1) == "[":
            file.seek(0)
            yield from map(_as_row, json.load(file))
            return
        file.seek(0)
        for line in file:
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                yield RowError("not valid JSON", f"{error.msg} in {shorten(line)}")
            else:
                yield _as_row(value)


def _as_row(value: Any) -> Row | RowError:
    if isinstance(value, dict):
        return value
    try:
        return join_webgpt_pair(value if isinstance(value, list) else [value])
    except RowError as error:
        return error


def _file_format(path: Path) -> str:
    suffixes = [suffix for suffix in path.suffixes if suffix in FILE_FORMATS]
    if not suffixes:
        raise ValueError(f"file {path}: unknown format, use one of {', '.join(FILE_FORMATS)} (or .gz)")
    return FILE_FORMATS[suffixes[-1]]


def _check_not_a_missing_file(path: Path) -> None:
    # Otherwise a misspelt path is looked for on the Hub, and the error speaks of networks and repositories.
    if path.suffix in (*FILE_FORMATS, ".gz") and not path.exists():
        raise FileNotFoundError(f"there is no file {path.resolve()}")
