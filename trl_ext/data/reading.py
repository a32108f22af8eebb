"""Datasets by name: a Hub id, a folder, or a file."""

import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_ext.data.rows import Row, RowError, shorten
from trl_ext.data.sources import join_webgpt_pair

if TYPE_CHECKING:
    from datasets import Dataset

CHUNK = 2**20
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

    A file, and a folder with one saved dataset, have no splits: all their rows are "train".

    Args:
        source: the id or path.
        split: which split of a Hub dataset or folder; "train" of a file.
        config: configuration (subset) of a Hub dataset.
        data_dir: folder inside a Hub dataset, for example "helpful-base" of Anthropic/hh-rlhf.
        revision: branch, tag or commit of a Hub dataset.

    Raises:
        FileNotFoundError: no such file, folder or Hub dataset.
        ValueError: an unknown file format, a file or folder that cannot be read (where, and why), a split that is not
            there, or a Hub dataset that is a script.
    """
    from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

    path = Path(source)
    if not has_splits(source):
        check_split(source, split)
    if path.is_file():
        return _load_file(path)
    _check_not_a_missing_file(path)
    saved = (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()
    try:
        if saved:
            loaded: Any = load_from_disk(str(path))
        else:
            loaded = load_dataset(str(source), config, data_dir=data_dir, revision=revision)
    except Exception as error:
        if "scripts are no longer supported" in str(error):
            raise ValueError(
                f'dataset {source} is a script on the Hub: pass revision="refs/convert/parquet" to read its Parquet '
                "copy, with the configuration's name, if it has one, as data_dir"
            ) from error
        if path.is_dir():
            raise ValueError(
                f"folder {source} cannot be read as a dataset: {error.__cause__ or error}. Give one that save_to_disk "
                "wrote whole, or one with train.jsonl, test.jsonl, ..."
            ) from error
        if isinstance(error, FileNotFoundError | ConnectionError):
            raise FileNotFoundError(
                f"dataset {source}: there is no such file or folder, and the Hub has no such dataset or cannot be "
                f"reached ({error}). Correct the name."
            ) from error
        raise
    if isinstance(loaded, Dataset):
        return loaded
    if not isinstance(loaded, DatasetDict) or split not in loaded:
        raise ValueError(
            f"dataset {source} has the splits {list(loaded)}, not {split!r}: choose one of these (a recipe's "
            "--dataset_train_split or --dataset_test_split)"
        )
    return loaded[split]


def has_splits(source: str | Path) -> bool:
    """Whether a dataset may have several splits: a file, and a folder with one saved dataset, have none."""
    path = Path(source)
    return not path.is_file() and not (path / "dataset_info.json").is_file()


def check_split(source: str | Path, split: str) -> None:
    """Check that no split is asked of what has none.

    Raises:
        ValueError: It is; what would be read twice, as training rows and as test rows, is named.
    """
    if split != "train" and not has_splits(source):
        raise ValueError(
            f"{source} is one set of rows without splits, so it has no split {split!r}. Name the file with these rows "
            "itself, or a folder with train.jsonl and test.jsonl."
        )


def _load_file(path: Path) -> "Dataset":
    """All rows of a data file; what `datasets` cannot read is looked at line by line, to say where and why."""
    import glob

    from datasets import load_dataset

    kind = _file_format(path)
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty: give at least one row.")
    if kind != "parquet":
        _check_utf8(path)  # which `datasets` finds out when a row is read
    if kind == "json":
        _check_first_row(path)  # pyarrow ends the process at a file that begins with null
    try:
        return load_dataset(kind, data_files=glob.escape(str(path)), split="train")
    except Exception as error:
        if kind == "json":
            _explain_json(path)
        raise ValueError(
            f"{path} cannot be read as {kind}: {error.__cause__ or error}. Mend it, or save it again."
        ) from error


def _check_first_row(path: Path) -> None:
    first = next(iter(read_json_rows(path)), None)
    if first is None:
        raise ValueError(f"{path} has no rows: give at least one.")
    if isinstance(first, RowError) or not first:
        problem = first if isinstance(first, RowError) else "an object without columns"
        raise ValueError(f"{path}, row 0: {problem}. Mend or remove the line.")


def _explain_json(path: Path) -> None:
    """Say what is wrong with a JSON file.

    Raises:
        ValueError: The first line that is no object, or whose values are of another kind than those before.
    """
    kinds: dict[str, tuple[str, int]] = {}
    row = -1
    for row, record in enumerate(read_json_rows(path)):
        if isinstance(record, RowError):
            raise ValueError(f"{path}, row {row}: {record}. Mend or remove the line.")
        for name, value in record.items():
            if value is None:
                continue
            kind, first = kinds.setdefault(name, (_kind(value), row))
            if _kind(value) != kind:
                raise ValueError(
                    f"{path}, row {row}: {name!r} is {shorten(value)}, a {_kind(value)}; in row {first} it is a "
                    f"{kind}. A column holds one kind of value."
                )
    if row < 0:
        raise ValueError(f"{path} has no rows.")


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    return "number" if isinstance(value, int | float) else type(value).__name__


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
    with _explained(path):
        yield from _json_rows(path)


def _check_utf8(path: Path) -> None:
    with _explained(path), _open_text(path) as file:
        while file.read(CHUNK):
            pass


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 ({error.reason}): save it as UTF-8, as by iconv -f latin1 -t utf-8 {path}"
        ) from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is no whole gzip file: {error}. Save or download it again.") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}. Mend it, or save it again.") from error


def _open_text(path: Path) -> Any:
    zipped, encoding = path.suffix.lower() == ".gz", "utf-8-sig"  # which passes over a mark of the byte order
    return gzip.open(path, "rt", encoding=encoding) if zipped else path.open(encoding=encoding)


def _json_rows(path: Path) -> Iterator[Row | RowError]:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    with _open_text(path) as file:
        if ".json" in suffixes and file.read(1) == "[":
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
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() in FILE_FORMATS]
    if not suffixes:
        raise ValueError(f"file {path}: unknown format, use one of {', '.join(FILE_FORMATS)} (or .gz)")
    return FILE_FORMATS[suffixes[-1]]


def _check_not_a_missing_file(path: Path) -> None:
    # Otherwise a misspelt path is looked for on the Hub, and the error speaks of networks and repositories.
    if path.suffix.lower() in (*FILE_FORMATS, ".gz") and not path.exists():
        raise FileNotFoundError(f"there is no file {path.resolve()}")
