"""Prompts, preferences, rankings and texts as people have them: refused by file and row, or taken as they are."""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from datasets import Dataset

from tests.attack.clear import problem_of, refused
from tests.ppo import tiny
from trl_ext import PPOMaxConfig, RewardModelConfig
from trl_ext.data import load_preferences
from trl_ext.ppo.data import PTXBatches, check_inputs
from trl_ext.reward.data import tokenize_preferences
from trl_ext.rrhf import load_responses
from trl_ext.rrhf.data import encode_dataset
from trl_ext.scripts.inputs import load_prompts
from trl_ext.text import TextEncoder

pytestmark = pytest.mark.slow

NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def lines(*rows: Any) -> bytes:
    return "\n".join(map(json.dumps, rows)).encode()


def prompt_rows(*prompts: Any) -> bytes:
    return lines(*[{"prompt": prompt} for prompt in prompts])


def said(content: Any, role: Any = "user") -> dict[str, Any]:
    return {"role": role, "content": content}


def answer(content: Any) -> list[dict[str, Any]]:
    return [said(content, "assistant")]


def encoder() -> TextEncoder:
    return TextEncoder(tiny.tiny_tokenizer())


# ---------------------------------------------------------------------- files

BROKEN = {
    "empty": b"",
    "blank": b" \n\n",
    "torn": b'{"prompt": "w1"',
    "torn second line": b'{"prompt": "w1"}\n{"prompt": "w',
    "latin-1": '{"prompt": "é"}'.encode("latin-1"),
    "utf-16": '{"prompt": "w1"}'.encode("utf-16"),
    "zeros": b"\x00" * 40,
    "a line of zeros": b'{"prompt": "w1"}\n\x00\x00\x00\n',
    "a number": b"3",
    "null": b"null",
    "nulls": b"null\nnull\n",
    "a text": b'"abc"',
    "an empty list": b"[]",
    "an empty object": b"{}",
    "a list that is open": b'[{"prompt": "w1"}',
    "a wrong escape": b'{"prompt": "\\q"}',
    "commas": b'{"prompt": "w1"},\n{"prompt": "w2"}',
    "single quotes": b"{'prompt': 'w1'}",
    "a table": b"prompt,x\nw1,2\n",
    "half a character": b'{"prompt": "w1 \\ud800"}',
    "a column twice": b'{"prompt": "w1", "prompt": "w2"}',
}
BAD_PROMPTS = {
    "number": prompt_rows(3),
    "float": prompt_rows(1.5),
    "bool": prompt_rows(True),
    "nan": b'{"prompt": NaN}',
    "none": prompt_rows(None),
    "one none": prompt_rows("w1", None),
    "a number among texts": prompt_rows("w1", 3),
    "texts and conversations": prompt_rows("w1", [said("w2")]),
    "object": prompt_rows({"a": 1}),
    "list of texts": prompt_rows(["w1", "w2"]),
    "one text in a list": prompt_rows(["w1"]),
    "nested conversation": prompt_rows([[said("w1")]]),
    "blank": prompt_rows("w1", " "),
    "empty": prompt_rows(""),
    "no messages": prompt_rows([]),
    "no role": prompt_rows([{"content": "w1"}]),
    "no content": prompt_rows([{"role": "user"}]),
    "role none": prompt_rows([said("w1", None)]),
    "role number": prompt_rows([said("w1", 3)]),
    "content number": prompt_rows([said(3)]),
    "content none": prompt_rows([said(None)]),
    "content empty": prompt_rows([said("")]),
    "content blank": prompt_rows([said("  ")]),
    "content object": prompt_rows([said({"a": 1})]),
    "content empty list": prompt_rows([said([])]),
    "another column": lines({"prompts": "w1"}),
    "question": lines({"question": "w1"}),
    "nothing like it": lines({"a": 1, "b": 2}),
    "a row without it": lines({"prompt": "w1"}, {"other": "w"}),
    "longer than the model": prompt_rows("w1 " * 500),
    "as long as the model": prompt_rows("w1 " * 64),
}
GOOD_PROMPTS = {
    "a mark of the byte order": b'\xef\xbb\xbf{"prompt": "w1"}',
    "control characters": prompt_rows("w1 \x00\x07\x1b[31m"),
    "brackets": prompt_rows("[INST] w1 [/INST] x[i] [/b]"),
    "right to left": prompt_rows("\u202ew1 \u200b"),
    "special tokens": prompt_rows("<eos> <pad>"),
    "a role of its own": prompt_rows([said("w1", "narrator")]),
    "a conversation that ends in an answer": prompt_rows([said("w1"), said("w2", "assistant")]),
    "more columns": lines({"prompt": "w1", "label": None, "x": [1, 2]}),
    "one line without a break": prompt_rows("w1"),
    "Windows": prompt_rows("w1", "w2").replace(b"\n", b"\r\n"),
}
FILES = {
    "x.jsonl.gz": gzip.compress(prompt_rows("w1") * 50)[:-12],
    "plain.jsonl.gz": prompt_rows("w1"),
    "empty.parquet": b"",
    "junk.parquet": b"x" * 100,
    "other.csv": b"a,b\n1,2\n",
    "ragged.csv": b"prompt\nw1\nw2,w3,w4\n",
    "lines.txt": b"w1\nw2\n",
    "page.xml": b"<a/>",
    "torn.json": b'[{"prompt": "w1"}',
    "columns.json": b'{"prompt": ["w1", "w2"]}',
    "nosuffix": prompt_rows("w1"),
}


