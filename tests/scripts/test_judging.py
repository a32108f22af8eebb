"""Judges of `trl-ext judge` beside an endpoint, and sides that are policies."""

import json
from pathlib import Path

import pytest

from tests.ppo import tiny
from trl_ext.feedback.judge import count_failures, judge_pairs, match_answers, read_answers, read_judge_prompt
from trl_ext.feedback.labels import LabelFile
from trl_ext.feedback.local_model import LocalModel
from trl_ext.feedback.pairs import read_pairs
from trl_ext.feedback.replies import Reply, ReplyCache, ReplyError
from trl_ext.feedback.verdicts import judge_by_people, judge_by_scores
from trl_ext.feedback.win_rate import win_rate
from trl_ext.scripts import judge, judging

TEMPLATE = read_judge_prompt("helpful")
FILES = ["--answers_a=a.jsonl", "--answers_b=b.jsonl"]


def write(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny.build(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--answers_b=b"], "--answers_a is missing"),
        ([*FILES, "--policy_a=p"], "--answers_a and --policy_a are both there"),
        ([*FILES, "--judge=me"], "--judge me is unknown"),
        ([*FILES, "--judge=local"], "--judge_model is missing"),
        ([*FILES, "--judge=local", "--judge_model=m", "--base_url=u"], "--base_url: --judge local has no use for it"),
        ([*FILES, "--judge=adapter"], "--judge_adapter is missing"),
        ([*FILES, "--judge=adapter", "--judge_adapter=r", "--attempts=2"], "--attempts: --judge adapter"),
        ([*FILES, "--judge=people", "--judge_adapter=r"], "--judge_adapter: --judge people"),
        ([*FILES, "--judge=people", "--labels", "l"], "--labels: people judge here"),
        ([*FILES, "--judge_model=m", "--prompts=p"], "--prompts: both sides are files"),
        ([*FILES, "--judge_model=m", "--dtype=float32"], "--dtype: no policy answers here"),
        (["--policy_a=p", "--answers_b=b", "--judge_model=m"], "--prompts is missing"),
        (["--policy_a=p", "--answers_b=b", "--judge_model=m", "--prompts=p", "--lora_r=2"], "nothing is trained"),
    ],
)
def test_flags_without_an_effect_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        judge.parse(flags)


def test_a_run_that_is_not_finished_is_no_side(tmp_path):
    (tmp_path / "run.json").write_text('{"outcome": "running"}')
    with pytest.raises(ValueError, match=r"the run is not finished \(running\)"):
        judge.check_policy(str(tmp_path))


