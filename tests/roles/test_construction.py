"""What each role is made of, in every way that a shared model can be made."""

import copy
import importlib.util
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig, LlamaModel
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from tests.layout import packed
from trl_ext.roles import AdapterWeights, Role, SharedBaseModel, load_base, shared_base_model
from trl_ext.roles.adapters import write_adapter

ALL = (Role.POLICY, Role.REFERENCE, Role.CRITIC)


def adapter_parameters(model, role):
    name = f".{role.adapter_name}."
    return {key: p for key, p in model.named_parameters() if "lora_" in key and name in key}


def as_role(name, role):
    return name.replace(".default.", f".{role.adapter_name}.")


@torch.no_grad()
def logits(model, batch):
    return model(input_ids=batch[0], attention_mask=batch[1]).logits


@torch.no_grad()
def kl_per_token(model, batch):
    outputs = model(**packed(*batch, 5), roles=ALL)
    return outputs["logps"] - outputs["reference_logps"]


def perturb(model, role, size=0.1):
    with torch.no_grad():
        for parameter in adapter_parameters(model, role).values():
            parameter.add_(size)


def test_under_a_fresh_policy_the_reference_is_the_bare_base_bit_for_bit(make_base, batch, architecture):
    base = make_base(architecture)
    with torch.no_grad():
        expected = logits(base, batch)
        model = SharedBaseModel(copy.deepcopy(base))
        assert not adapter_parameters(model, Role.REFERENCE)
        assert (kl_per_token(model, batch) == 0).all()
        perturb(model, Role.POLICY)
        assert (kl_per_token(model, batch) != 0).any()
        with model.role(Role.REFERENCE):
            assert torch.equal(logits(model, batch), expected)
        assert not torch.equal(logits(model, batch), expected)


def test_a_given_policy_is_its_own_frozen_reference(make_base, make_adapter, batch, architecture):
    base = make_base(architecture)
    bare = copy.deepcopy(base)
    model = SharedBaseModel(base, policy=make_adapter(base))
    policy, reference = adapter_parameters(model, Role.POLICY), adapter_parameters(model, Role.REFERENCE)
    assert len(policy) == len(reference) > 0
    for name, parameter in policy.items():
        copied = reference[as_role(name, Role.REFERENCE)]
        assert torch.equal(copied, parameter)
        assert copied.data_ptr() != parameter.data_ptr()
        assert parameter.requires_grad
        assert not copied.requires_grad
    assert (kl_per_token(model, batch) == 0).all()
    with torch.no_grad(), model.role(Role.REFERENCE):
        before = logits(model, batch)
        assert not torch.equal(before, logits(bare, batch))
        perturb(model, Role.POLICY)
        assert torch.equal(logits(model, batch), before)
    assert (kl_per_token(model, batch) != 0).any()


def test_the_policy_computes_what_peft_computes_with_its_adapter(make_base, make_adapter, batch, architecture):
    base = make_base(architecture)
    adapter = make_adapter(base)
    plain = get_peft_model(copy.deepcopy(base), copy.deepcopy(adapter.config))
    plain.load_state_dict({k.replace("weight", "default.weight"): v for k, v in adapter.weights.items()}, strict=False)
    model = SharedBaseModel(base, policy=adapter)
    torch.testing.assert_close(logits(model, batch), logits(plain, batch), rtol=0, atol=1e-5)


def test_on_a_4_bit_base_the_first_kl_is_exactly_zero(make_base, make_adapter, batch, tmp_path):
    base = make_base("llama", hidden_size=64, intermediate_size=64)
    base.save_pretrained(tmp_path / "base")
    write_adapter(tmp_path / "sft", make_adapter(base))
    model = SharedBaseModel.from_pretrained(
        str(tmp_path / "base"),
        policy_adapter=tmp_path / "sft",
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    )
    assert model.is_loaded_in_4bit
    assert (kl_per_token(model, batch) == 0).all()
    with torch.no_grad(), model.role(Role.REFERENCE):
        reference = logits(model, batch)
    for layer in model.lora_layers:  # "reference = adapters off" is another model: the base before the SFT
        layer._disable_adapters = True
    with torch.no_grad():
        assert not torch.allclose(logits(model, batch), reference, atol=0.1)


