"""What trl_ext.roles leans on in PEFT. Red here means: PEFT has changed, look at trl_ext/roles before anything else."""

import copy
import warnings

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    PeftModelForCausalLM,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import Linear4bit
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel

IDS = torch.tensor([[3, 4, 5, 6]])


def tiny_llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
        )
    ).eval()


def tiny_gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=32, n_layer=1, n_head=2, n_positions=16)).eval()


def with_two_adapters(base):
    """Two adapters, "default" and "critic", that change the output."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        model = get_peft_model(base, config)
        model.add_adapter("critic", copy.deepcopy(config))
    return model.eval()


@pytest.fixture(scope="module")
def base_4bit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(folder)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return LlamaForCausalLM.from_pretrained(folder, quantization_config=quantization, device_map={"": "cpu"}).eval()


@pytest.fixture(params=["linear", "conv1d", "4-bit"])
def base(request):
    if request.param == "4-bit":
        return copy.deepcopy(request.getfixturevalue("base_4bit"))
    return tiny_llama() if request.param == "linear" else tiny_gpt2()


def lora_layers(model):
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def test_two_attributes_of_a_layer_decide_what_computes_and_touch_no_gradient(base):
    bare = logits(base)
    model = with_two_adapters(base)
    layers = lora_layers(model)
    assert layers
    assert all(layer._active_adapter == ["default"] and layer._disable_adapters is False for layer in layers)

    expected = {"default": logits(model)}
    model.set_adapter("critic")
    expected["critic"] = logits(model)
    model.set_adapter("default")
    flags = [p.requires_grad for p in model.parameters()]

    for name in ("critic", "default", "critic"):
        for layer in layers:
            layer._active_adapter = [name]
        assert torch.equal(logits(model), expected[name])
    for layer in layers:
        layer._disable_adapters = True
    assert torch.equal(logits(model), bare)
    for layer in layers:
        layer._disable_adapters = False
    assert torch.equal(logits(model), expected["critic"])

    assert [p.requires_grad for p in model.parameters()] == flags
    distinct = [expected["default"], expected["critic"], bare]
    assert not any(torch.allclose(distinct[i], distinct[i - 1], atol=1e-3) for i in range(3))


def test_the_4_bit_base_has_4_bit_lora_layers(base_4bit):
    layers = lora_layers(with_two_adapters(copy.deepcopy(base_4bit)))
    assert layers
    assert all(isinstance(layer, Linear4bit) for layer in layers)


def test_pefts_own_switches_do_freeze_the_other_adapters():
    """Why there is a switch of our own. When PEFT stops doing this, ours can go."""
    model = with_two_adapters(tiny_llama())
    model.set_adapter("critic")
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".default." in name)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    with model.disable_adapter():
        pass
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".default." in name)


def test_names_of_parameters_end_in_kind_adapter_weight():
    model = with_two_adapters(tiny_llama())
    lora = [name for name, _ in model.named_parameters() if "lora_" in name]
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight" in lora
    assert {tuple(name.split(".")[-3:]) for name in lora} == {
        (kind, adapter, "weight") for kind in ("lora_A", "lora_B") for adapter in ("default", "critic")
    }
    frozen = [name for name, _ in model.named_parameters() if "lora_" not in name]
    assert "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight" in frozen
    assert "base_model.model.lm_head.weight" in frozen  # "all-linear" leaves the LM head alone


def test_a_state_dict_is_one_adapter_without_its_name_and_comes_back():
    model = with_two_adapters(tiny_llama())
    weights = get_peft_model_state_dict(model, adapter_name="critic", save_embedding_layers=False)
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in weights
    assert {tuple(key.split(".")[-2:]) for key in weights} == {("lora_A", "weight"), ("lora_B", "weight")}
    other = with_two_adapters(tiny_llama())
    before = get_peft_model_state_dict(other, adapter_name="default")
    before = {key: value.clone() for key, value in before.items()}
    set_peft_model_state_dict(other, weights, adapter_name="critic")
    after = get_peft_model_state_dict(other, adapter_name="critic")
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[key], value) for key, value in weights.items())
    unchanged = get_peft_model_state_dict(other, adapter_name="default")
    assert all(torch.equal(unchanged[key], value) for key, value in before.items())


def test_the_head_of_a_sequence_classifier_is_saved_as_score_weight():
    config = tiny_llama().config
    config.num_labels = 1
    base = AutoModelForSequenceClassification.from_config(config)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS"))
    weights = get_peft_model_state_dict(model)
    assert weights["base_model.model.score.weight"].shape == (1, 64)
    assert set(model.peft_config["default"].modules_to_save) <= {"classifier", "score"}
    backbone = {key for key in weights if "lora_" in key}
    causal = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert backbone == set(get_peft_model_state_dict(causal))


def test_a_fresh_adapter_is_the_identity_and_deleting_one_leaves_the_rest():
    base = tiny_llama()
    bare = logits(base)
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert torch.equal(logits(model), bare)
    model.add_adapter("ref", model.peft_config["default"])
    names = {name for name, _ in model.named_parameters() if ".ref." not in name}
    model.delete_adapter("ref")
    assert set(model.peft_config) == {"default"}
    assert {name for name, _ in model.named_parameters()} == names


def test_adapters_of_a_half_precision_base_are_float32():
    model = with_two_adapters(tiny_llama().to(torch.bfloat16))
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.float32}


def test_a_layer_says_what_it_wraps_and_whether_it_is_merged():
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj", "embed_tokens", "lm_head"]))
    assert isinstance(model.get_input_embeddings(), BaseTunerLayer)
    assert isinstance(model.get_input_embeddings().get_base_layer(), nn.Embedding)
    assert isinstance(model.base_model.model.get_output_embeddings(), BaseTunerLayer)
    assert not any(layer.merged for layer in lora_layers(model))
    model.merge_adapter()
    assert all(layer.merged for layer in lora_layers(model))


def test_the_methods_that_a_shared_model_replaces_are_there():
    for name in ("set_adapter", "disable_adapter", "load_adapter", "save_pretrained", "add_adapter", "delete_adapter"):
        assert callable(getattr(PeftModel, name))
    assert issubclass(PeftModelForCausalLM, PeftModel)
    model = with_two_adapters(tiny_llama())
    assert model.active_adapters == ["default"]
    assert model.get_base_model() is model.base_model.model
