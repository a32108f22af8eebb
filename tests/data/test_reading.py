"""Files and splits by name: what cannot be read says which file, which row and why."""

import gzip
import json
import re
from pathlib import Path

import pytest
from datasets import Dataset

from trl_ext.data import convert_rows, has_splits, load_preferences, load_split

ROWS = [{"prompt": "a b"}, {"prompt": "c d"}]
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}


def write(path: Path, rows, encoding: str = "utf-8") -> str:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding=encoding)
    return str(path)


@pytest.mark.parametrize("name", ["my[1].jsonl", "UPPER.JSONL", "a*b?.jsonl"])
def test_a_file_may_have_any_name(tmp_path: Path, name: str) -> None:
    assert load_split(write(tmp_path / name, ROWS))["prompt"][:] == ["a b", "c d"]


def test_a_zipped_file_in_capitals_is_read_row_by_row(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "PAIRS.JSONL.GZ", "wt") as file:
        file.write(json.dumps(PAIR))
    assert len(load_preferences(tmp_path / "PAIRS.JSONL.GZ")[0]) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n\n", "has no rows"),
        (b'{"prompt": "a"}\n{"prompt": "b', "row 1: not valid JSON"),
        (b'{"prompt": "a"}\n["b"]', "row 1: not an object"),
        ('{"prompt": "caf\u00e9"}'.encode("latin-1"), "is not UTF-8"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(path)) + ".*" + re.escape(message)):
        load_split(path)


def test_a_torn_gzip_file_is_named(tmp_path: Path) -> None:
    whole = gzip.compress(json.dumps(PAIR).encode() * 50)
    (tmp_path / "pairs.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    for load in (load_split, load_preferences):
        with pytest.raises(ValueError, match=r"pairs\.jsonl\.gz"):
            load(tmp_path / "pairs.jsonl.gz")


def test_a_file_has_no_split_but_train(tmp_path: Path) -> None:
    path = write(tmp_path / "prompts.jsonl", [PAIR])
    Dataset.from_list([PAIR]).save_to_disk(tmp_path / "saved")
    for source in (path, tmp_path / "saved"):
        assert not has_splits(source)
        assert len(load_split(source, "train")) == 1
        for load in (load_split, lambda name, split: load_preferences(name, split=split)):
            with pytest.raises(ValueError, match="no split 'test'"):
                load(source, "test")
    (tmp_path / "folder").mkdir()
    for split in ("train", "test"):
        write(tmp_path / "folder" / f"{split}.jsonl", [PAIR | {"prompt": split}])
    assert has_splits(tmp_path / "folder")
    assert load_split(tmp_path / "folder", "test")["prompt"][:] == ["test"]


def test_strengths_in_words_are_left_out_and_counted() -> None:
    rows = [PAIR | {"strength": word} for word in ("clear", "slight")]
    dataset, report = convert_rows(rows)
    assert dataset.column_names == ["prompt", "chosen", "rejected"]
    assert (report.rows_kept, dict(report.dropped)) == (2, {})
    assert "ignored in 2 rows: strength is a word, as 'clear', and no number" in str(report)


def test_real_pairs_with_strengths_in_words_are_kept(shared_dir: Path) -> None:
    dataset, report = load_preferences(shared_dir / "data" / "open_instruct_human" / "pairs.jsonl.gz")
    assert len(dataset) > 600
    assert sum(report.ignored.values()) == 686


@pytest.mark.parametrize("content", ["null", "null\nnull\n", "{}", "3"])
def test_a_file_that_begins_with_no_object_is_refused_before_pyarrow_reads_it(tmp_path, content):
    """At `null` pyarrow ends the process."""
    path = tmp_path / "x.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"x\.jsonl, row 0: "):
        load_split(path)


def test_a_mark_of_the_byte_order_is_passed_over(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}')
    assert load_split(path)["prompt"][:] == ["a"]
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(PAIR).encode())
    assert len(load_preferences(path)[0]) == 1


def test_a_folder_or_a_name_that_is_no_dataset_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"folder .* cannot be read as a dataset: .*train\.jsonl"):
        load_split(tmp_path)
    with pytest.raises(FileNotFoundError, match="dataset nowhere/at_all: there is no such file or folder"):
        load_split("nowhere/at_all")
