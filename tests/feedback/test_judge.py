"""A judge behind an endpoint: both orders, strict replies, failures, what is kept of a killed run."""

import json

import pytest

from tests.feedback.judge_server import always_first, better, judge_server, longer, verdict
from trl_ext.feedback.judge import (
    count_failures,
    estimate_cost,
    fill_prompt,
    judge_pairs,
    match_answers,
    parse_reply,
    read_answers,
    read_judge_prompt,
)
from trl_ext.feedback.replies import Endpoint, EndpointError, ReplyCache, ReplyError
from trl_ext.feedback.win_rate import win_rate

KEY = "sk-secret-0123456789"
TEMPLATE = read_judge_prompt("helpful")


def answers(texts):
    return {json.dumps(f"q{i}"): (f"q{i}", text) for i, text in enumerate(texts)}


def pairs_of(a, b):
    return match_answers(answers(a), answers(b))[0]


PAIRS = pairs_of([f"short {i}" for i in range(12)], [f"a much longer answer {i}" + " x" * i for i in range(12)])


def endpoint(url, tmp_path, **options):
    return Endpoint("m", ReplyCache(tmp_path / "cache.jsonl"), base_url=url, key=KEY, **{"retries": 0, **options})


def test_a_judge_that_always_says_first_is_inconsistent_throughout(tmp_path):
    with judge_server(always_first) as (url, texts, _):
        judged = judge_pairs(PAIRS, TEMPLATE, endpoint(url, tmp_path))
    assert len(texts) == len(set(texts)) == 24
    result = win_rate(judged, resamples=50)
    assert (result.inconsistent, result.ties, result.rate, result.interval) == (12, 12, 0.5, (0.5, 0.5))


def test_a_judge_that_prefers_length_is_found_out(tmp_path):
    lengths = [(30, 60), (60, 35), (20, 80), (50, 55), (70, 40), (25, 60), (40, 90), (33, 60)] * 3
    pairs = pairs_of([f"{i:02}" + "a" * m for i, (m, _) in enumerate(lengths)], ["b" * n for _, n in lengths])
    with judge_server(longer) as (url, _, _):
        result = win_rate(judge_pairs(pairs, TEMPLATE, endpoint(url, tmp_path)), resamples=100)
    assert (result.inconsistent, result.ties, result.wins + result.losses) == (0, 0, 24)
    assert result.rate < 0.4
    assert result.length_effect > 2
    assert abs(result.controlled - 0.5) < abs(result.rate - 0.5)


def test_the_better_one_wins_in_both_orders_and_equal_answers_are_not_asked_about(tmp_path):
    pairs = pairs_of(["good", "bad", "bad", "same"], ["bad", "good", "poor", "same "])
    with judge_server(better) as (url, texts, _):
        judged = judge_pairs(pairs, TEMPLATE, endpoint(url, tmp_path))
    assert [record.verdict for record in judged] == ["a", "b", "tie", "tie"]
    assert all(record.consistent for record in judged)
    assert len(texts) == 6


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        ("The first answer is better.", "no JSON"),
        ('{"reason": "x", "verdict": "fi', "no JSON"),
        ('I think {"verdict": "first"}', "no JSON"),
        ('{"verdict": "A"}', "no verdict"),
        ('["first"]', "no verdict"),
        ('{"verdict": ["first"]}', "no verdict"),
        ("", "no JSON"),
    ],
)
def test_replies_without_a_verdict_are_counted(tmp_path, reply, kind):
    with pytest.raises(ReplyError, match=kind):
        parse_reply(reply)
    with judge_server(lambda text: reply) as (url, texts, _):
        judged = judge_pairs(PAIRS[:2], TEMPLATE, endpoint(url, tmp_path), attempts=2)
    assert [record.verdict for record in judged] == ["failed", "failed"]
    assert count_failures(judged).counts == {kind: 4}
    assert len(texts) == 8  # two attempts for each order, and no more


def test_a_fence_around_the_object_is_fine():
    assert parse_reply('```json\n{"verdict": "tie", "reason": "x"}\n```') == "tie"


def test_a_reply_that_comes_at_the_second_attempt_counts(tmp_path):
    seen = set()

    def at_second(text):
        known = text in seen
        seen.add(text)
        return better(text) if known else "prose"

    pairs = pairs_of(["good"], ["bad"])
    with judge_server(at_second) as (url, _, _):
        (record,) = judge_pairs(pairs, TEMPLATE, endpoint(url, tmp_path), concurrency=1)
    assert record.verdict == "a"


def test_half_a_reply_is_a_counted_failure(tmp_path):
    torn = {fill_prompt(TEMPLATE, PAIRS[3].prompt, PAIRS[3].a, PAIRS[3].b)}
    with judge_server(longer, torn=lambda text: text in torn) as (url, _, _):
        judged = judge_pairs(PAIRS, TEMPLATE, endpoint(url, tmp_path))
    assert [i for i, record in enumerate(judged) if record.verdict == "failed"] == [3]
    assert sum(count_failures(judged).counts.values()) == 1
    assert judged[3].said[1] is not None


