"""What the label page shows and does, and who may come in, without a browser."""

import asyncio

import pytest

from trl_ext.feedback.desk import Desk
from trl_ext.feedback.labels import LabelError, LabelFile
from trl_ext.feedback.page import BUTTONS, COOKIE, Gate, bind, is_loopback
from trl_ext.feedback.pairs import make_pair

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "?"}]
PAIRS = [make_pair({"prompt": f"q{i}", "answer_a": f"first {i}", "answer_b": f"second {i}"}) for i in range(20)]


def test_what_stands_left_is_what_is_written(tmp_path):
    desk = Desk(PAIRS, tmp_path)
    view, sides = desk.view("anna"), set()
    for choice, toward in (("left_much", 2), ("left", 1), ("tie", 0), ("right", -1), ("right_much", -2)) * 4:
        left_is_a = view.left.startswith("first")
        sides.add(left_is_a)
        pair, view = view.pair, desk.act("anna", view.pair, choice)
        label = LabelFile(tmp_path, "anna", desk.pairs).labels[pair]
        assert label.value == (toward if left_is_a else -toward)
        assert label.left == ("a" if left_is_a else "b")
    assert sides == {True, False}
    assert (view.pair, view.done) == ("", 20)
    assert view.message.startswith("Done")


def test_skipped_pairs_come_back_when_asked_for(tmp_path):
    desk = Desk(PAIRS[:3], tmp_path)
    for pair in PAIRS[:3]:
        view = desk.act("anna", pair.id, "skip")
    assert (view.pair, view.skipped) == ("", 3)
    assert "--show_skipped" in view.message
    again = Desk(PAIRS[:3], tmp_path, show_skipped=True)
    assert again.view("anna").pair == PAIRS[0].id
    assert again.act("anna", PAIRS[0].id, "skip").pair == PAIRS[1].id
    assert again.act("anna", PAIRS[1].id, "tie").skipped == 2


def test_an_undo_brings_the_pair_back_and_a_stale_one_does_nothing(tmp_path):
    desk = Desk(PAIRS, tmp_path)
    first = desk.view("anna")
    after = desk.act("anna", first.pair, "left")
    back = desk.undo("anna", after.acts)
    assert (back.pair, back.left, back.message) == (first.pair, first.left, "Undone.")
    desk.act("anna", first.pair, "right")
    assert "another window" in desk.undo("anna", after.acts).message
    assert desk.view("anna").done == 1


def test_a_second_label_of_a_pair_is_refused_and_the_next_is_shown(tmp_path):
    desk = Desk(PAIRS, tmp_path)
    desk.act("anna", PAIRS[0].id, "tie")
    view = desk.act("anna", PAIRS[0].id, "left")
    assert "has a label of anna already" in view.message
    assert (view.pair, view.done) == (PAIRS[1].id, 1)
    assert desk.view("ben").pair == PAIRS[0].id


def test_names_and_choices_are_checked(tmp_path):
    desk = Desk(PAIRS, tmp_path, annotators=["anna"])
    with pytest.raises(LabelError, match="'ben' is not among anna"):
        desk.view("ben")
    assert "choice='best' is unknown" in desk.act("anna", PAIRS[0].id, "best").message
    assert "is not in this set" in desk.act("anna", "0" * 16, "tie").message
    assert LabelFile(tmp_path, "anna", desk.pairs).acts == 0


def test_a_conversation_is_shown_with_its_turns(tmp_path):
    pair = make_pair({"prompt": CHAT, "answer_a": "x", "answer_b": "y"})
    assert Desk([pair], tmp_path).view("anna").conversation == "USER\nHi\n\nASSISTANT\nHello\n\nUSER\n?"


def test_the_rate_leaves_pauses_out(tmp_path):
    file = LabelFile(tmp_path, "anna", [pair.id for pair in PAIRS])
    for pair in PAIRS[:4]:
        file.label(pair.id, "tie")
    lines = file.path.read_text().splitlines()
    times = ("10:00:00", "10:00:30", "12:00:00", "12:00:30")
    moved = [
        line[: line.index('"time"')] + f'"time": "2026-01-01T{t}+00:00"}}' for line, t in zip(lines, times, strict=True)
    ]
    file.path.write_text("\n".join(moved) + "\n")
    view = Desk(PAIRS, tmp_path).view("anna")
    assert view.per_hour == pytest.approx(120)
    assert view.progress() == "4 of 20 labelled · 120 an hour"


def test_every_choice_has_a_key_of_its_own():
    assert len({key for _, key, _ in BUTTONS}) == len(BUTTONS) == 8


# ---------------------------------------------------------------------- the door


def knock(token, query="", **headers):
    """Status, headers and whether the page behind was reached."""
    sent, reached = [], []

    async def app(scope, receive, send):
        reached.append(True)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"page"})

    async def send(message):
        sent.append(message)

    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "headers": raw, "query_string": query.encode()}
    asyncio.run(Gate(app, token)(scope, None, send))
    return sent[0]["status"], dict(sent[0]["headers"]), bool(reached)


@pytest.mark.parametrize(
    ("host", "status"),
    [("127.0.0.1:7860", 200), ("localhost:1", 200), ("[::1]:7860", 200), ("evil.example:7860", 403), ("", 403)],
)
def test_without_a_token_only_this_machines_names_are_answered(host, status):
    assert knock(None, host=host)[0] == status


def test_a_token_opens_the_door_and_a_cookie_keeps_it_open():
    token = "t" * 20
    assert knock(token, host="127.0.0.1")[::2] == (403, False)
    assert knock(token, "token=wrong")[::2] == (403, False)
    status, headers, reached = knock(token, f"token={token}&annotator=anna")
    assert (status, reached) == (200, True)
    assert f"{COOKIE}={token}; HttpOnly; SameSite=Strict".encode() in headers[b"set-cookie"]
    assert knock(token, cookie=f"x=1; {COOKIE}={token}")[0] == 200
    assert knock(token, cookie=f"{COOKIE}=wrong")[0] == 403


def test_a_browser_may_load_nothing_from_elsewhere():
    policy = knock(None, host="localhost")[1][b"content-security-policy"].decode()
    assert "default-src 'self'" in policy
    assert "http" not in policy


def test_a_port_in_use_is_an_error():
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port={port}: .*in use"):
            bind("127.0.0.1", port)
    with pytest.raises(ValueError, match="between 0 and 65535"):
        bind("127.0.0.1", 70000)
    with pytest.raises(ValueError, match=r"host=192\.0\.2\.1"):
        bind("192.0.2.1", 0)


def test_what_is_this_machine_alone():
    assert [is_loopback(h) for h in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "192.168.1.2", "mypc")] == [
        *[True] * 3,
        *[False] * 3,
    ]
