"""Judges of `trl-ext judge` beside an endpoint, and sides that are policies."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.ppo import tiny
from trl_ext.feedback.judge import count_failures, judge_pairs, match_answers, read_answers, read_judge_prompt
from trl_ext.feedback.labels import LabelFile
from trl_ext.feedback.local_model import LocalModel
from trl_ext.feedback.pairs import read_pairs
from trl_ext.feedback.replies import Reply, ReplyCache, ReplyError
from trl_ext.feedback.verdicts import judge_by_people, judge_by_scores
from trl_ext.feedback.win_rate import win_rate
from trl_ext.scripts import judge, judging, models, red_team

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


def test_answers_of_another_base_are_not_this_ones(world, tmp_path):
    other = tmp_path / "base"
    shutil.copytree(world / "base", other)
    model = models.load_base(str(other))
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.save_pretrained(other)
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "w1 "}])
    answers = write(tmp_path / "b.jsonl", [{"prompt": "w1 ", "answer": "w2"}])
    flags = ["--policy_a=base", f"--answers_b={answers}", f"--prompts={prompts}", "--judge=local"]
    flags += ["--judge_model=m", "--max_new_tokens=2", f"--output_dir={tmp_path / 'out'}"]

    def answered(*more: str):
        recipe, model_args, _ = judge.parse([*flags, *more])
        return judge.sides_of(recipe, model_args, tmp_path / "out")[0]

    here = f"--model_name_or_path={world / 'base'}"
    assert answered(here) == answered(here)
    for more in ([f"--model_name_or_path={other}"], [here, "--dtype=bfloat16"]):
        with pytest.raises(ValueError, match=r"was begun with other settings .*base"):
            answered(*more)


def test_a_base_is_known_by_its_numbers_commit_and_quantisation(world):
    base = models.load_base(str(world / "base"))
    facts = models.facts_of_base(base)
    assert facts["base"] == str((world / "base").resolve())
    assert (facts["base_revision"], facts["base_quantization"], facts["base_dtype"]) == (None, None, "float32")
    base.config._commit_hash, base.config.quantization_config = "abc", {"load_in_4bit": True}
    with torch.no_grad():
        base.model.norm.weight.add_(1)
    changed = models.facts_of_base(base)
    assert {name for name in facts if facts[name] != changed[name]} == {
        "base_revision", "base_quantization", "base_weights",
    }  # fmt: skip


def test_an_adapter_of_the_hub_is_known_by_its_weights(world, tmp_path, monkeypatch):
    """Its id stays the same when other weights are pushed to it: so does that of its answers and scores."""
    from trl_ext import roles
    from trl_ext.text import TextEncoder

    asked = {}
    monkeypatch.setattr("trl_ext.rrhf.sample_responses", lambda *given: asked.update(given[-1]))
    base, encoder = models.load_base(str(world / "base")), TextEncoder(tiny.tiny_tokenizer(), [1])
    recipe = judge.JudgeArguments(max_new_tokens=2)
    read, known = roles.read_adapter, []
    for scale in (1, 2):
        adapter = read(world / "policy")
        adapter.weights = {key: scale * value for key, value in adapter.weights.items()}
        judge.sample(recipe, base, encoder, adapter, [], tmp_path / "a.jsonl", "me/policy")
        known.append(asked["policy"])
    assert known[0] != known[1]
    assert "me/policy" not in known

    pairs, path = pairs_of(2), tmp_path / "scores.jsonl"
    seen = []
    for scale in (None, roles.RewardScale(5.0, 2.0, 9)):
        pushed = dataclasses.replace(read(world / "reward"), scale=scale)
        monkeypatch.setattr(roles, "read_adapter", lambda *_, pushed=pushed: pushed)
        seen.append(judging.adapter_scores(base, encoder, ["me/rm"], pairs, path))
    assert seen[1][0][0] == pytest.approx((seen[0][0][0] - 5) / 2, abs=1e-5)
    with torch.no_grad():
        base.model.norm.weight.mul_(2)
    lines = len(path.read_text().splitlines())
    judging.adapter_scores(base, encoder, ["me/rm"], pairs, path)
    assert len(path.read_text().splitlines()) > lines, "scores of another base were taken"


def test_what_scores_files_computes_where_this_process_does(world, tmp_path, monkeypatch):
    moved, load = [], models.load_base

    def watched(*args, **options):
        base = load(*args, **options)
        base.to = lambda device: moved.append(device) or base
        return base

    monkeypatch.setattr(models, "load_base", watched)
    here = f"--model_name_or_path={world / 'base'}"
    a, b = (write(tmp_path / f"{side}.jsonl", [{"prompt": "w1 ", "answer": f"w{side}"}]) for side in (2, 3))
    flags = ["--judge=adapter", f"--judge_adapter={world / 'reward'}", here, f"--output_dir={tmp_path / 'j'}"]
    judge.main([f"--answers_a={a}", f"--answers_b={b}", "--resamples=5", *flags])
    assert moved == [models.PartialState().device]
    rows = write(tmp_path / "said.jsonl", [{"prompt": "w1 ", "harmful": True, "responses": ["w2"]}])
    flags = [f"--reward_adapter={world / 'reward'}", here, f"--output_dir={tmp_path / 'r'}"]
    red_team.main([f"--answers={rows}", *flags])
    assert len(moved) == 2


def test_a_base_in_4_bits_stays_where_it_was_loaded():
    base = torch.nn.Linear(1, 1)
    assert models.placed(base, "meta").weight.device.type == "meta"
    base = torch.nn.Linear(1, 1)
    base.is_quantized = True
    assert models.placed(base, "meta").weight.device.type == "cpu"


def test_a_prompt_that_is_there_twice_is_found_before_a_policy_answers(world, tmp_path, monkeypatch):
    monkeypatch.setattr(judge, "sample", None)
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "w1 "}, {"prompt": "w2 "}, {"prompt": "w1 "}])
    flags = ["--policy_a=base", "--policy_b=base", f"--prompts={prompts}", "--judge=local", "--judge_model=m"]
    recipe, model_args, _ = judge.parse([*flags, f"--model_name_or_path={world / 'base'}"])
    with pytest.raises(ValueError, match="row 2: its prompt stands in row 0 too"):
        judge.sides_of(recipe, model_args, tmp_path)


def test_a_line_separator_in_an_answer_is_no_new_line(world, tmp_path, monkeypatch):
    def sample(recipe, base, encoder, adapter, prompts, path, *rest):
        rows = [{"index": i, "prompt": prompts[i]["prompt"], "responses": [f"so\u2028{i}"]} for i in (1, 0)]
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")

    monkeypatch.setattr(judge, "sample", sample)
    prompts = write(tmp_path / "p.jsonl", [{"prompt": f"w{i} ", "harmful": True} for i in range(2)])
    recipe, model_args, _ = red_team.parse(
        ["--policy=base", f"--prompts={prompts}", f"--model_name_or_path={world / 'base'}"]
    )
    rows = red_team.answered(recipe, model_args, red_team.read_rows(prompts, False), tmp_path)
    assert [row["responses"] for row in rows] == [["so\u20280"], ["so\u20281"]]


def test_an_empty_answer_loses_without_being_asked_about():
    pairs = match_answers(
        *({json.dumps(f"q{i}"): (f"q{i}", text) for i, text in enumerate(texts)} for texts in (("x", ""), (" ", "y")))
    )[0]
    assert judging.differing(pairs) == []
    assert [record.verdict for record in judge_by_people(pairs, [])] == ["a", "b"]


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
