"""Sampling responses: what the methods are, what a response depends on, and a file that survives being killed."""

import json
import random
from collections import Counter

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from tests.ppo.tiny import count_words
from tests.rrhf.ranked import tuned, words
from tests.rrhf.sample_and_die import check_file, kill_once_it_has, prompts, sample
from trl_ext import Role
from trl_ext.generation.seeded import SeededChoice, generate_responses, prompt_generator
from trl_ext.rrhf import ClassifierReward, ResponseScorer, SamplingConfig, load_responses, sample_responses
from trl_ext.rrhf.response_log import ResponseLog
from trl_ext.text import TextEncoder

ENDS = [1, 5]


@pytest.fixture(scope="module")
def tokenizer(world):
    return AutoTokenizer.from_pretrained(world / "base")


@pytest.fixture(scope="module")
def model(world):
    return tuned(world, reward=True)


def scorer(tokenizer):
    return ResponseScorer(None, tokenizer, count_words)


def generate(model, texts, tokenizer, count=3, seed=0, first=0, **options):
    ids = [tokenizer(text)["input_ids"] for text in texts]
    generators = [prompt_generator(seed, first + i) for i in range(len(ids))]
    return generate_responses(model, ids, generators, count, 6, eos_token_ids=ENDS, pad_token_id=0, **options)


# ---------------------------------------------------------------------- choosing tokens


def test_tokens_come_as_often_as_their_probability_says():
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2])
    uniforms = torch.linspace(0, 1, 1001)[:-1].view(1, -1, 1)  # each of a thousand numbers once
    chosen = SeededChoice(uniforms, [9])(torch.zeros(1000, 1), probabilities.log().expand(1000, -1)).argmax(1)
    assert chosen.bincount(minlength=4).tolist() == pytest.approx([500, 0, 300, 200], abs=1)


def test_the_nucleus_is_the_smallest_set_with_that_mass():
    probabilities = torch.tensor([0.2, 0.5, 0.3])
    uniforms = torch.linspace(0, 1, 1001)[:-1].view(1, -1, 1)
    chosen = SeededChoice(uniforms, [9], top_p=0.6)(torch.zeros(1000, 1), probabilities.log().expand(1000, -1))
    # 0.5 alone is less than 0.6, 0.5 and 0.3 are enough: 5/8 and 3/8 of the draws
    assert chosen.argmax(1).bincount(minlength=3).tolist() == pytest.approx([0, 625, 375], abs=1)


def test_temperature_sharpens():
    uniforms = torch.full((1, 1, 1), 0.7)
    logits = torch.tensor([[0.4, 0.6]]).log()
    assert SeededChoice(uniforms, [9])(torch.zeros(1, 1), logits).argmax() == 1
    # at temperature 0.5 the first has 0.16 / 0.52 = 0.308
    assert SeededChoice(torch.full((1, 1, 1), 0.3), [9], temperature=0.5)(torch.zeros(1, 1), logits).argmax() == 0
    assert SeededChoice(torch.full((1, 1, 1), 0.32), [9], temperature=0.5)(torch.zeros(1, 1), logits).argmax() == 1


def test_diverse_sampling_is_diverse_beam_search_with_groups_of_one():
    """Greedy (temperature near 0), worked by hand: a penalty of 1 for each earlier use of a token."""
    logits = torch.tensor([-1.0, -1.5, -3.0]).expand(4, 3)
    choice = SeededChoice(torch.full((1, 4, 1), 0.5), [9], temperature=1e-4, diversity_penalty=1.0)
    # token 0; then 0 costs 2 and 1 is best; then 0 at -2 beats 1 at -2.5; then 0 at -3, 1 at -2.5
    assert choice(torch.zeros(4, 1), logits).argmax(1).tolist() == [0, 1, 0, 1]
    ended = SeededChoice(torch.full((1, 2, 2), 0.5), [0], temperature=1e-4, diversity_penalty=1.0)
    logits = torch.tensor([[-1.0, -1.5, -3.0]] * 2)
    assert ended(torch.zeros(2, 1), logits).argmax(1).tolist() == [0, 1]
    # the first response has ended: what it would choose does not count against the second
    assert ended(torch.zeros(2, 1), logits).argmax(1).tolist()[1] == 0


# ---------------------------------------------------------------------- responses


