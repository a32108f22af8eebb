"""Policies beside each other on the same prompts: figures by hand, what is refused, the page and its files."""

import json

import pytest

from tests.report.made import HOSTILE, write_run
from tests.report.test_page import Reader
from trl_ext.report.comparison import (
    Policy,
    changes_tables,
    compare_policies,
    figures_table,
    policies_of_runs,
    write_comparison,
)
from trl_ext.report.loading import load_run
from trl_ext.report.samples import distinct_2, pair_shares


def sample(reward: float, kl: float = 0.0, text: str = "a b") -> dict:
    return {
        "prompt": "p",
        "completion": text,
        "reward": reward,
        "kl": kl,
        "tokens": 2,
        "nll": 2.0,
        "reference_nll": 2.0,
    }


def policy(name: str, rewards: list[float], **more) -> Policy:
    return Policy(name, {f"key{i}": sample(reward, **more) for i, reward in enumerate(rewards)})


def test_changes_are_measured_in_pairs_from_the_reference_and_from_the_first_policy():
    start = [float(i) for i in range(20)]
    policies = [
        policy("reference", start),
        policy("a", [each + 1 for each in start], kl=2.0),
        policy("b", [each + 3 for each in start], kl=5.0),
    ]
    found = compare_policies(policies)
    reward = {name: next(c for c in changes if c.name == "reward") for name, changes in found.changes.items()}
    # the rewards of the prompts are far apart, what each prompt gains is not
    assert reward["a"].change == reward["a"].interval[0] == reward["a"].interval[1] == 1.0
    assert reward["b"].change == 3.0
    assert reward["b"].after_interval[1] - reward["b"].after_interval[0] > 2
    (beside,) = (c for c in found.beside["b"] if c.name == "reward")
    assert (beside.change, beside.interval) == (2.0, (2.0, 2.0))
    (kl,) = (c for c in found.beside["b"] if c.name.startswith("KL"))
    assert kl.change == 3.0
    assert [title for title, _, _ in changes_tables(found)] == [
        "Difference from reference, on the same prompts", "Difference from a, on the same prompts",
    ]  # fmt: skip
    head, rows = figures_table(found)
    assert head == ["", "reference", "a", "b"]
    assert rows[0][0] == "reward"
    assert [cell.splitlines()[0] for cell in rows[0][1:]] == ["9.5", "10.5", "12.5"]


def test_prompts_that_not_all_have_answered_are_left_out_and_counted():
    found = compare_policies([policy("reference", [0.0] * 10), policy("a", [1.0] * 9)])
    assert len(found.keys) == 9
    assert found.notes == ["1 prompts that not all have answered are left out."]
    with pytest.raises(ValueError, match=r"no held-out prompts in common.*--dataset_name"):
        compare_policies([policy("reference", [0.0]), Policy("a", {"other": sample(1.0)})])
    with pytest.raises(ValueError, match="compare 1 to 6"):
        compare_policies([policy("reference", [0.0])])


def test_variety_is_a_ratio_of_sums_over_the_texts():
    texts = ["a b c", "a b", "", "c"]
    assert pair_shares(texts) == [(0.5 + 1, 2), (0.5, 1), (0, 0), (0, 0)]
    assert distinct_2(texts) == pytest.approx(2 / 3)
    assert distinct_2([]) == 0


def test_runs_that_were_scored_by_other_rewards_or_started_elsewhere_are_said_to(tmp_path):
    runs = [load_run(write_run(tmp_path / name, prompts=12, seed=i)) for i, name in enumerate("ab")]
    policies, notes = policies_of_runs(runs, ["a", "b"])
    assert notes == []
    assert [each.name for each in policies] == ["reference", "a", "b"]
    assert len(compare_policies(policies).keys) == 12
    runs[1].info["identity"] |= {"reward adapter": "x", "reference adapter": "y"}
    _, notes = policies_of_runs(runs, ["a", "b"])
    assert [note.split(",")[0].split(":")[0] for note in notes] == [
        "The runs were scored by different rewards", "The runs started from different policies",
    ]  # fmt: skip
    runs[1].evaluations = {}
    with pytest.raises(ValueError, match=r"b holds no evaluation .*--dataset_name"):
        policies_of_runs(runs, ["a", "b"])


def test_the_files_and_a_page_on_which_every_text_is_text(tmp_path):
    rewards = [float(i) for i in range(9)]
    policies = [policy("reference", rewards, text=HOSTILE), policy(f"x{HOSTILE}", rewards[::-1], kl=1.0, text=HOSTILE)]
    paths = write_comparison(compare_policies(policies), tmp_path, "evaluation", f"{HOSTILE}", {"seed": 3})
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in paths.values()}
    record = json.loads(paths["figures"].read_text())
    assert record["prompts"] == 9
    assert record["seed"] == 3
    assert record["policies"]["reference"]["reward"]["mean"] == 4.0
    lines = [json.loads(line) for line in paths["samples"].read_text().split("\n")[:-1]]
    assert [line["policy"] for line in lines[::9]] == ["reference", f"x{HOSTILE}"]
    page = paths["page"].read_text()
    reader = Reader(page)
    assert not {"script", "img", "iframe"} & set(reader.elements)
    assert "http:" not in page.replace("http://www.w3.org", "")
    text = " ".join(reader.texts)
    assert "{{ 7*7 }}" in text
    ids = {value for name, value in reader.attributes if name == "id"}
    assert {"figures", "frontier", "samples", "how"} <= ids
    # nine changes of reward: the largest in size come first
    deltas = [each.strip() for each in reader.texts if each.strip() in {"+8", "-8", "+6", "-6"}]
    assert deltas[:2] in (["+8", "-8"], ["-8", "+8"])
