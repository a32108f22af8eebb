"""The recipes of human feedback: from responses to pairs, labels, preferences, agreement and a judgement."""

import json

import pytest
from peft import get_peft_model
from transformers import AutoTokenizer, LlamaForSequenceClassification
from trl import ModelConfig

from tests.feedback.judge_server import better, judge_server
from tests.ppo import tiny
from trl_ext import SharedBaseModel
from trl_ext.data import load_preferences
from trl_ext.feedback.labels import LabelFile
from trl_ext.feedback.pairs import read_pairs
from trl_ext.rrhf import ResponseScorer
from trl_ext.rrhf.data import RankedRow
from trl_ext.scripts import agreement, choose, judge, label, sample_responses
from trl_ext.text import TextEncoder


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


RESPONSES = [
    {
        "index": i,
        "prompt": f"w{i} w{i + 1}",
        "responses": [f" w{i}", " w2 w3", " w9 w1 w4", " w2 w3"],
        "topic": f"t{i % 2}",
    }
    for i in range(4, 10)
]
ROWS = [{"prompt": f"q{i}", "answer_a": f"a{i}", "answer_b": f"b{i}", "topic": f"t{i % 2}"} for i in range(8)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The tiny world with a second reward adapter, of other weights."""
    folder = tiny.build(tmp_path_factory.mktemp("world"))
    other = LlamaForSequenceClassification.from_pretrained(folder / "base", num_labels=1)
    other = get_peft_model(other, tiny.lora("SEQ_CLS"))
    for parameter in other.parameters():
        if parameter.requires_grad:
            parameter.data.uniform_(-0.5, 0.5)
    other.save_pretrained(folder / "reward_2")
    return folder


def test_pairs_are_chosen_by_a_reward_ensemble_and_not_twice(world, tmp_path):
    responses = write(tmp_path / "responses.jsonl", RESPONSES)
    flags = ["--responses", responses, "--model_name_or_path", str(world / "base"), "--random_share", "0.5"]
    flags += ["--reward_adapter", str(world / "reward"), str(world / "reward_2"), "--count", "4"]
    choose.main([*flags, "--output", str(tmp_path / "one.jsonl")])
    rows = read(tmp_path / "one.jsonl")
    assert sorted(row["chosen_by"] for row in rows) == ["information"] * 2 + ["random"] * 2
    assert all(row["value"] > 0 for row in rows if row["chosen_by"] == "information")
    assert len({row["prompt"] for row in rows}) == 4
    assert all("index" not in row and "topic" in row for row in rows)
    more = ["--count", "100", "--per_prompt", "9", "--exclude", str(tmp_path / "one.jsonl")]
    choose.main([*flags, *more, "--output", str(tmp_path / "two.jsonl")])
    one, two = (read_pairs(tmp_path / f"{name}.jsonl") for name in ("one", "two"))
    assert len(two) == 3 * len(RESPONSES) - 4
    assert not {pair.id for pair in one} & {pair.id for pair in two}
    with pytest.raises(ValueError, match="is there already"):
        choose.main([*flags, "--output", str(tmp_path / "two.jsonl")])


def test_the_scores_are_those_of_the_reward_role(world):
    recipe = choose.ChooseArguments(reward_adapter=[str(world / "reward"), str(world / "reward_2")])
    base = str(world / "base")
    scores = choose.member_scores(recipe, ModelConfig(model_name_or_path=base), RESPONSES)
    encoder = TextEncoder(AutoTokenizer.from_pretrained(base))
    for adapter, member in zip(recipe.reward_adapter, scores, strict=True):
        assert sorted(member) == [(i, k) for i in range(len(RESPONSES)) for k in range(3)]
        role = SharedBaseModel.from_pretrained(base, reward_adapter=adapter, with_critic=False)
        scorer = ResponseScorer(role, encoder)
        for (number, k), score in list(member.items())[:4]:
            prompt, text = RESPONSES[number]["prompt"], RESPONSES[number]["responses"][k]
            sample = RankedRow(prompt, encoder.prompt_ids(prompt), [], []), encoder.response_ids(prompt, text)
            assert scorer([sample])[0] == pytest.approx(score, abs=1e-4)


def test_baselines_need_no_model(tmp_path):
    responses = write(tmp_path / "responses.jsonl", RESPONSES)
    for method in ("random", "different"):
        flags = ["--responses", responses, "--method", method, "--count", "5"]
        choose.main([*flags, "--output", str(tmp_path / f"{method}.jsonl")])
        assert len(read_pairs(tmp_path / f"{method}.jsonl")) == 5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--reward_adapter: --method information needs at least two"),
        (["--method", "random", "--reward_adapter", "x"], "--method random uses no model"),
        (["--method", "random", "--random_share", "0.1"], "draws all pairs at random"),
        (["--method", "best"], "--method best is unknown"),
        (["--method", "different", "--count", "0"], "--count 0"),
        (["--method", "different", "--random_share", "2"], "--random_share 2"),
        (["--method", "different", "--lora_r", "8"], "nothing is trained here"),
    ],
)
def test_what_choose_cannot_honour_is_refused(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        choose.main(["--responses", "r.jsonl", "--output", str(tmp_path / "x.jsonl"), *flags])


def test_labels_come_in_and_go_out_as_preferences(tmp_path, capsys):
    pairs = write(tmp_path / "pairs.jsonl", ROWS)
    said = [{**row, "verdict": "a_much" if i % 2 else "b", "annotator": "anna"} for i, row in enumerate(ROWS)]
    label.main([pairs, "--import_from", write(tmp_path / "said.jsonl", said)])
    assert (tmp_path / "pairs.labels" / "anna.jsonl").is_file()
    label.main([pairs, "--export", str(tmp_path / "out.jsonl")])
    dataset, report = load_preferences(tmp_path / "out.jsonl")
    assert report.rows_kept == 8
    assert dataset["strength"] == [1.0, 2.0] * 4
    assert [row["chosen"][0] for row in dataset] == ["b", "a"] * 4
    assert "8 preferences in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--export", "x.jsonl", "--port", "1"], "--port: of the page"),
        (["--margin", "1"], "--margin: of --export"),
        (["--annotator", "anna"], "--annotator: of --import_from"),
        (["--export", "x", "--import_from", "y"], "one after the other"),
        (["--criteria", "no.txt"], "no.txt: there is no such file"),
    ],
)
def test_what_label_cannot_honour_is_refused(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        label.main([write(tmp_path / "pairs.jsonl", ROWS), *flags])


def test_agreement_is_shown_by_annotator_and_topic(tmp_path, capsys):
    path = write(tmp_path / "pairs.jsonl", ROWS)
    pairs = read_pairs(path)
    for name, verdicts in (("anna", "aabbaabb"), ("ben", "aabbaaba")):
        file = LabelFile(tmp_path / "pairs.labels", name, [pair.id for pair in pairs])
        for pair, verdict in zip(pairs, verdicts, strict=True):
            file.label(pair.id, verdict, "a")
    agreement.main([path, "--topic", "topic", "--resamples", "50", "--output_dir", str(tmp_path / "out")])
    shown = capsys.readouterr().out
    assert "0.88" in shown
    result = json.loads((tmp_path / "out" / "agreement.json").read_text())
    assert result["share"]["value"] == 7 / 8
    assert result["topics"]["t0"]["share"]["value"] == 1
    assert result["kappa"]["anna and ben"]["count"] == 8
    LabelFile(tmp_path / "other", "cleo", ["0" * 16]).label("0" * 16, "a")
    with pytest.raises(ValueError, match="labels of 'cleo' belong to another set"):
        agreement.main([path, "--labels", str(tmp_path / "other")])


def test_a_judgement_with_people(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-secret-42")
    a = write(tmp_path / "a.jsonl", [{"prompt": f"q{i}", "answer": f"good {i}"} for i in range(6)])
    b = write(tmp_path / "b.jsonl", [{"prompt": f"q{i}", "answer": f"bad {i}"} for i in range(5)])
    flags = ["--answers_a", a, "--answers_b", b, "--judge_model", "m", "--output_dir", str(tmp_path / "out")]
    flags += ["--api_key_env", "MY_KEY", "--resamples", "20", "--price_input", "1", "--price_output", "2"]
    with judge_server(better) as (url, texts, _):
        judge.main([*flags, "--base_url", url, "--dry_run", "true"])
        assert texts == []
        assert "10 requests" in capsys.readouterr().out
        pairs = read_pairs(tmp_path / "out" / "pairs.jsonl")
        file = LabelFile(tmp_path / "labels", "anna", [pair.id for pair in pairs])
        for pair, verdict in zip(pairs, ("a", "a", "a", "b", "tie"), strict=True):
            file.label(pair.id, verdict)
        judge.main([*flags, "--base_url", url, "--labels", str(tmp_path / "labels")])
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (result["wins"], result["rate"], result["inconsistent"]) == (5, 1.0, 0)
    assert result["people"] == {"pairs": 5, "same": 3 / 5, "decided": 4, "same_where_decided": 3 / 4}
    assert [row["verdict"] for row in read(tmp_path / "out" / "verdicts.jsonl")] == ["a"] * 5
    shown = capsys.readouterr().out
    files = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any("sk-secret" in text for text in [shown, *files])


def test_the_key_is_asked_for_before_anything_is_done(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    a = write(tmp_path / "a.jsonl", [{"prompt": "q", "answer": "x"}])
    flags = ["--answers_a", a, "--answers_b", a, "--judge_model", "m", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="OPENAI_API_KEY is not set"):
        judge.main(flags)
    assert not (tmp_path / "out").exists()
    assert judge.key_of(judge.parse([*flags, "--base_url", "http://localhost:1/v1"])[0]) == "none"


def test_responses_are_sampled_without_a_scorer_when_asked_to(tmp_path):
    flags = ["--model_name_or_path", "m", "--dataset_name", "d.jsonl", "--output", str(tmp_path / "r.jsonl")]
    with pytest.raises(ValueError, match="nothing scores the responses"):
        sample_responses.parse(flags)
    assert sample_responses.parse([*flags, "--unscored", "true"])[0].unscored
    with pytest.raises(ValueError, match="--reward_funcs: --unscored samples without scores"):
        sample_responses.parse([*flags, "--unscored", "true", "--reward_funcs", "x.py:f"])
