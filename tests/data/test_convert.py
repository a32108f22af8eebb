"""Whole sets: reading, counting, ties, de-duplication, and the real HH-RLHF where it is at hand."""

import gzip
import json

import pytest
from datasets import Dataset, DatasetDict

from trl_ext.data import check_preference_row, convert_rows, deduplicate, load_preferences, load_split
from trl_ext.data.convert import BATCH, PEEK


def hh(question, chosen, rejected):
    start = f"\n\nHuman: {question}\n\nAssistant: "
    return {"chosen": start + chosen, "rejected": start + rejected}


def ranking(prompt, responses, scores):
    return {"prompt": prompt, "responses": responses, "scores": scores}


HH_ROWS = [hh("a?", "yes", "no"), hh("b?", "same", "same"), hh("c?", "one", "two"), hh("d?", "x", ""), hh("e?", "", "")]


def write_lines(path, rows):
    text = "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as file:
        file.write(text)
    return path


def save_parquet(rows, path):
    Dataset.from_list(rows).to_parquet(path)
    return path


def save_to_disk(rows, path):
    Dataset.from_list(rows).save_to_disk(path)
    return path


def save_splits(rows, path):
    DatasetDict({"train": Dataset.from_list(rows), "test": Dataset.from_list(rows[:1])}).save_to_disk(path)
    return path


def folder_of_files(rows, path):
    path.mkdir()
    write_lines(path / "train.jsonl", rows)
    return path


