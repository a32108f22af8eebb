"""Labels out, as TRL has preferences, and in, from elsewhere."""

import json

import pytest

from trl_ext.data.rows import check_preference_row
from trl_ext.feedback.exchange import Vote, count_votes, import_labels, parse_verdict, preference_rows
from trl_ext.feedback.labels import Label, LabelFile
from trl_ext.feedback.pairs import make_pair, read_pairs

CHAT = [{"role": "user", "content": "Why?"}]
ROWS = [{"prompt": f"Why {i}?", "answer_a": f"a{i}", "answer_b": f"b{i}", "topic": "sky"} for i in range(4)]
PAIRS = [make_pair(row) for row in ROWS]


def label(pair, verdict, annotator="anna"):
    return Label(pair.id, annotator, verdict, "a", "2026-01-01T00:00:00+00:00")


def test_votes_are_shares_and_mean_strengths():
    votes = count_votes([label(PAIRS[0], v) for v in ("a_much", "a", "tie", "b")])
    assert votes == {PAIRS[0].id: Vote(4, 2.5 / 4, 2 / 4)}


def test_rows_are_preferences_with_strength_and_share():
    labels = [
        *(label(PAIRS[0], v) for v in ("a_much", "a", "b")),
        label(PAIRS[1], "b_much"),
        *(label(PAIRS[2], v) for v in ("a", "b_much")),
    ]
    rows, dropped = preference_rows(PAIRS, labels, margin=0.5)
    assert rows == [
        {
            "prompt": "Why 0?", "chosen": "a0", "rejected": "b0", "strength": 2 / 3, "soft_label": pytest.approx(2 / 3),
            "votes": 3, "margin": 1 / 3, "topic": "sky",
        },
        {
            "prompt": "Why 1?", "chosen": "b1", "rejected": "a1", "strength": 2.0, "soft_label": 1.0, "votes": 1,
            "margin": 1.0, "topic": "sky",
        },
    ]  # fmt: skip
    assert dropped == {"tie": 1, "not labelled": 1}
    assert all(check_preference_row(row)["strength"] == row["strength"] for row in rows)
    assert [row["votes"] for row in preference_rows(PAIRS, labels, min_votes=2)[0]] == [3]


def test_a_conversation_stays_one():
    pair = make_pair({"prompt": CHAT, "answer_a": "x", "answer_b": "y"})
    (row,), _ = preference_rows([pair], [label(pair, "b")])
    assert row["prompt"] == CHAT
    assert row["chosen"] == [{"role": "assistant", "content": "y"}]
    assert "margin" not in row


def test_labels_of_another_set_are_refused_by_name():
    with pytest.raises(ValueError, match="labels of 'ben' belong to another set"):
        preference_rows(PAIRS[:1], [label(PAIRS[1], "a", "ben")])


@pytest.mark.parametrize(
    ("said", "strength", "verdict"),
    [
        ("a_much", None, "a_much"),
        ("B", None, "b"),
        ("A is much better", None, "a_much"),
        ("b slightly better", None, "b"),
        ("A significantly better", None, "a_much"),
        ("A is negligibly better", None, "tie"),
        ("same", None, "tie"),
        ("both bad", None, "both_bad"),
        ("b", "clear", "b_much"),
        ("b", "slight", "b"),
        ("a", 2, "a_much"),
        ("a", "unsure", "tie"),
    ],
)
def test_words(said, strength, verdict):
    assert parse_verdict(said, strength) == verdict


@pytest.mark.parametrize(("said", "strength"), [("c", None), ("a", "purple"), ("a better", "clear"), ("", None)])
def test_other_words_are_refused(said, strength):
    with pytest.raises(ValueError, match="is unknown"):
        parse_verdict(said, strength)


