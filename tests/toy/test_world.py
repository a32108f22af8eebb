import os
import random
import subprocess
import sys

import numpy
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardTrainer, SFTTrainer

from trl_ext.toy import ToyWorld, build_tokenizer, build_world, task

SCALE = 0.01
LINEAR_LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module")
def world_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("worlds")


@pytest.fixture(scope="module")
def world(world_dir):
    return build_world(world_dir, seed=3, scale=SCALE)


@pytest.fixture
def no_training(monkeypatch):
    def fail(self, *args, **kwargs):
        raise AssertionError("a trainer ran")

    for trainer in (SFTTrainer, RewardTrainer):
        monkeypatch.setattr(trainer, "train", fail)


def test_datasets(world):
    assert isinstance(world, ToyWorld)
    assert (len(world.train_prompts), len(world.eval_prompts), len(world.pretrain_texts)) == (4096, 512, 2048)
    assert world.train_prompts.column_names == world.eval_prompts.column_names == ["prompt"]
    assert world.pretrain_texts.column_names == ["text"]
    assert not set(world.train_prompts["prompt"]) & set(world.eval_prompts["prompt"])


def test_base_is_trained_and_loads_with_transformers(world):
    tokenizer = AutoTokenizer.from_pretrained(world.base)
    model = AutoModelForCausalLM.from_pretrained(world.base)
    assert model.dtype == torch.float32
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    ids = tokenizer("one day the little fox went to the river .", return_tensors="pt")["input_ids"]
    assert model(input_ids=ids, labels=ids).loss.item() < torch.tensor(float(len(tokenizer))).log().item()


def test_policy_adapter_loads_with_plain_peft(world):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world.base), world.policy_adapter)
    config = model.peft_config["default"]
    assert config.task_type == "CAUSAL_LM"
    assert set(config.target_modules) == LINEAR_LAYERS
    changed = [weight.abs().max() > 0 for name, weight in model.named_parameters() if "lora_B" in name]
    assert len(changed) == 3 * len(LINEAR_LAYERS)
    assert all(changed)


def test_reward_adapter_loads_with_plain_peft_and_brings_its_head(world):
    saved = load_file(world.reward_adapter / "adapter_model.safetensors")
    base = AutoModelForSequenceClassification.from_pretrained(world.base, num_labels=1)
    model = PeftModel.from_pretrained(base, world.reward_adapter)
    config = model.peft_config["default"]
    assert config.task_type == "SEQ_CLS"
    assert "score" in config.modules_to_save
    assert set(config.target_modules) == LINEAR_LAYERS
    assert torch.equal(model.base_model.model.score.weight, saved["base_model.model.score.weight"])
    tokenizer = AutoTokenizer.from_pretrained(world.reward_adapter)
    batch = tokenizer(["the fox was kind .<eos>", "he bit a frog . then he went home .<eos>"], padding=True)
    assert model(**batch.convert_to_tensors("pt")).logits.shape == (2, 1)


def test_a_second_call_only_loads(world, world_dir, no_training):
    again = build_world(world_dir, seed=3, scale=SCALE)
    assert (again.base, again.policy_adapter, again.reward_adapter) == (
        world.base,
        world.policy_adapter,
        world.reward_adapter,
    )
    assert again.train_prompts["prompt"] == world.train_prompts["prompt"]
    assert again.pretrain_texts["text"] == world.pretrain_texts["text"]


@pytest.mark.parametrize("change", [{"seed": 4}, {"scale": 2 * SCALE}])
def test_another_seed_or_scale_is_another_world(world, world_dir, no_training, change):
    with pytest.raises(AssertionError, match="a trainer ran"):
        build_world(world_dir, **({"seed": 3, "scale": SCALE} | change))