def read_prompts(path: Path | str) -> Dataset:
    """As recipes do before they look for a model."""
    recipe = SimpleNamespace(dataset_name=str(path), dataset_train_split="train", dataset_config=None)
    recipe.dataset_test_split = recipe.dataset_test_name = None
    args = PPOMaxConfig("unused", use_cpu=True, bf16=False, per_device_train_batch_size=1, max_completion_length=8)
    train, test = load_prompts(recipe)
    check_inputs(args, encoder(), 64, train, test, None, scored=True)
    return train


def written(folder: Path, content: bytes, name: str = "x[1].jsonl") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("reads", [read_prompts, load_preferences, load_responses], ids=lambda reads: reads.__name__)
def test_a_broken_file_is_named(reads, content: bytes, tmp_path: Path) -> None:
    path = written(tmp_path, content)
    with pytest.raises((ValueError, TypeError)) as found:
        reads(path)
    # rows that cannot be read are counted by `load_preferences`, which need not know the file
    names = [] if reads is load_preferences else [path.name]
    assert problem_of(found.value, names, remedy=reads is not load_preferences) is None


@pytest.mark.parametrize("content", BAD_PROMPTS.values(), ids=BAD_PROMPTS)
def test_rows_that_are_no_prompts_are_refused(content: bytes, tmp_path: Path) -> None:
    refused(lambda: read_prompts(written(tmp_path, content)), "prompt")


def test_a_template_that_cannot_render_a_row_shows_it(tmp_path: Path) -> None:
    path = written(tmp_path, prompt_rows([said([{"type": "text", "text": "w1"}])]))
    refused(lambda: read_prompts(path), "chat template", "'text': 'w1'")


@pytest.mark.parametrize("content", GOOD_PROMPTS.values(), ids=GOOD_PROMPTS)
def test_odd_prompts_are_taken_as_they_are(content: bytes, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in content.decode("utf-8-sig").splitlines()]
    found = read_prompts(written(tmp_path, content, "UPPER x[1].JSONL"))
    assert found["prompt"][:] == [row["prompt"] for row in rows]


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_kind_is_named(name: str, tmp_path: Path) -> None:
    refused(lambda: read_prompts(written(tmp_path, FILES[name], name)), name)