@pytest.mark.parametrize("method", ["temperature", "nucleus", "diverse", "beam"])
def test_a_response_depends_on_its_prompt_and_not_on_the_batch(model, tokenizer, method):
    options = {"method": method, "top_p": 0.8 if method == "nucleus" else 1.0}
    options["diversity_penalty"] = 1.0 if method == "diverse" else 0.0
    texts = [words(i, 1 + i % 4) for i in range(5)]
    together = generate(model, texts, tokenizer, **options)
    alone = [generate(model, [text], tokenizer, first=i, **options)[0] for i, text in enumerate(texts)]
    assert together == alone
    assert all(len(group) == 3 for group in together)
    for ids in (ids for group in together for ids in group):
        assert 1 <= len(ids) <= 6
        assert not set(ENDS) & set(ids[:-1])  # cut at the first end token, whichever it is


def test_beams_are_the_best_and_cold_samples_are_greedy(model, tokenizer):
    def logp(ids, response):
        with torch.no_grad(), model.eval().role(Role.POLICY):
            logits = model(input_ids=torch.tensor([ids + response])).logits[0].log_softmax(-1)
        return sum(float(logits[len(ids) + t - 1, token]) for t, token in enumerate(response)) / len(response)

    prompt = tokenizer("w1 w2")["input_ids"]
    beams = generate(model, ["w1 w2"], tokenizer, method="beam")[0]
    assert len(set(map(tuple, beams))) == 3
    (greedy,) = generate(model, ["w1 w2"], tokenizer, count=1, temperature=1e-4)[0]
    assert max(logp(prompt, ids) for ids in beams) >= logp(prompt, greedy) - 1e-5
    assert generate(model, ["w1 w2"], tokenizer, temperature=1e-4)[0] == [greedy] * 3


def test_diverse_responses_repeat_less(model, tokenizer):
    texts = [words(i, 2) for i in range(12)]

    def repeated(penalty):
        groups = generate(model, texts, tokenizer, count=4, temperature=0.3, diversity_penalty=penalty)
        return sum(4 - len(set(map(tuple, group))) for group in groups)

    assert repeated(3.0) < repeated(0.0)


def test_the_random_state_and_the_mode_stay(model, tokenizer):
    model.train()
    state = torch.get_rng_state()
    first, again = (generate(model, ["w1"], tokenizer, seed=1) for _ in range(2))
    assert first == again != generate(model, ["w1"], tokenizer, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


# ---------------------------------------------------------------------- the file


def test_a_record_holds_what_was_sampled_and_what_was_there(world, model, tokenizer, tmp_path):
    dataset = prompts(5).add_column("human", ["w7 w8", None, "w9", "", "w1"]).add_column("others", [["w2", "w3"]] * 5)
    args = SamplingConfig(
        sampling_methods=["temperature:2", "beam:2"], max_new_tokens=3, response_columns=["human", "others"]
    )
    path = tmp_path / "r.jsonl"
    report = sample_responses(model, tokenizer, dataset, path, args, scorer(tokenizer))
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["number"] for record in records] == [record["index"] for record in records] == list(range(5))
    assert records[0]["sources"] == ["temperature"] * 2 + ["beam"] * 2 + ["human"] + ["others"] * 2
    assert records[0]["responses"][4:] == ["w7 w8", "w2", "w3"]
    assert records[1]["sources"][4:] == ["others"] * 2
    for record in records:
        assert record["scores"] == count_words(None, record["responses"])
        for text, source, cut in zip(record["responses"], record["sources"], record["truncated"], strict=True):
            assert not cut or (len(text.split()) <= 3 and source in ("temperature", "beam"))
    flat = [(s, t.strip()) for r in records for s, t in zip(r["sources"], r["responses"], strict=True)]
    assert report.responses == Counter(source for source, _ in flat)
    assert report.empty["human"] == 1
    cut = sum(sum(record["truncated"]) for record in records)
    assert cut == sum(report.truncated.values()) > 0
    expected = sum(len(r["responses"]) - len({text.strip() for text in r["responses"]}) for r in records)
    assert sum(report.duplicates.values()) == expected


def test_without_a_scorer_there_are_the_same_responses_and_no_scores(world, model, tokenizer, tmp_path):
    from trl_ext.rrhf.data import encode_dataset

    args = SamplingConfig(sampling_methods=["temperature:2"], max_new_tokens=3)
    scored, unscored = tmp_path / "scored.jsonl", tmp_path / "unscored.jsonl"
    sample_responses(model, tokenizer, prompts(4), scored, args, scorer(tokenizer))
    report = sample_responses(model, tokenizer, prompts(4), unscored, args, None)
    with_scores, without = (list(map(json.loads, path.read_text().splitlines())) for path in (scored, unscored))
    assert [{k: v for k, v in record.items() if k != "scores"} for record in with_scores] == without
    assert [row[2] for row in report.rows()] == ["-"]
    with pytest.raises(ValueError, match="scored=False -> None"):
        sample_responses(model, tokenizer, prompts(4), unscored, args, scorer(tokenizer))
    with pytest.raises(ValueError, match="no column scores"):
        encode_dataset(load_responses(unscored), "train_dataset", TextEncoder(tokenizer, ENDS), max_length=32)


