"""The label page in Debian's chromium: keys, undo, reload, two windows, a server killed in between."""

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager

import pytest

from trl_ext.feedback.labels import LabelFile
from trl_ext.feedback.page import BUTTONS
from trl_ext.feedback.pairs import read_pairs

pytestmark = pytest.mark.browser
CHROMIUM = "/usr/bin/chromium"
KEYS = {name: key for name, key, _ in BUTTONS}
TOWARD = {"left_much": 2, "left": 1, "tie": 0, "right": -1, "right_much": -2, "both_bad": 0}
SCRIPT = "<script>window.hacked = 1; document.title = 'hacked'</script><img src=x onerror='window.hacked = 2'>"
SERVE = """
import sys
from trl_ext.feedback.desk import Desk
from trl_ext.feedback.page import CRITERIA, serve
from trl_ext.feedback.pairs import read_pairs
serve(Desk(read_pairs(sys.argv[1]), sys.argv[2]), CRITERIA.read_text(), port=int(sys.argv[3]))
"""
QUESTION = "Why is the sky blue, in one sentence?"
ANSWERS = (
    "Air scatters blue light more than red, so blue reaches your eyes from every part of the sky.",
    "It is blue because it reflects the sea, which everybody knows is blue.",
)


class Server:
    """The page in a process of its own, on one port, over and over."""

    def __init__(self, pairs, labels):
        self.pairs, self.labels = pairs, labels
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        self.process = None

    def start(self):
        command = [sys.executable, "-c", SERVE, str(self.pairs), str(self.labels), str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        lines = []
        while not lines or "label page" not in lines[-1]:
            lines.append(self.process.stdout.readline())
            assert lines[-1], "the server ended"
        return lines

    def kill(self):
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()


@contextmanager
def server_of(pairs, labels):
    server = Server(pairs, labels)
    try:
        yield server
    finally:
        if server.process is not None and server.process.poll() is None:
            server.kill()


class Window:
    """A page of the browser, as its user sees it."""

    def __init__(self, page, outside):
        self.page = page
        page.set_default_timeout(60_000)
        page.on("response", lambda response: outside.append(response.url))

    def text(self, name):
        return self.page.locator(f"#{name} textarea, #{name} input").first.input_value()

    def wait(self, name, before):
        self.page.wait_for_function(
            "([name, before]) => (document.querySelector(`#${name} textarea, #${name} input`) || {}).value !== before",
            arg=[name, before],
        )

    def press(self, name):
        acts = self.text("acts")
        self.page.keyboard.press(KEYS[name])
        self.wait("acts", acts)

    def open(self, url):
        self.page.goto(url)
        self.page.wait_for_selector("#progress textarea, #progress input")
        self.wait("acts", "")


def test_twenty_labels_by_keyboard_and_none_is_lost_or_doubled(tmp_path):
    from playwright.sync_api import sync_playwright

    rows = [
        {
            "prompt": [{"role": "user", "content": f"{QUESTION} ({i})"}],
            "answer_a": f"{ANSWERS[0]} ({i})" if i % 3 else f"{SCRIPT} ({i})",
            "answer_b": f"{ANSWERS[1]} ({i})",
        }
        for i in range(25)
    ]
    path, labels = tmp_path / "pairs.jsonl", tmp_path / "labels"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = {pair.id: pair for pair in read_pairs(path)}
    expected, outside = {}, []
    choices = list(TOWARD)

    with server_of(path, labels) as server, sync_playwright() as playwright:
        server.start()
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": 1280, "height": 720})
        window = Window(context.new_page(), outside)

        def label(at=window):
            pair, left = pairs[at.text("shown")], at.text("left")
            assert {left, at.text("right")} == {pair.a, pair.b}
            choice = choices[len(expected) % len(choices)]
            assert pair.id not in expected
            at.press(choice)
            expected[pair.id] = TOWARD[choice] if left == pair.a else -TOWARD[choice]

        # A name, then keys; a script in an answer is text
        window.page.goto(server.url)
        window.page.locator("#who textarea, #who input").first.fill("anna")
        window.page.click("#begin")
        window.page.wait_for_selector("#progress textarea, #progress input")
        assert SCRIPT in window.text("left") + window.text("right")
        for _ in range(8):
            label()
        assert window.text("progress").startswith("8 of 25 labelled")
        window.page.screenshot(path=str(tmp_path / "page.png"))

        # Undo shows the pair again
        last = list(expected)[-1]
        window.press("undo")
        assert window.text("shown") == last
        del expected[last]
        label()

        # A reload changes nothing
        before = [window.text(name) for name in ("shown", "left", "right", "acts")]
        window.open(window.page.url)
        assert [window.text(name) for name in ("shown", "left", "right", "acts")] == before

        # Two windows of one annotator: the second label of a pair is refused
        other = Window(context.new_page(), outside)
        other.open(server.url + "?annotator=anna")
        assert other.text("shown") == window.text("shown")
        label()
        other.press("tie")
        assert "has a label of anna already" in other.text("message")
        label(other)

        # Killed in between: what was shown is still open, what was labelled is there
        window.open(server.url + "?annotator=anna")
        open_pair = window.text("shown")
        server.kill()
        window.page.keyboard.press(KEYS["left"])
        window.page.wait_for_timeout(500)
        server.start()
        window.open(server.url + "?annotator=anna")
        assert window.text("shown") == open_pair
        while len(expected) < 20:
            label()
        assert window.text("progress").startswith("20 of 25 labelled")
        assert window.page.evaluate("window.hacked") is None
        assert window.page.title() != "hacked"
        browser.close()

    file = LabelFile(labels, "anna", pairs)
    assert {pair: label.value for pair, label in file.labels.items()} == expected
    assert file.acts == 20 + 2  # one was undone and given again
    assert [url for url in outside if not url.startswith((server.url, "data:", "blob:"))] == []


SERVE_UNTIL = """
import sys
from pathlib import Path
from trl_ext.feedback.pairs import read_pairs
from trl_ext.scripts.judging import wait_for_people
wait_for_people(read_pairs(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), 0)
print("all said", flush=True)
"""


def test_who_waits_for_people_goes_on_when_each_pair_has_a_label_or_was_skipped(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"q{i}", "answer_a": "a", "answer_b": "b"} for i in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [pair.id for pair in read_pairs(path)]
    command = [sys.executable, "-c", SERVE_UNTIL, str(path), str(tmp_path / "labels"), "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert "3 pairs wait" in process.stdout.readline()
    assert "label page" in process.stdout.readline()
    anna, ben = (LabelFile(tmp_path / "labels", name, pairs) for name in ("anna", "ben"))
    anna.label(pairs[0], "a")
    ben.label(pairs[1], "b")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(3)
    anna.skip(pairs[2])
    assert "all said" in process.communicate(timeout=30)[0]
    assert process.returncode == 0