def json_list(rows, path):
    path.write_text(json.dumps(rows, indent=1))
    return path


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (lambda rows, path: write_lines(path, rows), "hh.jsonl"),
        (lambda rows, path: write_lines(path, rows), "hh.jsonl.gz"),
        (lambda rows, path: write_lines(path, rows), "batch9.json"),
        (json_list, "hh.json"),
        (save_parquet, "hh.parquet"),
        (save_to_disk, "saved"),
        (save_splits, "splits"),
        (folder_of_files, "files"),
    ],
)
def test_every_kind_of_source_gives_the_same_dataset_and_report(write, name, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    dataset, report = load_preferences(write(HH_ROWS, tmp_path / name))
    assert dataset.to_list() == [
        {
            "prompt": [{"role": "user", "content": f"{letter}?"}],
            "chosen": [{"role": "assistant", "content": good}],
            "rejected": [{"role": "assistant", "content": bad}],
        }
        for letter, good, bad in [("a", "yes", "no"), ("c", "one", "two")]
    ]
    assert (report.format, report.rows_read, report.rows_kept) == ("hh-rlhf", 5, 2)
    assert report.dropped == {"chosen equals rejected": 1, "empty response": 2}
    assert report.examples == {"chosen equals rejected": (1, "'same'"), "empty response": (3, "rejected")}


def test_a_split_of_a_folder(tmp_path):
    source = save_splits(HH_ROWS, tmp_path / "splits")
    assert load_preferences(source, split="test")[1].rows_read == 1
    with pytest.raises(ValueError, match=r"has the splits \['train', 'test'\], not 'validation': choose one of these"):
        load_split(source, "validation")


def test_broken_lines_and_lines_that_are_no_objects_are_counted(tmp_path):
    lines = [HH_ROWS[0], '{"chosen": "\n', "\n", "3\n", '["a", "b"]\n', HH_ROWS[2], {"chosen": HH_ROWS[0]["chosen"]}]
    dataset, report = load_preferences(write_lines(tmp_path / "hh.jsonl", lines))
    assert len(dataset) == report.rows_kept == 2
    assert report.rows_read == 6  # the blank line is no row
    assert report.dropped == {"not valid JSON": 1, "not an object": 2, "missing field": 1}
    assert report.examples["missing field"] == (5, "rejected")


def test_openais_own_webgpt_file_is_read(tmp_path):
    question = {"full_text": "Why?"}
    line = [{"question": question, "answer": "a", "score": 0.5}, {"question": question, "answer": "b", "score": -0.5}]
    dataset, report = load_preferences(write_lines(tmp_path / "comparisons.jsonl", [line, line]))
    assert report.format == "webgpt"
    assert dataset["strength"][:] == [0.5, 0.5]


def test_a_strength_of_another_type_costs_one_row_not_the_file(tmp_path):
    good = {"prompt": "a", "chosen": "b", "rejected": "c", "strength": 1}
    rows = [good, good | {"strength": "strong"}, good | {"strength": None}, good | {"strength": 0.5}]
    dataset, report = load_preferences(write_lines(tmp_path / "rows.jsonl", rows))
    assert dataset["strength"][:] == [1.0, 0.5]
    assert report.dropped == {"not a number": 2}


def test_a_record_unlike_the_first_is_dropped_not_mixed_in():
    text = {"prompt": "a", "chosen": "b", "rejected": "c"}
    conversation = check_preference_row(
        {name: [{"role": "user", "content": "a"}, {"role": "assistant", "content": name}] for name in list(text)[1:]}
    )
    dataset, report = convert_rows([text, conversation, text | {"strength": 1.0}, text])
    assert dataset.to_list() == [text, text]
    assert report.dropped == {"not like the first record": 2}


def test_missing_columns_are_an_error_before_any_row_is_converted():
    rows = Dataset.from_list([{"history": "a", "human_ref_A": "b", "labels": 1}])
    with pytest.raises(
        ValueError, match=r"expects the columns .*'score_ratio'.* found \['history', 'human_ref_A', "
    ) as e:
        convert_rows(rows, "shp")
    assert "['human_ref_B', 'score_A', 'score_B', 'score_ratio'] missing" in str(e.value)


def test_a_column_that_the_first_row_lacks_is_not_missing():
    dataset, report = convert_rows([{"chosen": HH_ROWS[0]["chosen"]}, HH_ROWS[0]], "hh-rlhf")
    assert len(dataset) == 1
    assert report.dropped == {"missing field": 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "hh"}, "format must be 'auto' or one of hh-rlhf, shp"),
        ({"ties": "ignore"}, "ties must be 'drop' or 'keep', got 'ignore'"),
        ({"ties": "keep"}, "ties='keep' is for rankings"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        convert_rows(HH_ROWS, **arguments)


def test_nothing_that_can_be_used_is_an_error_with_the_report(tmp_path):
    with pytest.raises(ValueError, match=r"(?s)no row could be used.*3 rows read, 0 kept.*chosen equals rejected +3"):
        convert_rows([HH_ROWS[1]] * 3)
    with pytest.raises(ValueError, match="nothing to convert: no rows"):
        convert_rows([])
    with pytest.raises(ValueError, match="the first 1 rows cannot be read, the first because: not valid JSON"):
        load_preferences(write_lines(tmp_path / "broken.jsonl", ["{\n"]))


def test_bad_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_preferences(tmp_path / "nothing.jsonl")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_split(tmp_path / "nothing.parquet")
    (tmp_path / "rows.xml").write_text("<rows/>")
    with pytest.raises(ValueError, match=r"rows.xml: unknown format, use one of .jsonl"):
        load_preferences(tmp_path / "rows.xml")


def test_a_script_on_the_hub_is_an_error_that_says_what_to_pass(monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("Dataset scripts are no longer supported, but found webgpt_comparisons.py")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(ValueError, match='pass revision="refs/convert/parquet"'):
        load_preferences("openai/webgpt_comparisons")


def test_a_hub_id_is_loaded_with_its_options(monkeypatch):
    calls = []

    def load(*args, **kwargs):
        calls.append((args, kwargs))
        return DatasetDict({"test": Dataset.from_list(HH_ROWS)})

    monkeypatch.setattr("datasets.load_dataset", load)
    dataset, _ = load_preferences("Anthropic/hh-rlhf", split="test", data_dir="helpful-base", revision="main")
    assert len(dataset) == 2
    assert calls == [(("Anthropic/hh-rlhf", None), {"data_dir": "helpful-base", "revision": "main"})]


def test_ties_in_pairs_are_counted():
    rows = [
        {"question": {"full_text": "Why?"}, "answer_0": "a", "answer_1": "b", "score_0": s, "score_1": -s}
        for s in (0.5, 0.0, -1.0, 0.0)
    ]
    dataset, report = convert_rows(rows)
    assert [row["chosen"][0]["content"] for row in dataset] == ["a", "b"]
    assert report.dropped == {"tie": 2}


def test_tied_rankings_are_dropped_or_kept():
    rows = [
        ranking("p", ["a", "b"], [1, 2]),
        ranking("q", ["a", "b"], [2, 2]),
        ranking("r", ["a", "b", "c"], [1, 1, 2]),
    ]
    dataset, report = convert_rows(rows)
    assert dataset["prompt"][:] == ["p", "r"]
    assert report.dropped == {"tie": 1}
    dataset, report = convert_rows(rows, ties="keep")
    assert dataset.to_list() == rows
    assert not report.dropped


def test_many_rows_stream_in_order_over_batches():
    count = 2 * BATCH + PEEK + 3
    served = []

    def rows():
        for i in range(count):
            served.append(i)
            yield hh(f"{i}?", "yes", "yes" if i % 10 == 0 else "no")

    dataset, report = convert_rows(rows())
    assert served == list(range(count))
    assert [row["prompt"][0]["content"] for row in dataset] == [f"{i}?" for i in range(count) if i % 10]
    assert report.rows_read == count == report.rows_kept + report.dropped.total()


def test_the_report_is_an_aligned_table():
    _, report = convert_rows(HH_ROWS)
    assert str(report).splitlines() == [
        "hh-rlhf: 5 rows read, 2 kept (40.0%)",
        "  dropped because              rows      first  example",
        "  empty response                  2          3  rejected",
        "  chosen equals rejected          1          1  'same'",
    ]
    _, clean = convert_rows(HH_ROWS[:1])
    assert str(clean) == "hh-rlhf: 1 rows read, 1 kept (100.0%)"


def test_what_comes_out_goes_in_again():
    first, _ = convert_rows(HH_ROWS)
    second, report = convert_rows(first)
    assert report.format == "trl"
    assert second.to_list() == first.to_list()
    assert second.features == first.features


def test_the_dataset_is_what_trl_takes():
    from trl.data_utils import is_conversational, maybe_extract_prompt

    dataset, _ = convert_rows(HH_ROWS)
    assert is_conversational(dataset[0])
    assert maybe_extract_prompt(dataset[0]) == dataset[0]


TRAIN = [hh("a?", "yes", "no"), hh("a?", "perhaps", "never"), hh("b?", "yes", "no"), hh("c?", "ok", "no")]
TEST = [hh("a? ", "no", "of course"), hh("c?", "fine", "bad")]


def test_deduplication_by_response_and_by_prompt():
    train, test = convert_rows(TRAIN)[0], convert_rows(TEST)[0]
    left, report = deduplicate(train, test)
    assert left.to_list() == [train[1], train[2], train[3]]  # row 0 has "no" after "a?", as the test split
    assert report.dropped == {"response also in the test split": 1}
    left, report = deduplicate(train, test, by="prompt")
    assert left.to_list() == [train[2]]
    assert report.dropped == {"prompt also in the test split": 3}
    assert report.examples["prompt also in the test split"] == (0, "'a?'")
    assert (report.rows_read, report.rows_kept) == (4, 1)


def test_deduplication_of_rankings_and_of_a_set_against_itself():
    train, _ = convert_rows([ranking("p", ["a", "b"], [1, 2]), ranking("p", ["c", "d"], [1, 2])])
    test, _ = convert_rows([ranking("p", ["x", "b"], [1, 2]), ranking("q", ["c", "d"], [1, 2])])
    assert deduplicate(train, test)[0].to_list() == [train[1]]
    assert len(deduplicate(train, train)[0]) == 0


def test_deduplication_looks_past_the_whitespace_around_texts():
    texts = {"prompt": "a?", "chosen": "yes", "rejected": "no"}
    spaced = {"prompt": "a?\n", "chosen": " maybe", "rejected": " yes"}
    assert len(deduplicate(convert_rows([texts])[0], convert_rows([spaced])[0])[0]) == 0

    def conversation(row):
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        return {name: [{"role": roles[name], "content": row[name]}] for name in row}

    train, test = convert_rows([conversation(texts)])[0], convert_rows([conversation(spaced)])[0]
    assert len(deduplicate(train, test)[0]) == 0


def test_deduplication_refuses_what_can_never_match():
    train, test = convert_rows(TRAIN)[0], convert_rows([{"prompt": "a?", "chosen": "b", "rejected": "c"}])[0]
    with pytest.raises(ValueError, match="both have prompts that are texts, or both messages"):
        deduplicate(train, test)
    with pytest.raises(ValueError, match="by must be 'response' or 'prompt', got 'row'"):
        deduplicate(train, train, by="row")


def stripped(row):
    return [(m["role"], m["content"].strip()) for name in ("prompt", "chosen", "rejected") for m in row[name]]


def test_the_real_hh_rlhf(shared_dir):
    """Published transcripts that were converted elsewhere: accepted as they are, and as transcripts again."""
    folder = shared_dir / "data" / "hh"
    if not folder.is_dir():
        pytest.skip(f"no folder data/hh in {shared_dir.name}/")
    train, report = load_preferences(folder / "train.jsonl.gz")
    with gzip.open(folder / "train.jsonl.gz", "rt") as file:
        raw = [json.loads(line) for line in file]
    assert (report.format, report.rows_read, report.rows_kept) == ("trl", len(raw), len(raw))
    assert train.to_list() == [{name: row[name] for name in train.column_names} for row in raw]

    speaker = {"user": "Human", "assistant": "Assistant"}
    transcripts = [
        {
            name: "".join(f"\n\n{speaker[m['role']]}: {m['content']}" for m in row["prompt"] + row[name])
            for name in ("chosen", "rejected")
        }
        for row in raw
    ]
    again, report = convert_rows(transcripts)
    assert (report.format, report.rows_kept) == ("hh-rlhf", len(raw))
    assert [stripped(row) for row in again] == [stripped(row) for row in raw]

    left, report = deduplicate(train, train.select(range(100)))
    assert len(left) == len(train) - report.dropped.total() <= len(train) - 100
