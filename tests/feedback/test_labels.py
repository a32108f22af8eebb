"""Labels survive what happens to files and processes: nothing is lost, doubled or rewritten."""

import json
import os
import signal
import subprocess
import sys

import pytest

from trl_ext.feedback.labels import LabelError, LabelFile, blind_left, read_labels

PAIRS = [f"{i:016x}" for i in range(30)]


def test_acts_are_lines_and_an_undo_is_one_too(tmp_path):
    file = LabelFile(tmp_path, "anna", PAIRS)
    file.label(PAIRS[0], "a_much", "b")
    file.skip(PAIRS[1], "a")
    file.label(PAIRS[2], "both_bad", "a")
    assert file.undo() == PAIRS[2]
    assert file.undo() == PAIRS[1]
    assert set(file.labels) == {PAIRS[0]}
    assert not file.skipped
    lines = [json.loads(line) for line in file.path.read_text().splitlines()]
    assert [line["act"] for line in lines] == ["label", "skip", "label", "undo", "undo"]
    assert [line["pair"] for line in lines] == [PAIRS[i] for i in (0, 1, 2, 2, 1)]
    assert lines[0] | {"time": ""} == {
        "act": "label", "pair": PAIRS[0], "annotator": "anna", "verdict": "a_much", "left": "b", "time": "",
    }  # fmt: skip
    again = LabelFile(tmp_path, "anna", PAIRS)
    assert again.labels == file.labels
    assert again.acts == 5
    assert again.undo() == PAIRS[0]
    assert again.undo() is None


def test_a_pair_can_be_labelled_again_after_an_undo_only(tmp_path):
    file = LabelFile(tmp_path, "anna", PAIRS)
    file.label(PAIRS[0], "a")
    with pytest.raises(LabelError, match="undo that first"):
        file.label(PAIRS[0], "b")
    file.undo()
    file.label(PAIRS[0], "b")
    assert LabelFile(tmp_path, "anna", PAIRS).labels[PAIRS[0]].verdict == "b"


def test_a_torn_last_line_is_cut_and_said_and_the_rest_stays(tmp_path):
    file = LabelFile(tmp_path, "anna", PAIRS)
    for pair in PAIRS[:3]:
        file.label(pair, "tie")
    whole = file.path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for cut in range(len(whole)):
        file.path.write_bytes(whole[:cut])
        kept = sum(end <= cut for end in ends)
        assert len(read_labels(file.path)) == kept if kept else True
        again = LabelFile(tmp_path, "anna", PAIRS)
        assert list(again.labels) == PAIRS[:kept]
        assert again.torn == cut - ([0, *ends][kept])
        assert again.path.read_bytes() == whole[: [0, *ends][kept]]


def test_a_broken_line_before_the_last_is_an_error_and_nothing_changes(tmp_path):
    file = LabelFile(tmp_path, "anna", PAIRS)
    file.label(PAIRS[0], "tie")
    before = b'{"act": "label"}\n' + file.path.read_bytes()
    file.path.write_bytes(before)
    with pytest.raises(ValueError, match="line 1 is no label"):
        LabelFile(tmp_path, "anna", PAIRS)
    with pytest.raises(ValueError, match="line 1 is no label"):
        read_labels(tmp_path)
    assert file.path.read_bytes() == before


def test_a_file_of_another_set_is_refused_by_name(tmp_path):
    LabelFile(tmp_path, "anna", PAIRS).label(PAIRS[0], "tie")
    with pytest.raises(ValueError, match=r"anna\.jsonl, line 1: pair 0000000000000000 is not in this set"):
        LabelFile(tmp_path, "anna", PAIRS[1:])
    (tmp_path / "ben.jsonl").write_bytes((tmp_path / "anna.jsonl").read_bytes())
    with pytest.raises(ValueError, match=r"ben\.jsonl, line 1: an act of 'anna'"):
        LabelFile(tmp_path, "ben", PAIRS)


def test_two_windows_see_each_other(tmp_path):
    one, two = LabelFile(tmp_path, "anna", PAIRS), LabelFile(tmp_path, "anna", PAIRS)
    one.label(PAIRS[0], "a")
    with pytest.raises(LabelError, match="has a label"):
        two.label(PAIRS[0], "b")
    seen = two.acts
    one.label(PAIRS[1], "b")
    with pytest.raises(LabelError, match="another window"):
        two.undo(seen)
    assert two.undo(two.acts) == PAIRS[1]
    one.refresh()
    assert list(one.labels) == [PAIRS[0]]


WRITER = """
import sys
import time
from trl_ext.feedback import labels
from trl_ext.feedback.labels import LabelError, LabelFile
told = labels.now
labels.now = lambda: time.sleep(0.005) or told()  # between reading what others wrote and writing: only a lock helps
pairs = [f"{i:016x}" for i in range(30)]
file = LabelFile(sys.argv[1], "anna", pairs)
print("ready", flush=True)
sys.stdin.readline()
for pair in pairs:
    try:
        file.label(pair, "a")
        print(pair, flush=True)
    except LabelError:
        pass
"""


def start_writers(folder, count):
    """Processes that label the same pairs in the same order, all at once."""
    command = [sys.executable, "-c", WRITER, str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    writers = [subprocess.Popen(command, **pipes) for _ in range(count)]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    return writers


def test_three_processes_of_one_annotator_label_every_pair_once(tmp_path):
    said = [line for writer in start_writers(tmp_path, 3) for line in writer.communicate()[0].split()]
    assert sorted(said) == PAIRS
    lines = (tmp_path / "anna.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["pair"] for line in lines) == PAIRS


def test_what_was_confirmed_before_kill_9_is_there(tmp_path):
    (writer,) = start_writers(tmp_path, 1)
    said = [writer.stdout.readline().strip() for _ in range(5)]
    os.kill(writer.pid, signal.SIGKILL)
    said += writer.communicate()[0].split()
    file = LabelFile(tmp_path, "anna", PAIRS)
    assert set(said) <= set(file.labels)
    assert len(file.labels) - len(said) <= 1  # one may be written and not said


@pytest.mark.parametrize("name", ["", "..", "a/b", "a b", ".hidden", "x" * 65, None])
def test_names_that_are_no_file_names_are_refused(tmp_path, name):
    with pytest.raises(LabelError, match="is no name"):
        LabelFile(tmp_path, name, PAIRS)


@pytest.mark.parametrize(
    ("act", "message"),
    [(("x", "a", "a"), "not in this set"), ((PAIRS[0], "best", "a"), "best"), ((PAIRS[0], "a", "right"), "right")],
)
def test_bad_acts_write_nothing(tmp_path, act, message):
    file = LabelFile(tmp_path, "anna", PAIRS)
    with pytest.raises(LabelError, match=message):
        file.label(*act)
    assert file.path.read_bytes() == b""


def test_the_side_is_fair_and_depends_on_annotator_pair_and_seed_alone():
    sides = [blind_left(f"{i:016x}", "anna") for i in range(1000)]
    assert 420 < sides.count("a") < 580
    assert sides == [blind_left(f"{i:016x}", "anna") for i in range(1000)]
    for other in (("ben", 0), ("anna", 1)):
        equal = sum(blind_left(f"{i:016x}", *other) == side for i, side in enumerate(sides))
        assert 420 < equal < 580