def test_too_slow_is_a_counted_failure_and_too_slow_always_an_error(tmp_path):
    slow = PAIRS[2].a

    with judge_server(longer, status=lambda text: 503 if slow in text else 200) as (url, _, _):
        judged = judge_pairs(PAIRS, TEMPLATE, endpoint(url, tmp_path), concurrency=1)
    assert [record.verdict for record in judged].count("failed") == 1
    assert count_failures(judged).counts == {"no reply": 2}
    with (
        judge_server(longer, delay=1.0) as (url, texts, _),
        pytest.raises(EndpointError, match=r"does not answer: no reply: .*imed out"),
    ):
        judge_pairs(PAIRS, TEMPLATE, endpoint(url, tmp_path, timeout=0.1), concurrency=1)
    assert len(texts) == 5


@pytest.mark.parametrize("code", [400, 401, 404])
def test_an_endpoint_that_refuses_is_an_error_without_the_key(tmp_path, code):
    with (
        judge_server(longer, status=lambda text: code) as (url, texts, _),
        pytest.raises(EndpointError, match=f"answers {code}") as caught,
    ):
        judge_pairs(PAIRS, TEMPLATE, endpoint(url, tmp_path), concurrency=1)
    assert KEY not in str(caught.value)
    assert len(texts) == 1


def test_nobody_there_is_an_error(tmp_path):
    with judge_server(longer) as (url, _, _):
        pass
    with pytest.raises(EndpointError, match="does not answer"):
        judge_pairs(PAIRS, TEMPLATE, endpoint(url, tmp_path))


def test_a_stopped_run_goes_on_and_asks_nothing_twice(tmp_path):
    left = [7]

    def stops(text):
        left[0] -= 1
        return 200 if left[0] >= 0 else 401

    with judge_server(longer, status=stops) as (url, first, _):
        with pytest.raises(EndpointError):
            judge_pairs(PAIRS, TEMPLATE, endpoint(url, tmp_path), concurrency=1)
        content = (tmp_path / "cache.jsonl").read_bytes()
        (tmp_path / "cache.jsonl").write_bytes(content + b'{"key": "torn')
        left[0] = 10**6
        again = endpoint(url, tmp_path)
        assert again.cache.torn == len(b'{"key": "torn')
        assert estimate_cost(PAIRS, TEMPLATE, again, 100).requests == 17
        judged = judge_pairs(PAIRS, TEMPLATE, again)
        assert again.requests == 17
        assert len(first) == 8 + 17
        once_more = judge_pairs(PAIRS, TEMPLATE, endpoint(url, tmp_path))
        assert len(first) == 8 + 17
    assert once_more == judged
    assert {record.verdict for record in judged} == {"b"}


def test_the_key_is_sent_and_written_nowhere(tmp_path):
    with judge_server(longer) as (url, _, keys):
        judge_pairs(PAIRS[:1], TEMPLATE, endpoint(url, tmp_path))
    assert set(keys) == {f"Bearer {KEY}"}
    assert all(KEY.encode() not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_the_estimate_counts_both_orders(tmp_path):
    end = endpoint("http://127.0.0.1:9/v1", tmp_path)
    estimate = estimate_cost(PAIRS[:2], "{conversation}{first}{second}", end, 100, 2.0, 10.0)
    characters = 2 * sum(len(p.prompt) + len(p.a) + len(p.b) for p in PAIRS[:2])
    assert (estimate.requests, estimate.input_tokens, estimate.output_tokens) == (4, characters // 4, 400)
    assert estimate.cost == pytest.approx((characters // 4 * 2 + 400 * 10) / 1e6)


def test_what_looks_like_a_placeholder_in_an_answer_stays_text():
    filled = fill_prompt("{conversation}|{first}|{second}", "p {second}", "a {conversation}", "b {first} \\1")
    assert filled == "p {second}|a {conversation}|b {first} \\1"


@pytest.mark.parametrize("name", ["helpful", "harmless"])
def test_the_prompts_that_come_with_it(name):
    assert verdict("tie").split(":")[0] in read_judge_prompt(name).replace('{"reason": "one sentence"', '{"reason"')


def test_bad_prompts_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"Use harmless, helpful, or a text file"):
        read_judge_prompt("nice")
    (tmp_path / "mine.txt").write_text("{conversation} {first} {first} {second}")
    with pytest.raises(ValueError, match=r"has \{first\} 2 times"):
        read_judge_prompt(str(tmp_path / "mine.txt"))


def test_answers_are_read_in_their_forms(tmp_path):
    chat = [{"role": "user", "content": "q"}]
    rows = [{"prompt": "a", "answer": "1"}, {"prompt": chat, "responses": ["2"], "scores": [1]}]
    rows += [{"prompt": "c", "completion": [{"role": "assistant", "content": "3"}]}, {"prompt": "d", "response": ""}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [answer for _, answer in read_answers(tmp_path / "x.jsonl").values()] == ["1", "2", "3", ""]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a"}], "row 0: no answer"),
        ([{"answer": "a"}], "row 0: no prompt"),
        ([{"prompt": "a", "responses": ["x", "y"]}], "row 0: no answer"),
        ([{"prompt": "a", "answer": "x"}, {"prompt": "a", "answer": "y"}], "row 1: its prompt is there twice"),
        ([], "has no answers"),
    ],
)
def test_files_that_are_no_answers(tmp_path, rows, message):
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=message):
        read_answers(tmp_path / "x.jsonl")


def test_files_of_other_prompts_do_not_match():
    with pytest.raises(ValueError, match="no prompt in common"):
        match_answers(answers(["x"]), {'"z"': ("z", "y")})
    assert match_answers(answers(["x", "y"]), answers(["z"]))[1] == 1
