"""What recipes sample at their end goes through the server that the run samples through."""

from types import SimpleNamespace

import pytest
from transformers import LlamaForCausalLM

from tests.ppo import tiny
from tests.vllm_stand_in import Sampling, StandIn
from trl_ext.scripts.pipeline import answers
from trl_ext.scripts.ppo_max import sample_completions
from trl_ext.scripts.rlhf_rounds import answer
from trl_ext.text import TextEncoder


def test_before_and_after_are_sampled_by_the_server(tmp_path, monkeypatch):
    world = tiny.build(tmp_path / "world")
    with StandIn(**Sampling(world / "base").hooks()) as server:
        trainer = tiny.trainer(world, tmp_path / "run", vllm_server_url=server.url, vllm_wait=5.0)
        monkeypatch.setattr(trainer.model, "generate", lambda *_, **__: pytest.fail("the model itself samples"))
        prompts, events = list(tiny.prompts(3)["prompt"]), len(server.events)
        before, after = sample_completions(trainer, prompts)
        assert [len(before), len(after)] == [3, 3]
        prompt_ids, *written = answers(trainer, trainer.encoder, prompts)
        assert prompt_ids == [trainer.encoder.prompt_ids(prompt) for prompt in prompts]
        decode = trainer.processing_class.batch_decode
        for texts, ids in zip((before, after), written, strict=True):
            assert texts == [text.strip() for text in decode(ids, skip_special_tokens=True)]
        kinds = [kind for kind, _ in server.events[events:]]
        assert kinds.count("load") == 2, "reference and policy, once each"
        assert kinds.count("generate") == 4


def test_answers_between_rounds_are_sampled_by_the_server(tmp_path):
    world = tiny.build(tmp_path / "world")
    with StandIn(**Sampling(world / "base").hooks()) as server:
        training = tiny.config(tmp_path / "run", vllm_server_url=server.url, vllm_wait=5.0)
        base, encoder = LlamaForCausalLM.from_pretrained(world / "base"), TextEncoder(tiny.tiny_tokenizer(), [1, 5])
        work = SimpleNamespace(training=training, base=base, encoder=encoder)
        path = tmp_path / "answers" / "a.jsonl"
        path.parent.mkdir()
        rows = answer(work, world / "policy", tiny.prompts(3), path, 2)
        assert [len(row["responses"]) for row in rows] == [2, 2, 2]
        assert len([body for body in server.bodies if body["n"] == 2]) == 3
        assert server.loaded == {}