def test_what_the_limit_cut_gets_no_end_in_training(model, tokenizer, tmp_path):
    from trl_ext.rrhf.data import encode_dataset

    chats = [[{"role": "user", "content": "w1 w2"}]] * 6
    for name, dataset in (("plain", prompts(6)), ("chat", Dataset.from_dict({"prompt": chats}))):
        path = tmp_path / f"{name}.jsonl"
        args = SamplingConfig(sampling_methods=["temperature:4"], max_new_tokens=2)
        sample_responses(model, tokenizer, dataset, path, args, scorer(tokenizer))
        found = load_responses(path)
        assert 0 < sum(map(sum, found["truncated"])) < 24
        encoded, _ = encode_dataset(found, "train_dataset", TextEncoder(tokenizer, ENDS), max_length=32)
        for row, ids in zip(found, encoded["response_ids"], strict=True):
            given = [(t, cut) for t, cut in zip(row["responses"], row["truncated"], strict=True) if t.strip()]
            for (_, cut), response in zip(given, ids, strict=True):
                assert (response[-1] in ENDS) == (not cut)


def test_reward_role_ensembles_and_classifiers_score(world, model, tokenizer, tmp_path):
    both, own, seen = tuned(world), ResponseScorer(model, tokenizer), []

    def spy(samples):
        encoder = TextEncoder(tokenizer, ENDS)
        seen.extend(encoder.scored_ids(row.prompt, row.prompt_ids, ids) for row, ids in samples)
        return own(samples)

    args = SamplingConfig(sampling_methods=["temperature:2"], max_new_tokens=6)
    sample_responses(model, tokenizer, prompts(3), tmp_path / "r.jsonl", args, spy)
    model.eval()
    alone = [model.score(torch.tensor([ids]), torch.ones(1, len(ids))).item() for ids in seen]
    scores = [score for record in load_responses(tmp_path / "r.jsonl") for score in record["scores"]]
    assert scores == pytest.approx(alone, abs=1e-4)
    assert not both.has_role(Role.REWARD)
    with pytest.raises(ValueError, match="nothing that scores responses"):
        ResponseScorer(both, tokenizer)
    with pytest.raises(ValueError, match="ensemble='best' is unknown"):
        ResponseScorer(model, tokenizer, ensemble="best")
    classifier = ClassifierReward(str(world / "classifier"), batch_size=2)
    texts = ["w3", "w4 w5 w6", "w7"]
    ids = [tokenizer(f"w1 w2 {text}<eos>", return_tensors="pt") for text in texts]
    alone = [classifier.model(input_ids=i["input_ids"]).logits.item() for i in ids]
    assert classifier(["w1 w2 "] * 3, texts) == pytest.approx(alone, abs=1e-5)
    with pytest.raises(ValueError, match="returned nan"):
        ResponseScorer(None, tokenizer, lambda **kwargs: [float("nan")] * 2)([*_two_samples(tokenizer)])


def _two_samples(tokenizer):
    from trl_ext.rrhf.data import RankedRow

    return [(RankedRow("w1", [6], [], []), [7]), (RankedRow("w1", [6], [], []), [8])]


def test_several_reward_adapters_are_one_ensemble(world, tokenizer):
    from trl_ext import SharedBaseModel

    both = SharedBaseModel.from_pretrained(
        str(world / "base"), reward_adapter=[world / "reward", world / "reward"], with_critic=False
    )
    both.heads["reward_2"].weight.data.mul_(3)  # the second scores three times the first
    samples = _two_samples(tokenizer)
    mean, least, less_variance = (
        ResponseScorer(both, tokenizer, ensemble=mode, ensemble_coef=0.5)(samples)
        for mode in ("mean", "min", "variance")
    )
    for m, low, v in zip(mean, least, less_variance, strict=True):
        first = m / 2
        assert low == pytest.approx(min(first, 3 * first), abs=1e-5)
        assert v == pytest.approx(m - 0.5 * first**2, abs=1e-5)


def test_resuming_gives_what_an_uninterrupted_run_gives(world, tmp_path):
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    sample(world, whole, 11)
    sample(world, parts, 11)
    lines = whole.read_bytes().splitlines(keepends=True)
    assert parts.read_bytes() == whole.read_bytes()
    parts.write_bytes(b"".join(lines[:5]) + lines[5][:20])  # five whole lines and a torn one
    report = sample(world, parts, 11)
    assert parts.read_bytes() == whole.read_bytes()
    assert (report.resumed, report.torn, report.prompts) == (5, 20, 11)


