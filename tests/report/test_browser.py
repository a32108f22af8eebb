"""The report in a real browser: nothing is complained of, everything is seen, by day and by night."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.report.made import write_run
from trl_ext.report.page import write_page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None, reason="there is no chromium, chromium-browser or google-chrome"),
]
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-dev-shm-usage",
    "--allow-file-access-from-files",  # the frame below reads the report
    "--enable-logging=stderr",
    "--window-size=1240,2000",
]
# A page around the report, which measures what is to be seen of it
AROUND = """<!DOCTYPE html><title>around</title><iframe src="report.html" width="WIDTH" height="2000"></iframe>
<script>
onload = () => {
  const page = document.querySelector("iframe").contentDocument;
  const size = (e) => { const box = e.getBoundingClientRect(); return [box.width, box.height]; };
  const all = (selector) => [...page.querySelectorAll(selector)];
  const out = document.createElement("pre");
  out.textContent = "RESULT" + JSON.stringify({
    title: page.title,
    sections: Object.fromEntries(all("section").map((e) => [e.id, size(e)])),
    pictures: all("svg").map(size),
    ground: getComputedStyle(page.body).backgroundColor,
    ink: getComputedStyle(page.body).color,
    labels: getComputedStyle(page.querySelector("svg text")).fill,
    curve: getComputedStyle(page.querySelector("svg [style*='--s1']")).stroke,
    width: page.documentElement.scrollWidth,
    text: page.body.innerText,
  }) + "END";
  document.body.append(out);
};
</script>"""


def seen(folder: Path, *flags: str, width: int = 1240) -> dict:
    """What a browser shows of `report.html` in a folder; that it complains of nothing is checked."""
    (folder / "around.html").write_text(AROUND.replace("WIDTH", str(width)))
    command = [str(BROWSER), *FLAGS, *flags, f"--user-data-dir={folder / 'browser'}", "--dump-dom"]
    done = subprocess.run(
        [*command, (folder / "around.html").as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    found = re.search(r"<pre>RESULT(.*)END</pre>", done.stdout, re.DOTALL)
    assert found
    return json.loads(re.sub("&(lt|gt|amp);", lambda m: {"lt": "<", "gt": ">", "amp": "&"}[m[1]], found[1]))


def brightness(color: str) -> float:
    return sum(map(int, re.findall(r"\d+", color)[:3])) / 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_page([write_run(folder / "run", hostile=True)], folder / "report.html")
    return folder


def test_every_part_is_seen_and_no_text_has_become_a_script(folder):
    page = seen(folder)
    assert page["title"] == "run: report"
    assert {"curves", "frontier", "change", "samples", "configuration", "run"} <= set(page["sections"])
    assert all(width > 600 and height > 60 for width, height in page["sections"].values())
    assert len(page["pictures"]) > 15
    assert all(width > 200 and height > 100 for width, height in page["pictures"])
    assert page["width"] <= 1240
    assert "<script>document.title='taken'</script>" in page["text"]
    assert "[INST]" in page["text"]
    assert "onerror=alert(1)" in page["text"]


def test_by_night_the_page_and_its_pictures_are_dark(folder):
    day, night = seen(folder), seen(folder, "--blink-settings=preferredColorScheme=0")
    for page, bright in ((day, True), (night, False)):
        assert (brightness(page["ground"]) > 200) == bright
        assert (brightness(page["ink"]) < 100) == bright
        assert (brightness(page["labels"]) < 100) == bright
    assert day["curve"] != night["curve"]


def test_on_a_telephone_nothing_has_to_be_scrolled_sideways(folder):
    page = seen(folder, width=390)
    assert page["width"] <= 390
    assert all(200 < width < 390 for width, _ in page["pictures"])