def test_folders_and_names_that_are_no_dataset(tmp_path: Path) -> None:
    for name, files in {
        "empty": {},
        "notes": {"a.md": b"x"},
        "torn": {"train.jsonl": b'{"prompt": "w1"'},
        "saved": {"dataset_info.json": b"{"},
        "half": {"dataset_info.json": b"{}", "state.json": b"{}"},
        "splits": {"dataset_dict.json": b'{"splits": ["train"]}'},
    }.items():
        (tmp_path / name).mkdir()
        for file, content in files.items():
            written(tmp_path / name, content, file)
        refused(lambda name=name: read_prompts(tmp_path / name), name)
    for name in ("nowhere/at_all", "nowhere.jsonl", "a b c//d", "/no/such/folder", "../x", "a/b/c"):
        refused(lambda name=name: read_prompts(name), name.split("/")[-1])


# ---------------------------------------------------------------------- rows


def pair(**changes: Any) -> dict[str, Any]:
    return {"prompt": "w1", "chosen": " w2", "rejected": " w3"} | changes


def chat(**changes: Any) -> dict[str, Any]:
    return {"prompt": [said("w1")], "chosen": answer("w2"), "rejected": answer("w3")} | changes


def ranking(**changes: Any) -> dict[str, Any]:
    return {"prompt": "w1", "responses": [" w2", " w3"], "scores": [1.0, 2.0]} | changes


BAD_PAIRS = {
    "chosen none": pair(chosen=None),
    "numbers": pair(chosen=3, rejected=4),
    "bools": pair(chosen=True, rejected=False),
    "objects": pair(chosen={"a": 1}, rejected={"a": 2}),
    "equal": pair(rejected=" w2"),
    "empty": pair(chosen=""),
    "blank": pair(chosen=" ", rejected="  "),
    "prompt empty": pair(prompt=""),
    "prompt number": pair(prompt=3),
    "prompt is a conversation": pair(prompt=[said("w1")]),
    "answers are messages": pair(chosen=answer("w2"), rejected=answer("w3")),
    "content none": chat(chosen=answer(None)),
    "content number": chat(prompt=[said(1)], chosen=answer(2), rejected=answer(3)),
    "content list": chat(prompt=[said([{"type": "text", "text": "w"}])]),
    "no role": chat(chosen=[{"content": "w2"}], rejected=[{"content": "w3"}]),
    "no messages": chat(chosen=[], rejected=[]),
    "a user answers": chat(chosen=[said("w2")], rejected=[said("w3")]),
    "another role": chat(prompt=[said("w1", "narrator")]),
    "other columns": {"prompt": "w1", "winner": "w2", "loser": "w3"},
    "completions": {"prompt": "w1", "completions": ["w2"]},
    "label": {"prompt": "w1", "completion": "w2", "label": True},
    "too long": pair(chosen=" w2" * 100),
    "margin nan": pair(margin=NAN),
    "margin infinite": pair(margin=INF),
    "margin text": pair(margin="x"),
    "margin none": pair(margin=None),
}
BAD_RANKINGS = {
    "score nan": ranking(scores=[NAN, 1.0]),
    "score infinite": ranking(scores=[INF, 1.0]),
    "score none": ranking(scores=[None, 1.0]),
    "scores texts": ranking(scores=["a", "b"]),
    "scores digits": ranking(scores=["1", "2"]),
    "scores bools": ranking(scores=[True, False]),
    "scores one number": ranking(scores=1.0),
    "scores none": ranking(scores=None),
    "too few scores": ranking(scores=[1.0]),
    "too many scores": ranking(scores=[1.0, 2.0, 3.0]),
    "one response": ranking(responses=["w"], scores=[1.0]),
    "no responses": ranking(responses=[], scores=[]),
    "responses none": ranking(responses=None),
    "responses one text": ranking(responses="w2"),
    "responses numbers": ranking(responses=[1, 2]),
    "one response none": ranking(responses=["w2", None]),
    "responses empty": ranking(responses=["", ""]),
    "responses objects": ranking(responses=[{"a": "b"}, {"a": "c"}]),
    "responses lists": ranking(responses=[["w2"], ["w3"]]),
    "responses messages": ranking(responses=[answer("w2"), answer("w3")]),
    "prompt none": ranking(prompt=None),
    "prompt number": ranking(prompt=4),
    "prompt blank": ranking(prompt=" "),
    "prompt too long": ranking(prompt="w1 " * 100),
    "other columns": {"prompt": "w1", "completions": ["w2", "w3"], "rewards": [1.0, 2.0]},
}
BAD_TRUNCATED = {
    "too few": ranking(truncated=[True]),
    "texts": ranking(truncated=["yes", "no"]),
    "a text": ranking(truncated="no"),
    "numbers": ranking(truncated=[0, 1]),
}
BAD_TEXTS = {
    "none": {"text": None},
    "number": {"text": 3},
    "empty": {"text": ""},
    "list": {"text": ["a"]},
    "no messages": {"messages": []},
    "messages a text": {"messages": "w1"},
    "no role": {"messages": [{"content": "w1"}]},
    "no content": {"messages": [said(None)]},
    "prompt only": {"prompt": "w1"},
    "completion none": {"prompt": "w1", "completion": None},
    "completion number": {"prompt": "w1", "completion": 3},
    "completion messages": {"prompt": "w1", "completion": answer("w2")},
    "prompt none": {"prompt": None, "completion": "w2"},
    "prompt number": {"prompt": 3, "completion": "w2"},
}


