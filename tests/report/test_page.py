"""The page about a run: whole, small, one file, with every text shown as text; and what it says of broken runs."""

import json
import re
from html.parser import HTMLParser

import pytest

from tests.report.made import HOSTILE, write_run
from trl_ext.report.curves import POINTS, short, thin
from trl_ext.report.intervals import changes, compare
from trl_ext.report.loading import load_run
from trl_ext.report.page import render, write_page
from trl_ext.scripts.report import main

VOID = {"meta", "br", "img", "link", "input", "path", "use", "circle", "rect"}


class Reader(HTMLParser):
    """Texts of a page, its elements and their attributes; every element that is opened is closed."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.texts, self.elements, self.open, self.attributes = [], [], [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "a-run")


@pytest.fixture(scope="module")
def page(folder):
    return render([load_run(folder)])


def test_the_page_has_every_part(page):
    reader = Reader(page)
    text = " ".join(" ".join(reader.texts).split())
    ids = [value for name, value in reader.attributes if name == "id"]
    assert {"curves", "frontier", "change", "samples", "configuration", "run"} <= set(ids)
    assert len(ids) == len(set(ids))
    for title in ("Reward", "KL from the reference", "Beta", "Entropy", "Length", "Perplexity", "Explained variance"):
        assert title in reader.texts
    assert {"Seconds by phase", "Memory"} <= set(reader.texts)
    assert "kl_high" in text
    assert "raise beta" in text
    assert "95 % interval" in text
    assert "40 of 40 held-out prompts" in text
    assert reader.elements.count("svg") == text.count("Healthy:") + 2 + 1  # two curves have no range; one is of the KL


def test_nothing_is_loaded_and_no_script_is_there(page):
    reader = Reader(page)
    assert not {"script", "link", "iframe", "img", "object", "form"} & set(reader.elements)
    links = [value for name, value in reader.attributes if name in ("href", "src", "xlink:href")]
    assert links
    assert all(value.startswith("#") for value in links)
    targets = {f"#{value}" for name, value in reader.attributes if name == "id"}
    assert set(links) <= targets
    assert not re.search(r"url\((?!#)", page)
    assert not [name for name, _ in reader.attributes if name.startswith("on")]
    assert "default-src 'none'" in page


def test_hostile_texts_are_texts(tmp_path):
    page = render([load_run(write_run(tmp_path / "run<b>&", hostile=True))])
    reader = Reader(page)
    assert "script" not in reader.elements
    shown = HOSTILE.replace("\x00", "\u2400").replace("\u202e", "[U+202E]")
    texts = "".join(reader.texts)
    assert texts.count(shown) >= 4  # prompt, answers, command, identity
    assert "run<b>&" in texts
    assert not set("\x00\u202e") & set(page)


def test_a_run_of_two_thousand_steps_is_below_three_megabytes_and_says_that_curves_are_thinned(tmp_path):
    folder = write_run(tmp_path / "long", steps=2000, prompts=256)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines[:200]:
        line.pop("policy_loss", None)  # as while the critic warms up: that curve has fewer values
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = write_page([folder], tmp_path / "report.html")
    assert path.stat().st_size < 3 * 2**20
    assert path.read_text().count(f"Of more than {POINTS} logged values {POINTS} means are drawn") == 1


def test_a_curve_is_thinned_to_means_between_the_smallest_and_the_largest():
    points = [(i, float(i % 7)) for i in range(1000)]
    steps, means, low, high = thin(points, most=100)
    assert len(steps) == 100
    assert steps[0] == 4.5
    assert means[0] == sum(i % 7 for i in range(10)) / 10
    assert (low[0], high[0]) == (0.0, 6.0)
    assert list(thin(points[:50], most=100)[1]) == [value for _, value in points[:50]]


def test_runs_are_compared(tmp_path, folder):
    other = write_run(tmp_path / "b-run", steps=120, seed=3)
    page = render([load_run(folder), load_run(other)])
    text = " ".join(" ".join(Reader(page).texts).split())
    assert "2 runs compared" in text
    assert "a-run: policy" in text
    assert "b-run: policy" in text
    assert "Options in which the runs differ" in text
    assert "40 prompts that every run was evaluated on" in text


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("run.json", "run.json is missing"),
        ("samples.jsonl", "samples.jsonl is missing. There are no samples"),
        ("metrics.jsonl", "metrics.jsonl is missing. There are no curves"),
    ],
)
def test_what_is_missing_is_said(tmp_path, broken, said):
    folder = write_run(tmp_path / "run", steps=20)
    (folder / broken).unlink()
    assert said in "".join(Reader(render([load_run(folder)])).texts)


def test_a_torn_line_is_left_out_and_said(tmp_path):
    folder = write_run(tmp_path / "run", steps=20)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "rew')
    (folder / "run.json").write_text('{"method": ')
    text = "".join(Reader(render([load_run(folder)])).texts)
    assert "metrics.jsonl: 1 broken line left out (21)." in text
    assert "run.json cannot be read" in text


def test_a_run_that_goes_on_is_said_to(tmp_path):
    folder = write_run(tmp_path / "run", steps=20)
    info = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(info | {"outcome": "running", "ended": None}))
    assert "it is going on, or it was killed" in "".join(Reader(render([load_run(folder)])).texts)


def test_the_command_writes_where_it_says(tmp_path, folder, capsys):
    main([str(folder)])
    assert str(folder / "report.html") in capsys.readouterr().out
    main([str(folder), str(write_run(tmp_path / "b", steps=30)), "--output", str(tmp_path / "two.html")])
    assert (tmp_path / "two.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere: there is no such folder"),
        (["."], "no training has been written down there"),
        (["run", "run"], "named twice"),
        (["run", "--output", "no/such/folder.html"], "--output no/such/folder.html"),
        (["run"] * 7, "7 runs: a report is of 1 to 6"),
    ],
)
def test_what_the_command_cannot_do_it_says_in_a_line(tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run", steps=20)
    with pytest.raises(SystemExit, match=re.escape(said)):
        main(arguments)


def test_files_of_a_later_version_are_refused(tmp_path):
    folder = write_run(tmp_path / "run", steps=20)
    (folder / "run.json").write_text('{"format": 2}')
    with pytest.raises(ValueError, match="install a newer trl_ext"):
        load_run(folder)


def test_the_interval_of_a_change_is_paired():
    before = [float(i) for i in range(50)]
    after = [value + 1 + 0.01 * (i % 3) for i, value in enumerate(before)]
    change = compare("reward", before, after)
    assert change.change == pytest.approx(1.0098)
    assert 1.007 < change.interval[0] < change.change < change.interval[1] < 1.013  # unpaired it would be +-6
    assert change.before_interval[0] < 24.5 < change.before_interval[1]
    assert compare("reward", before, after) == change


def test_the_interval_has_the_size_that_theory_gives():
    before, after = [0.0] * 400, [float(i % 2) for i in range(400)]
    low, high = compare("share", before, after).interval
    assert (low, high) == (pytest.approx(0.5 - 1.96 * 0.025, abs=0.005), pytest.approx(0.5 + 1.96 * 0.025, abs=0.005))


def test_few_prompts_have_no_interval_and_perplexity_is_that_of_the_tokens():
    before = {str(i): {"reward": 1.0, "nll": 2.0 * (i + 1), "tokens": i + 1} for i in range(3)}
    after = {str(i): {"reward": 2.0, "nll": 1.0 * (i + 1), "tokens": i + 1} for i in (2, 1, 0)}
    found = {change.name: change for change in changes(before, after)}
    assert found["reward"].interval is None
    assert found["perplexity under the policy"].before == pytest.approx(7.389056)
    assert found["perplexity under the policy"].after == pytest.approx(2.718282)


def test_numbers_are_short():
    numbers = (0, 0.25, 12345.6, 3e-5, -0.5, 1e9)
    assert [short(value) for value in numbers] == ["0", "0.25", "12,346", "3e-5", "-0.5", "1e9"]


def test_the_page_of_a_reward_model_has_the_table_of_its_evaluation(tmp_path):
    folder = write_run(tmp_path / "rm", steps=6, prompts=2)
    (folder / "samples.jsonl").unlink()
    info = json.loads((folder / "run.json").read_text()) | {"method": "Reward"}
    (folder / "run.json").write_text(json.dumps(info))
    assert "No evaluation of test pairs was written down." in render([load_run(folder)])
    rows = [["accuracy", "0.712 ± 0.010"], [HOSTILE, "1"], "no row", ["one"]]
    (folder / "run.json").write_text(json.dumps(info | {"evaluation": rows}))
    reader = Reader(render([load_run(folder)]))
    text = " ".join(" ".join(reader.texts).split())
    assert "accuracy 0.712 ± 0.010" in text
    assert "{{ 7*7 }}" in text
    assert "On test pairs, after training." in text
    assert "Evaluation" in reader.texts
    assert "Before and after" not in reader.texts
