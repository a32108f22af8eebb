"""Versions of an adapter at a server: in what order they come and go, and what is left after a crash of either side."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.ppo import tiny
from tests.vllm_stand_in import StandIn
from trl_ext import Role, SharedBaseModel
from trl_ext.generation.vllm_adapters import AdapterVersions
from trl_ext.generation.vllm_server import VLLMError, VLLMServer


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny.build(tmp_path_factory.mktemp("world"))


@pytest.fixture
def server():
    with StandIn() as stand_in:
        yield stand_in


def versions(server, tmp_path) -> AdapterVersions:
    return AdapterVersions(VLLMServer(server.url, 10, 1), tmp_path / "seen by both", tmp_path / "run")


def folders(tmp_path) -> set[str]:
    return {path.name for path in (tmp_path / "seen by both").glob("*/*")}


@pytest.fixture
def adapter(world):
    return tiny.four_roles(world).plain_adapter(Role.POLICY)


def test_each_version_has_a_name_and_a_path_of_its_own_and_the_old_one_goes_when_the_new_one_is_there(
    server, tmp_path, adapter
):
    own = versions(server, tmp_path)
    names = []
    for _ in range(3):
        names.append(own.publish(adapter))
        own.retire_all_but({names[-1]})
        assert set(server.loaded) == folders(tmp_path) == {names[-1]}
    assert len(set(names)) == 3
    assert server.events == [
        ("load", names[0]), ("load", names[1]), ("unload", names[0]), ("load", names[2]), ("unload", names[1]),
    ]  # fmt: skip
    own.close()
    assert server.loaded == {}
    assert not list((tmp_path / "seen by both").iterdir())


def test_the_folder_is_whole_when_the_server_hears_of_it(server, tmp_path, adapter):
    server.on_load = lambda name, path: load_file(f"{path}/adapter_model.safetensors")
    versions(server, tmp_path).publish(adapter)
    assert not [name for name in folders(tmp_path) if name.startswith(".")]


def test_what_a_crashed_process_of_the_same_run_left_is_taken_away_and_nothing_else(server, tmp_path, adapter):
    crashed, other = versions(server, tmp_path), AdapterVersions(VLLMServer(server.url), tmp_path / "seen by both", "x")
    left, others = crashed.publish(adapter), other.publish(adapter)
    (crashed.folder / f".unfinished-{crashed.prefix}-9-abc").mkdir()
    (crashed.folder / "notes of the user").mkdir()
    versions(server, tmp_path)
    assert set(server.loaded) == {others}
    assert folders(tmp_path) == {others, "notes of the user"}
    assert left != others


def test_what_a_restarted_server_no_longer_knows_is_no_error(server, tmp_path, adapter):
    own = versions(server, tmp_path)
    first = own.publish(adapter)
    server.stop()
    server.start()
    second = own.publish(adapter)
    own.retire_all_but({second})
    assert set(server.loaded) == folders(tmp_path) == {second}
    assert first != second


def test_a_version_that_could_not_be_unloaded_is_tried_again(server, tmp_path, adapter, caplog):
    own = versions(server, tmp_path)
    first = own.publish(adapter)
    unload, server.unload = server.unload, lambda handler, name: server.refuse(handler, "busy", 503)
    second = own.publish(adapter)
    own.retire_all_but({second})
    assert "busy It is tried again with the next" in caplog.text
    server.unload = unload
    assert set(server.loaded) == {first, second}
    own.retire_all_but({second})
    assert set(server.loaded) == folders(tmp_path) == {second}


def test_a_version_that_was_not_loaded_is_removed_and_the_one_before_stays(server, tmp_path, adapter):
    own = versions(server, tmp_path)
    first = own.publish(adapter)

    def refuse(name, path):
        raise ValueError("LoRA rank 4 is greater than max_lora_rank 2.")

    server.on_load = refuse
    with pytest.raises(VLLMError, match="max_lora_rank"):
        own.publish(adapter)
    assert set(server.loaded) == folders(tmp_path) == {first}


@pytest.mark.parametrize("rslora", [False, True])
def test_a_published_adapter_computes_the_same_without_patterns(tmp_path, world, rslora):
    patterns = {"rank_pattern": {"q_proj": 2, "down_proj": 6}, "alpha_pattern": {"v_proj": 3}, "use_rslora": rslora}
    base = AutoModelForCausalLM.from_pretrained(world / "base")
    model = tiny.randomized(SharedBaseModel(base, tiny.lora(**patterns))).eval()
    ids = torch.randint(6, 18, (2, 9))
    with torch.no_grad(), model.role(Role.POLICY):
        expected = model(ids).logits
    plain = model.plain_adapter(Role.POLICY)
    assert {tensor.shape[0] for key, tensor in plain.weights.items() if "lora_A" in key} == {6}
    with StandIn() as server:
        name = (own := versions(server, tmp_path)).publish(plain)
        saved = json.loads((own.folder / name / "adapter_config.json").read_text())
        assert saved["r"] == saved["lora_alpha"] == 6
        assert not (saved["rank_pattern"])
        assert not (saved["alpha_pattern"])
        assert not (saved["use_rslora"])
        again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world / "base"), own.folder / name)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_the_copy_that_is_published_does_not_move_with_the_policy(world):
    model = tiny.four_roles(world)
    plain = model.plain_adapter(Role.POLICY)
    before = {key: tensor.clone() for key, tensor in plain.weights.items()}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 1
    assert tiny.same(plain.weights, before)