def quantised_folder(make_base, folder):
    """A checkpoint in 4 bits, as on the Hub, and the model that was saved."""
    pytest.importorskip("bitsandbytes")
    make_base(hidden_size=64, intermediate_size=128, num_key_value_heads=2).save_pretrained(folder / "plain")
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    base = load_base(str(folder / "plain"), quantization_config=quantization, dtype="float32")
    base.save_pretrained(folder / "quantised")
    return folder / "quantised", base


def test_a_checkpoint_in_4_bits_keeps_its_quantisation(make_base, batch, tmp_path):
    folder, base = quantised_folder(make_base, tmp_path)
    loaded = load_base(str(folder), dtype="float32")
    assert loaded.is_loaded_in_4bit
    assert any(type(module).__name__ == "Linear4bit" for module in loaded.modules())
    with torch.no_grad():
        torch.testing.assert_close(loaded(*batch).logits, base(*batch).logits, rtol=1e-3, atol=1e-3)
    model = SharedBaseModel(loaded).train()
    model(**packed(*batch, 5), roles=(Role.POLICY,))["logps"].sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())


def test_a_base_quantised_another_way_says_what_it_cannot_do(make_base, tmp_path, monkeypatch):
    folder, _ = quantised_folder(make_base, tmp_path)
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"quantised by gptq already, quantization_config .* Drop it"):
        load_base(str(tmp_path / "plain"), quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    if importlib.util.find_spec("optimum") is None:  # transformers says what it needs for such a base
        with pytest.raises(ImportError, match=r"GPTQ.*optimum"):
            load_base(str(tmp_path / "plain"))
    monkeypatch.setattr(Bnb4BitHfQuantizer, "is_trainable", False)
    with pytest.raises(ValueError, match="quantised by bitsandbytes, which computes no gradients"):
        load_base(str(folder))


def test_the_critic_starts_as_a_copy_of_the_reward_role(make_base, make_adapter, batch):
    base = make_base()
    reward = make_adapter(base, seed=2, head=True)
    model = SharedBaseModel(base, policy=make_adapter(base), reward=reward)
    for name, parameter in adapter_parameters(model, Role.REWARD).items():
        copied = model.get_parameter(name.replace(".reward.", ".critic."))
        assert torch.equal(copied, parameter)
        assert copied.requires_grad
        assert not parameter.requires_grad
    assert torch.equal(model.heads["critic"].weight, reward.head)
    assert torch.equal(model.heads["reward"].weight, reward.head)
    ids, mask = batch
    last = (mask * torch.arange(9)).argmax(1)
    scores = model.score(ids, mask)
    torch.testing.assert_close(model.values(ids, mask)[torch.arange(3), last], scores, rtol=0, atol=1e-5)
    perturb(model, Role.CRITIC)
    model.heads["critic"].weight.data.add_(1)
    assert torch.equal(model.score(ids, mask), scores)


def test_a_fresh_critic_has_a_zero_head_and_the_adapter_of_a_fresh_policy(make_base, batch):
    model = SharedBaseModel(make_base(), LoraConfig(r=3, target_modules=["q_proj"]))
    assert (model.values(*batch) == 0).all()
    shapes = {name: p.shape for name, p in adapter_parameters(model, Role.POLICY).items()}
    critic = {name: p.shape for name, p in adapter_parameters(model, Role.CRITIC).items()}
    assert critic == {as_role(name, Role.CRITIC): shape for name, shape in shapes.items()}
    assert not model.has_role(Role.REWARD)


def test_a_given_critic_wins_over_the_reward_role(make_base, make_adapter):
    base = make_base()
    critic = make_adapter(base, seed=3, head=True, target_modules=["q_proj", "v_proj"], r=2)
    model = SharedBaseModel(base, reward=make_adapter(base, seed=2, head=True), critic=critic)
    assert torch.equal(model.heads["critic"].weight, critic.head)
    for key, value in critic.weights.items():
        assert torch.equal(model.get_parameter(key.replace("weight", "critic.weight")), value)
    assert len(adapter_parameters(model, Role.CRITIC)) == len(critic.weights)


def test_heads_are_float32_and_on_a_bfloat16_base_too(make_base, make_adapter, batch):
    base = make_base(dtype=torch.bfloat16)
    reward = make_adapter(base, head=True)
    model = SharedBaseModel(base, reward=reward)
    assert {head.weight.dtype for head in model.heads.values()} == {torch.float32}
    assert torch.equal(model.heads["reward"].weight, reward.head.float())
    assert model.values(*batch).dtype == model.score(*batch).dtype == torch.float32


def test_construction_leaves_the_base_and_the_arguments_as_they_were(make_base, make_adapter):
    base = make_base()
    before = {name: p.clone() for name, p in base.named_parameters()}
    reward = make_adapter(base, head=True)
    configured = LoraConfig(r=4, target_modules=["q_proj"])
    arguments = copy.deepcopy((configured.to_dict(), reward.config.to_dict(), reward.weights))
    model = SharedBaseModel(base, configured, reward=reward)
    for name, value in before.items():
        own = model.get_parameter("base_model.model." + _wrapped(model, name))
        assert torch.equal(own, value)
        assert not own.requires_grad
    assert (configured.to_dict(), reward.config.to_dict()) == arguments[:2]
    assert all(torch.equal(reward.weights[key], value) for key, value in arguments[2].items())


def _wrapped(model, name):
    module, _, leaf = name.rpartition(".")
    wrapped = hasattr(model.get_submodule("base_model.model." + module), "base_layer")
    return f"{module}.base_layer.{leaf}" if wrapped else name


def test_whatever_trl_takes_as_a_model_becomes_a_shared_one(make_base, tmp_path, batch):
    base = make_base()
    base.save_pretrained(tmp_path)
    by_id = shared_base_model(str(tmp_path), LoraConfig(r=2))
    by_model = shared_base_model(copy.deepcopy(base), LoraConfig(r=2))
    for model in (by_id, by_model):
        assert model.peft_config["default"].r == 2
        assert not adapter_parameters(model, Role.REFERENCE)
    assert shared_base_model(by_id) is by_id
    torch.manual_seed(0)
    peft_model = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, init_lora_weights=False))
    with torch.no_grad():
        expected = logits(peft_model, batch)
        taken_over = shared_base_model(peft_model)
        actual = logits(taken_over, batch)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
        with taken_over.role(Role.REFERENCE):
            assert torch.equal(logits(taken_over, batch), actual)