def test_policies_answer_and_a_reward_adapter_judges(world, tmp_path):
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": f"w{i} w{i + 1} "} for i in range(6)])
    flags = [f"--policy_a={world / 'policy'}", "--policy_b=base", f"--prompts={prompts}", "--judge=adapter"]
    flags += [f"--judge_adapter={world / 'reward'}", f"--model_name_or_path={world / 'base'}", "--max_new_tokens=6"]
    flags += [f"--output_dir={tmp_path / 'out'}", "--resamples=20"]
    judge.main(flags)
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["judged"] == 6
    assert result["wins"] + result["ties"] + result["losses"] == 6
    assert result["inconsistent"] == 0
    scores = (tmp_path / "out" / "scores.jsonl").read_text()
    answers = (tmp_path / "out" / "answers_a.jsonl").read_text()
    assert answers != (tmp_path / "out" / "answers_b.jsonl").read_text()
    (tmp_path / "out" / "scores.jsonl").write_text(scores[: len(scores) // 2])  # killed in the middle of a line
    judge.main(flags)
    again = json.loads((tmp_path / "out" / "result.json").read_text())
    assert again == result
    kept = [json.loads(line)["key"] for line in (tmp_path / "out" / "scores.jsonl").read_text().splitlines()]
    assert sorted(kept) == sorted(json.loads(line)["key"] for line in scores.splitlines())
    assert (tmp_path / "out" / "answers_a.jsonl").read_text() == answers


def pairs_of(count: int):
    rows = [{json.dumps(f"q{i}"): (f"q{i}", f"{side} {i}") for i in range(count)} for side in ("good", "bad")]
    return match_answers(*rows)[0]


def test_a_local_model_is_asked_once_for_each_text_also_after_a_kill(tmp_path):
    asked = []

    def complete(text, attempt, seed):
        asked.append((attempt, seed))
        if len(asked) == 5:
            raise KeyboardInterrupt
        first = text.split("<first_answer>\n")[1]
        return Reply(
            "prose" if attempt == 0 else json.dumps({"verdict": "first" if first.startswith("good") else "second"})
        )

    def judged():
        local = LocalModel("m", ReplyCache(tmp_path / "replies.jsonl"), complete)
        return judge_pairs(pairs_of(3), TEMPLATE, local, concurrency=1), local

    with pytest.raises(KeyboardInterrupt):
        judged()
    records, local = judged()
    assert [record.verdict for record in records] == ["a"] * 3
    assert len(asked) == 13, "twice for each of six texts, and once for the one that was interrupted"
    assert local.requests == 8
    assert len(set(asked)) == 12, "the second attempt draws other numbers than the first"


def test_a_local_chat_model_answers_as_it_can_and_prose_is_counted(world, tmp_path):
    model = judging.ModelJudge("local", str(world / "base"), max_tokens=4, attempts=2)
    (tmp_path / "short.txt").write_text("{conversation} {first} {second}")
    asked = judging.open_judge(model, tmp_path)
    judged = judge_pairs(pairs_of(2), "{conversation} {first} {second}", asked, attempts=2, concurrency=1)
    assert count_failures(judged).counts == {"no JSON": 4}
    assert (asked.requests, len((tmp_path / "replies.jsonl").read_text().splitlines())) == (8, 8)
    with pytest.raises(ReplyError, match=r"too long: .* the model has 64"):
        asked.ask("w1 " * 100)


def test_scores_decide_and_what_has_none_has_failed():
    pairs = pairs_of(4)
    judged = judge_by_scores(pairs, [(2.0, 1.0), (0.0, 1.0), (1.0, 1.0), None])
    assert [record.verdict for record in judged] == ["a", "b", "tie", "failed"]
    assert win_rate(judged, resamples=5).rate == 0.5
    assert count_failures(judged).counts == {"no score": 2}


def test_people_judge_by_the_most_votes_and_a_pair_without_a_label_has_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(judge, "check_label_page", lambda: None)  # every pair is labelled or skipped: none is shown
    a = write(tmp_path / "a.jsonl", [{"prompt": f"q{i}", "answer": f"good {i}"} for i in range(4)])
    b = write(tmp_path / "b.jsonl", [{"prompt": f"q{i}", "answer": f"bad {i}"} for i in range(4)])
    pairs, _ = match_answers(read_answers(a), read_answers(b))
    folder = tmp_path / "out" / "pairs.labels"
    for name, verdicts in (("anna", ("a_much", "a", "b")), ("ben", ("a", "b", "b")), ("cleo", ("a", "b"))):
        file = LabelFile(folder, name, [pair.id for pair in pairs])
        for pair, verdict in zip(pairs, verdicts, strict=False):
            file.label(pair.id, verdict)
    LabelFile(folder, "anna", [pair.id for pair in pairs]).skip(pairs[3].id)
    judge.main([f"--answers_a={a}", f"--answers_b={b}", "--judge=people", f"--output_dir={tmp_path / 'out'}"])
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (result["wins"], result["losses"], result["failed"], result["inconsistent"]) == (1, 2, 1, 0)
    judged = judge_by_people(pairs, [])
    assert [record.verdict for record in judged] == ["failed"] * 4
    assert len(read_pairs(tmp_path / "out" / "pairs.jsonl")) == 4