def test_same_seed_gives_the_same_weights_and_keeps_the_callers_random_state(world, tmp_path):
    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
    expected = random.random(), numpy.random.rand(), torch.rand(1).item()
    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
    again = build_world(tmp_path, seed=3, scale=SCALE)
    assert (random.random(), numpy.random.rand(), torch.rand(1).item()) == expected
    for name in ("base/model", "policy/adapter_model", "reward/adapter_model"):
        first = load_file(world.base.parent / f"{name}.safetensors")
        second = load_file(again.base.parent / f"{name}.safetensors")
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_an_interrupted_build_continues_with_the_stage_it_was_in(tmp_path, monkeypatch):
    train = RewardTrainer.train

    def killed(self, *args, **kwargs):
        train(self, *args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(RewardTrainer, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        build_world(tmp_path, scale=SCALE)
    (root,) = tmp_path.iterdir()
    assert stages(root) == ["base", "policy"]
    finished = {name: (root / name).stat().st_mtime_ns for name in ("base", "policy")}
    left = root / ".unfinished-reward-of-a-killed-process"
    (left / "reward").mkdir(parents=True)

    monkeypatch.setattr(RewardTrainer, "train", train)
    world = build_world(tmp_path, scale=SCALE)
    assert {name: (root / name).stat().st_mtime_ns for name in finished} == finished
    assert (world.reward_adapter / "adapter_model.safetensors").exists()
    assert not left.exists()


def stages(root):
    return sorted(path.name for path in root.iterdir() if not path.name.startswith("."))


@pytest.mark.slow
def test_in_a_run_of_several_processes_one_builds_the_same_world_and_the_others_load_it(
    world, tmp_path, monkeypatch, no_training
):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "nowhere.invalid"}.items():
        monkeypatch.setenv(name, value)
    found = build_world(tmp_path, seed=3, scale=SCALE)  # no trainer runs in this process
    assert stages(found.base.parent) == ["base", "policy", "reward"]
    left, right = (load_file(each.reward_adapter / "adapter_model.safetensors") for each in (world, found))
    assert all(torch.allclose(left[name], right[name], atol=1e-5) for name in left)
    written = (found.base / "config.json").stat().st_mtime_ns
    monkeypatch.setenv("RANK", "1")
    assert build_world(tmp_path, seed=3, scale=SCALE).base == found.base
    assert (found.base / "config.json").stat().st_mtime_ns == written


@pytest.mark.slow
def test_a_build_that_fails_beside_several_processes_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    (tmp_path / "file").write_text("")
    with pytest.raises(RuntimeError, match="could not be built"):
        build_world(tmp_path / "file", scale=SCALE)


@pytest.fixture(scope="module")
def chat_world(tmp_path_factory):
    return build_world(tmp_path_factory.mktemp("chat"), seed=3, scale=SCALE, template="chatml")


def test_a_world_of_conversations_has_text_behind_the_end_token(chat_world):
    tokenizer = AutoTokenizer.from_pretrained(chat_world.base)
    prompt = chat_world.train_prompts[0]["prompt"]
    assert [message["role"] for message in prompt] == ["user"]
    answer = {"role": "assistant", "content": "she helped a frog . then she went home ."}
    ids = tokenizer.apply_chat_template([*prompt, answer], tokenize=True, return_dict=False)
    header = tokenizer.apply_chat_template(prompt, tokenize=True, return_dict=False, add_generation_prompt=True)
    assert tokenizer.convert_ids_to_tokens(ids[-2:]) == ["<|im_end|>", "\n"]
    assert ids[: len(header)] == header
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.eos_token == "<|im_end|>"
    assert AutoModelForCausalLM.from_pretrained(chat_world.base).generation_config.eos_token_id == ids[-2]
    assert "<|im_end|>\n<|im_start|>assistant" in chat_world.pretrain_texts[0]["text"]
    for adapter in (chat_world.policy_adapter, chat_world.reward_adapter):
        assert (adapter / "adapter_model.safetensors").is_file()


def test_a_plain_world_is_as_it_was():
    tokenizer = build_tokenizer()
    assert tokenizer.chat_template is None
    assert tokenizer.eos_token == "<eos>"
    assert len(tokenizer) == 4 + len(task.VOCABULARY)
    with pytest.raises(ValueError, match="template='alpaca' is unknown"):
        build_tokenizer("alpaca")


@pytest.mark.parametrize("scale", [0, -1.0, float("nan")])
def test_scale_must_be_positive(tmp_path, scale):
    with pytest.raises(ValueError, match="scale"):
        build_world(tmp_path, scale=scale)


def test_importing_the_package_and_the_reward_is_cheap():
    code = "import sys, trl_ext.toy as toy; toy.gold_reward(['']); assert not {'torch', 'trl'} & set(sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_unknown_names_are_refused_and_public_ones_listed():
    import trl_ext.toy as toy

    assert {"gold_reward", "build_tokenizer", "build_model", "build_world", "ToyWorld"} <= set(dir(toy))
    with pytest.raises(AttributeError, match="no attribute"):
        _ = toy.build_castle
    assert toy.gold_reward is task.gold_reward