def test_a_merged_adapter_is_not_taken_over_twice(make_base):
    peft_model = get_peft_model(make_base(), LoraConfig(r=2, init_lora_weights=False))
    peft_model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        shared_base_model(peft_model)


def test_what_is_no_causal_language_model_is_refused(make_base):
    base = make_base()
    with pytest.raises(TypeError, match="dict"):
        shared_base_model({})
    with pytest.raises(TypeError, match="LlamaModel"):
        shared_base_model(LlamaModel(base.config))
    for options in ({"quantization_config": BitsAndBytesConfig(load_in_4bit=True)},):
        with pytest.raises(ValueError, match="quantization_config"):
            shared_base_model(base, **options)
    peft_model = get_peft_model(copy.deepcopy(base), LoraConfig(r=2))
    with pytest.raises(ValueError, match="peft_config"):
        shared_base_model(peft_model, LoraConfig(r=2))
    named = get_peft_model(copy.deepcopy(base), LoraConfig(r=2), adapter_name="sft")
    with pytest.raises(ValueError, match=r"sft.*default"):
        shared_base_model(named)


def test_a_reward_adapter_needs_a_head(make_base, make_adapter):
    base = make_base()
    with pytest.raises(ValueError, match="num_labels=1"):
        SharedBaseModel(base, reward=make_adapter(base))
    wide = make_adapter(base)
    with pytest.raises(ValueError, match="hidden size 17"):
        SharedBaseModel(base, reward=AdapterWeights(wide.config, wide.weights, torch.zeros(1, 17)))


def test_a_fresh_policy_must_start_as_the_base(make_base):
    with pytest.raises(ValueError, match=r"init_lora_weights=False.*True"):
        SharedBaseModel(make_base(), LoraConfig(r=2, init_lora_weights=False))
    assert SharedBaseModel(make_base(), LoraConfig(r=2, init_lora_weights="gaussian"))