def test_a_csv_is_imported_in_either_order_and_nothing_is_rewritten(tmp_path):
    LabelFile(tmp_path / "labels", "ben", [p.id for p in PAIRS]).label(PAIRS[2].id, "a")
    before = (tmp_path / "labels" / "ben.jsonl").read_bytes()
    (tmp_path / "x.csv").write_text(
        "prompt,answer_a,answer_b,choice,strength,annotator\n"
        "Why 0?,a0,b0,a,clear,anna\nWhy 1?,b1,a1,a,,anna\nWhy 2?,a2,b2,b,,ben\nWhy 3?,a3,b3,tie,,ben\n"
    )
    report = import_labels(tmp_path / "x.csv", PAIRS, tmp_path / "labels")
    assert report.written == {"anna": 2, "ben": 1}
    assert report.kept == [(2, PAIRS[2].id)]
    anna = LabelFile(tmp_path / "labels", "anna", [p.id for p in PAIRS])
    assert [anna.labels[p.id].verdict for p in PAIRS[:2]] == ["a_much", "b"]
    assert (tmp_path / "labels" / "ben.jsonl").read_bytes().startswith(before)
    again = import_labels(tmp_path / "x.csv", PAIRS, tmp_path / "labels")
    assert (again.there, again.written) == (3, {})


def test_chosen_and_a_word_of_strength_are_a_label(tmp_path):
    row = {"prompt": "Why 0?", "chosen": "b0", "rejected": "a0", "strength": "clear"}
    (tmp_path / "x.jsonl").write_text(json.dumps(row) + "\n")
    import_labels(tmp_path / "x.jsonl", PAIRS, tmp_path, annotator="hh")
    assert LabelFile(tmp_path, "hh", [p.id for p in PAIRS]).labels[PAIRS[0].id].verdict == "b_much"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"pair": "0" * 16, "verdict": "a", "annotator": "x"}, "row 1: its pair, 0{16}, is not in this set"),
        ({"pair": PAIRS[0].id, "verdict": "good", "annotator": "x"}, "row 1: verdict 'good'"),
        ({"pair": PAIRS[0].id, "verdict": "a"}, "row 1: there is no column 'annotator'"),
        ({"pair": PAIRS[0].id, "annotator": "x"}, "row 1: it says nothing"),
        ({"annotator": "x", "verdict": "a"}, "row 1: it names no pair"),
        ({"pair": PAIRS[0].id, "verdict": "a", "annotator": "../x"}, "row 1: annotator='../x' is no name"),
    ],
)
def test_a_bad_row_stops_the_import_before_anything_is_written(tmp_path, row, message):
    good = {"pair": PAIRS[1].id, "verdict": "a", "annotator": "anna"}
    (tmp_path / "x.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=message):
        import_labels(tmp_path / "x.jsonl", PAIRS, tmp_path / "labels")
    assert not (tmp_path / "labels").exists()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "p", "answer_a": "x"}], "row 0: not two answers"),
        ([{"prompt": "p", "responses": ["x", "y", "z"]}], "row 0: not two answers: responses holds 3"),
        ([{"prompt": "p", "answer_a": "x", "answer_b": " x"}], "row 0: chosen equals rejected"),
        ([{"prompt": "p", "answer_a": "x", "answer_b": ""}], "row 0: empty response"),
        ([ROWS[0], {"prompt": "Why 0?", "answer_a": "b0", "answer_b": "a0"}], "row 1: the same prompt and answers as"),
        ([], "has no pairs"),
    ],
)
def test_files_that_are_no_pairs(tmp_path, rows, message):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=message):
        read_pairs(tmp_path / "p.jsonl")


def test_pairs_are_read_with_their_columns(tmp_path):
    rows = [*ROWS, {"prompt": CHAT, "responses": ["x", "y"]}]
    said = {name: [*CHAT, {"role": "assistant", "content": name[0]}] for name in ("chosen", "rejected")}
    rows.append(said)
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    pairs = read_pairs(tmp_path / "p.jsonl")
    assert pairs[:4] == PAIRS
    assert pairs[0].columns == {"topic": "sky"}
    assert [(p.prompt, p.a, p.b) for p in pairs[4:]] == [(CHAT, "x", "y"), (CHAT, "c", "r")]