@pytest.mark.parametrize("count", [pytest.param(n, marks=pytest.mark.slow) for n in (60, 5000)])
def test_a_run_killed_twice_at_random_ends_complete(world, tmp_path, count):
    path, rng = tmp_path / "r.jsonl", random.Random()
    job = {"world": str(world), "path": str(path), "count": count}
    for share in sorted((rng.uniform(0.02, 0.5), rng.uniform(0.02, 0.5))):
        kill_once_it_has(int(share * count), job, rng)
    report = sample(world, path, count)
    assert report.resumed > 0
    records = check_file(path, count)
    sample(world, tmp_path / "whole.jsonl", count)
    expected = check_file(tmp_path / "whole.jsonl", count)
    assert [r["responses"] for r in records] == [r["responses"] for r in expected]


def test_what_is_wrong_with_a_file_is_said(world, tmp_path):
    path = tmp_path / "r.jsonl"
    sample(world, path, 4)
    with pytest.raises(ValueError, match=r"max_new_tokens=6 -> 5"):
        sample(world, path, 4, max_new_tokens=5)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"{torn\n" + lines[1])
    with pytest.raises(ValueError, match="line 2 is no record"):
        sample(world, path, 4)
    path.write_bytes(lines[0] * 2)
    with pytest.raises(ValueError, match="two lines with index 0"):
        sample(world, path, 4)
    path.write_bytes(lines[0].replace(b'"prompt": "', b'"prompt": "w9 '))
    with pytest.raises(ValueError, match="holds another prompt under index 0"):
        sample(world, path, 4)


def test_every_torn_end_is_removed(tmp_path):
    path = tmp_path / "r.jsonl"
    log = ResponseLog(path, {})
    log.append([{"index": 0, "prompt": "ä\u2028"}, {"index": 1, "prompt": "b"}])
    log.close()
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        again = ResponseLog(path, {})
        again.close()
        kept = first if first <= size < len(whole) else size if size == len(whole) else 0
        assert path.read_bytes() == whole[:kept]
        assert again.torn == size - kept
        assert sorted(again.done) == list(range(whole[:kept].count(b"\n")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling_methods": ["hot:3"]}, "sampling_methods holds 'hot:3'"),
        ({"sampling_methods": ["beam"]}, "sampling_methods holds 'beam'"),
        ({"sampling_methods": ["beam:2", "beam:3"]}, "each method once"),
        ({"sampling_methods": []}, "there would be no responses"),
        ({"sampling_temperature": 0.0}, r"sampling_temperature=0.0 must be"),
        ({"sampling_top_p": 0.0}, r"sampling_top_p=0.0 must be a number above 0 and at most 1"),
        ({"diversity_penalty": -1.0}, "diversity_penalty=-1.0 must be"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be a whole number"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**options)


def test_bad_datasets_are_named(model, tokenizer, tmp_path):
    args = SamplingConfig(max_new_tokens=60)
    path = tmp_path / "r.jsonl"
    with pytest.raises(ValueError, match="row 4: a prompt of 5 tokens and max_new_tokens=60"):
        sample_responses(model, tokenizer, prompts(5), path, args, scorer(tokenizer))
    columns = SamplingConfig(response_columns=["human"])
    with pytest.raises(ValueError, match="no column human"):
        sample_responses(model, tokenizer, prompts(5), path, columns, scorer(tokenizer))
    bad = prompts(2).add_column("scores", [1, 2])
    with pytest.raises(ValueError, match="has scores already"):
        sample_responses(model, tokenizer, bad, path, args, scorer(tokenizer))


def test_options_of_the_chat_template_reach_the_samples_and_the_settings(world, model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ '<assistant>' }}", "{{ '<assistant> ' + mark }}")
    dataset = Dataset.from_dict({"prompt": [[{"role": "user", "content": "w1"}]] * 2})
    args, seen = SamplingConfig(sampling_methods=["temperature:1"], max_new_tokens=3), []

    def scorer(samples):
        seen.extend(row.prompt_ids for row, _ in samples)
        return [0.0] * len(samples)

    encoder = TextEncoder(tokenizer, ENDS, {"mark": "w7"})
    sample_responses(model, encoder, dataset, tmp_path / "r.jsonl", args, scorer)
    assert {tokenizer.decode(ids) for ids in seen} == {"<user> w1 <end> <assistant> w7"}
    other = TextEncoder(tokenizer, ENDS, {"mark": "w8"})
    with pytest.raises(ValueError, match="chat_template_kwargs"):
        sample_responses(model, other, dataset, tmp_path / "r.jsonl", args, scorer)
