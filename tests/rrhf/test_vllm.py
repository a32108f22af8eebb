"""RRHF online, files of responses and evaluations through a server that speaks vLLM's protocol and samples."""

import pytest
from transformers import AutoTokenizer

from tests.ppo import tiny
from tests.rrhf import ranked
from tests.vllm_stand_in import BASE, Sampling, StandIn
from trl_ext import Role
from trl_ext.generation.seeded import generate_responses, prompt_generator
from trl_ext.generation.vllm_options import VLLMOptions
from trl_ext.generation.vllm_probe import checked_engine
from trl_ext.generation.vllm_server import SamplingParameters
from trl_ext.report.evaluation import evaluate_policy
from trl_ext.rrhf import ResponseScorer, SamplingConfig, sample_responses


@pytest.fixture
def server(world):
    with StandIn(**Sampling(world / "base").hooks()) as stand_in:
        yield stand_in


def test_online_responses_come_from_the_policy_as_it_is_then(world, tmp_path, server):
    options = {"online_every_steps": 1, "reward_funcs": ranked.count_w3, "num_online_responses": 3, "max_steps": 2}
    trainer = ranked.trainer(world, tmp_path, dataset=tiny.prompts(8), vllm_server_url=server.url, **options)
    events, bodies = len(server.events), len(server.bodies)
    trainer.train()
    first, second = (name for kind, name in server.events[events:] if kind == "load")
    assert server.events[events:] == [
        ("load", first), ("generate", first), ("load", second), ("unload", first), ("generate", second),
    ]  # fmt: skip
    asked = server.bodies[bodies:]
    assert [body["n"] for body in asked] == [3] * 8
    assert len({body["seed"] for body in asked}) == 8
    assert trainer.state.log_history[0]["completions/mean_length"] > 0


def test_a_server_has_nothing_to_do_offline(tmp_path):
    with pytest.raises(ValueError, match=r"vllm_server_url=.* has no place in this run: .*online_every_steps"):
        ranked.config(tmp_path, vllm_server_url="http://h:1")


def test_a_file_of_responses_and_an_evaluation_are_the_same_with_the_same_seed(world, tmp_path, server):
    model, tokenizer = ranked.tuned(world), AutoTokenizer.from_pretrained(world / "base")
    parameters = SamplingParameters(6, (1, 5))
    engine = checked_engine(model, VLLMOptions(server.url), parameters, tokenizer, tmp_path)
    scorer, rows = ResponseScorer(model, tokenizer, tiny.count_words), tiny.prompts(4)
    files = []
    for name in "ab":
        args = SamplingConfig(sampling_methods=["temperature:2", "nucleus:1"], max_new_tokens=6)
        sample_responses(model, tokenizer, rows, tmp_path / name, args, scorer, engine=engine)
        files.append((tmp_path / name).read_text())
    assert files[0] == files[1]
    assert {body["top_p"] for body in server.bodies[-4:]} == {0.9}
    args = SamplingConfig(sampling_methods=["temperature:2", "beam:2"], max_new_tokens=6)
    with pytest.raises(ValueError, match="has beam, which no vLLM server is asked for"):
        sample_responses(model, tokenizer, rows, tmp_path / "c", args, scorer, engine=engine)
    options = {"max_new_tokens": 6, "best_of": 2, "engine": engine}
    found = [evaluate_policy(model, tokenizer, rows, scorer, **options) for _ in range(2)]
    assert found[0] == found[1]


def test_the_role_says_which_adapter_samples(world, tmp_path, server):
    model, tokenizer = ranked.tuned(world), AutoTokenizer.from_pretrained(world / "base")
    engine = checked_engine(model, VLLMOptions(server.url), SamplingParameters(6, (1, 5)), tokenizer, tmp_path)
    options = {"eos_token_ids": [1, 5], "pad_token_id": 0, "engine": engine}
    sampled = {}
    for role in (Role.POLICY, Role.REFERENCE):  # which start as the same adapter
        generators = [prompt_generator(0, i) for i in range(3)]
        sampled[role] = generate_responses(model, [[7], [8, 9], [10]], generators, 2, 6, role=role, **options)
        assert server.events[-1][1] != BASE
    assert sampled[Role.POLICY] == sampled[Role.REFERENCE]
    assert len({name for kind, name in server.events if kind == "generate"}) >= 2
    with pytest.raises(ValueError, match="method='beam'"):
        generate_responses(model, [[7]], [prompt_generator(0, 0)], 2, 6, method="beam", **options)
