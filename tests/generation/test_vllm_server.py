"""The client of vLLM's protocol against a server in a thread: what is sent, and answers of every wrong kind."""

import json
import threading
import time

import pytest

from tests.vllm_stand_in import BASE, StandIn
from trl_ext.generation.vllm_server import (
    TRIES,
    BadAnswerError,
    Prompt,
    SamplingParameters,
    UnknownModelError,
    VLLMError,
    VLLMServer,
)

PARAMETERS = SamplingParameters(4, (1, 5), temperature=0.7, top_p=0.9, top_k=3, min_p=0.1, repetition_penalty=1.2)
PROMPTS = [Prompt((7, 8), 2, 10), Prompt((9,), 2, 11), Prompt((6, 6, 6), 2, 12)]


@pytest.fixture
def server():
    with StandIn() as stand_in:
        yield stand_in


def client(server, **options) -> VLLMServer:
    return VLLMServer(server.url, **{"timeout": 20, "wait": 5} | options)


def test_completions_come_in_the_order_of_the_prompts_each_with_its_own_seed(server):
    found = client(server).complete(BASE, PROMPTS, PARAMETERS)
    for prompt, group in zip(PROMPTS, found, strict=True):
        assert len(group) == 2
        for i, completion in enumerate(group):
            length = min(prompt.seed % 3 + i, PARAMETERS.max_tokens - 1)
            assert completion.ids == [prompt.ids[0]] * length + [1]
            assert completion.logps == [-0.5 - i] * (length + 1)


def test_every_sampling_parameter_is_sent(server):
    client(server).complete(BASE, PROMPTS[:1], PARAMETERS)
    (body,) = server.bodies
    sent = {
        "model": BASE, "prompt": [7, 8], "n": 2, "seed": 10, "max_tokens": 4, "min_tokens": 0, "stop": [],
        "stop_token_ids": [1, 5], "ignore_eos": True, "temperature": 0.7, "top_p": 0.9, "top_k": 3, "min_p": 0.1,
        "repetition_penalty": 1.2, "presence_penalty": 0.0, "frequency_penalty": 0.0, "logprobs": 0,
        "return_token_ids": True, "echo": False, "stream": False, "add_special_tokens": False,
        "skip_special_tokens": False, "use_beam_search": False, "watermarking": False,
    }  # fmt: skip
    assert body == sent


def test_choices_in_another_order_are_put_back(server):
    server.faults = ["reordered"]
    (group,) = client(server).complete(BASE, PROMPTS[:1], PARAMETERS)
    assert [completion.logps[0] for completion in group] == [-0.5, -1.5]


def test_an_empty_completion_is_none_of_the_errors(server):
    server.faults = ["empty"]
    (group,) = client(server).complete(BASE, PROMPTS[:1], PARAMETERS)
    assert (group[0].ids, group[0].logps) == ([], [])
    assert group[1].ids


@pytest.mark.parametrize(
    "fault", ["torn", "closed", "short", "twice", "few logprobs", "no logprobs", "nan", "aborted", "too long", "failed"]
)
def test_an_answer_that_is_none_is_asked_for_again_and_then_an_error(server, fault):
    server.faults = [fault] * (TRIES - 1)
    (group,) = client(server).complete(BASE, PROMPTS[:1], PARAMETERS)
    assert [len(completion.ids) for completion in group] == [2, 3]
    assert len(server.bodies) == TRIES
    server.faults = [fault] * TRIES
    with pytest.raises(VLLMError):
        client(server).complete(BASE, PROMPTS[:1], PARAMETERS)
    assert len(server.bodies) == 2 * TRIES


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no ids", "use vLLM 0.10.2 or later"),
        ("another prompt", "a prompt of 3 tokens where one of 2 was sent"),
        ("another end", "did not end at one of our end tokens"),
        ("behind the end", "did not end at one of our end tokens"),
        ("cut", "cut after 1 of 4 tokens.*larger --max-model-len"),
        ("refused", "refused with 400.*maximum context length is 8"),
    ],
)
def test_a_server_that_answers_something_else_is_an_error_at_once(server, fault, message):
    server.faults = [fault]
    with pytest.raises(VLLMError, match=message):
        client(server).complete(BASE, PROMPTS[:1], PARAMETERS)
    assert len(server.bodies) == 1


def test_an_unknown_adapter_is_told_from_other_refusals(server):
    with pytest.raises(UnknownModelError, match="knows no model or adapter 'gone'"):
        client(server).complete("gone", PROMPTS, PARAMETERS)


def test_loading_is_never_repeated(server, tmp_path):
    (tmp_path / "adapter_model.safetensors").touch()
    tries = []

    def fail(name, path):
        tries.append(name)
        raise ValueError("LoRA rank 64 is greater than max_lora_rank 16.")

    server.on_load = fail
    with pytest.raises(VLLMError, match=r"rank 64 is greater than max_lora_rank 16.*--max-lora-rank"):
        client(server).load("a", str(tmp_path))
    assert tries == ["a"]


def test_what_is_not_there_to_load_is_explained(server, tmp_path):
    with pytest.raises(VLLMError, match=r"No adapter found.*set vllm_adapter_dir to one that both see"):
        client(server).load("a", str(tmp_path / "nowhere"))


def test_unloading_what_is_not_there_is_no_error(server):
    client(server).unload("never loaded")
    assert server.events == []


def test_a_request_that_takes_too_long_is_an_error_that_names_the_option(server):
    server.answer = lambda *given: time.sleep(1)
    with pytest.raises(VLLMError, match=r"took more than 0.2 s for a request. Raise vllm_timeout"):
        client(server, timeout=0.2).complete(BASE, PROMPTS[:1], PARAMETERS)


def test_no_server_is_an_error_that_says_how_to_start_one():
    with StandIn() as gone:
        pass
    with pytest.raises(VLLMError, match=r"did not answer for 0.1 s \(ConnectionError\).*trl-ext vllm-serve"):
        client(gone, wait=0.1).wait_until_healthy()


def test_a_server_that_restarts_is_waited_for(server):
    asking = client(server, wait=20)
    asking.complete(BASE, PROMPTS, PARAMETERS)
    server.stop()
    again = threading.Timer(0.5, server.start)
    again.start()
    assert len(asking.complete(BASE, PROMPTS, PARAMETERS)) == len(PROMPTS)
    again.join()


def test_many_requests_are_under_way_at_once():
    waiting = threading.Barrier(8)

    def together(model, path, body, index):
        return [5], [-1.0], "stop"

    with StandIn(together) as server:
        complete = server.complete
        server.complete = lambda handler, body: waiting.wait(20) >= 0 and complete(handler, body)
        found = client(server).complete(BASE, [Prompt((7,), 1, i) for i in range(8)], PARAMETERS)
    assert len(found) == 8


def test_the_key_is_sent_where_it_is_set(server, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    seen = []
    complete = server.complete
    server.complete = lambda handler, body: seen.append(handler.headers["Authorization"]) or complete(handler, body)
    client(server).complete(BASE, PROMPTS[:1], PARAMETERS)
    assert seen == ["Bearer secret"]


def test_what_is_no_json_is_shown(server):
    server.complete = lambda handler, body: server.send(handler, "<html>proxy</html>")
    with pytest.raises(BadAnswerError, match="gave no JSON: '<html>proxy"):
        client(server).complete(BASE, PROMPTS[:1], PARAMETERS)
    server.complete = lambda handler, body: server.send(handler, json.dumps([1]))
    with pytest.raises(BadAnswerError, match="where an object was asked for"):
        client(server).complete(BASE, PROMPTS[:1], PARAMETERS)