def tokenize(row: dict[str, Any]) -> None:
    args = RewardModelConfig("x", use_cpu=True, report_to="none", disable_tqdm=True)
    tokenize_preferences(Dataset.from_list([row]), encoder(), args, "train_dataset", 64)


def encode(row: dict[str, Any]) -> None:
    encode_dataset(Dataset.from_list([row]), "train_dataset", encoder(), max_length=64)


@pytest.mark.parametrize("row", BAD_PAIRS.values(), ids=BAD_PAIRS)
def test_what_is_no_pair_is_not_trained_on(row: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)) as found:
        tokenize(row)
    assert problem_of(found.value, ["train_dataset"], remedy=False) is None  # a table of reasons, row by row


@pytest.mark.parametrize("row", BAD_PAIRS.values(), ids=BAD_PAIRS)
def test_what_is_no_pair_is_not_converted(row: dict[str, Any], tmp_path: Path) -> None:
    path = written(tmp_path, lines(row))
    if row.get("margin") == "x" or "w2 w2" in str(row.get("chosen")):
        load_preferences(path)  # a strength in words is left out and counted; lengths are known with a tokenizer
        return
    with pytest.raises(ValueError) as found:
        load_preferences(path)
    assert problem_of(found.value, remedy=False) is None


@pytest.mark.parametrize("row", BAD_RANKINGS.values(), ids=BAD_RANKINGS)
def test_what_is_no_ranking_is_not_trained_on(row: dict[str, Any]) -> None:
    refused(lambda: encode(row), "train_dataset")
    with pytest.raises((ValueError, TypeError)) as found:
        tokenize(row)
    assert problem_of(found.value, ["train_dataset"], remedy=False) is None


@pytest.mark.parametrize("row", BAD_TRUNCATED.values(), ids=BAD_TRUNCATED)
def test_marks_of_cut_responses_are_bools(row: dict[str, Any]) -> None:
    refused(lambda: encode(row), "truncated")


@pytest.mark.parametrize("row", BAD_TEXTS.values(), ids=BAD_TEXTS)
def test_what_is_no_text_is_not_trained_on(row: dict[str, Any]) -> None:
    rows = Dataset.from_list([row])
    refused(lambda: PTXBatches(rows, encoder(), batch_size=1, max_length=16, seed=0), "ptx_dataset")
