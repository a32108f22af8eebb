"""One copy of the base for trainer and engine: what is shared, what is refused, and when the cache has memory."""

import pytest
import torch
from transformers import AutoConfig, BitsAndBytesConfig, LlamaForCausalLM

from tests.ppo import tiny
from tests.vllm_in_process_stand_in import Fused, installed
from trl_ext import Role, SharedBaseModel
from trl_ext.generation.in_process import engine_first, weights_of
from trl_ext.generation.vllm_options import VLLMRolloutOptions
from trl_ext.generation.vllm_server import VLLMError
from trl_ext.ppo.completing import check_sampler, held_weights
from trl_ext.roles.held import HeldWeights, check_held, empty_base

LARGEST = "sampling/sampling_logp_difference/max"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny.build(tmp_path_factory.mktemp("world"))


def one_copy(world, folder, **options):
    """A trainer of a fresh policy, whose engine is in this process."""
    options = {"dataset": tiny.prompts(16), "peft_config": tiny.lora(), "vllm_one_copy": True} | options
    return tiny.trainer(world, folder, model=str(world / "base"), reward_funcs=tiny.count_words, **options)


def base_weights(model) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if model.owner(name) is None}


def test_a_run_trains_on_the_engines_own_tensors_and_leaves_them_as_they_were(world, tmp_path, monkeypatch):
    started = installed(monkeypatch, world / "base")
    trainer = one_copy(world, tmp_path, max_steps=3)
    (engine,) = started
    assert engine.options["max_lora_rank"] == 8
    assert engine.options["max_model_len"] == max(map(len, map(str.split, tiny.prompts(16)["prompt"]))) + 6
    assert engine.options["dtype"] == "float32"
    storages = {p.untyped_storage().data_ptr() for p in engine.model.parameters()}
    weights = base_weights(trainer.model)
    assert {p.untyped_storage().data_ptr() for p in weights.values()} == storages
    plain = dict(LlamaForCausalLM.from_pretrained(world / "base").named_parameters())
    assert len(weights) == len(plain)
    assert trainer.model.get_base_model().generation_config.eos_token_id == [1, 5]
    before = {name: p.clone() for name, p in engine.model.named_parameters()}
    policy = tiny.role_weights(trainer.model, Role.POLICY)
    probe = len(engine.events)
    trainer.train()
    assert tiny.same(dict(engine.model.named_parameters()), before)
    assert not tiny.same(tiny.role_weights(trainer.model, Role.POLICY), policy)
    assert max(entry[LARGEST] for entry in tiny.rollout_entries(trainer)) < 1e-5
    assert engine.events[probe:] == ["load", "generate", "load", "unload", "generate", "load", "unload", "generate"]
    assert set(engine.awake) == {2 * 4 * 8 * 4}
    assert all(tensor.untyped_storage().nbytes() == 0 for tensor in engine.cache)


def test_the_start_of_an_engine_draws_no_random_numbers(world, monkeypatch):
    installed(monkeypatch, world / "base")
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    held = engine_first(str(world / "base"), tiny.lora(r=4, rank_pattern={"q_proj": 9}), options())
    assert held.holder.llm.options["max_lora_rank"] == 16
    SharedBaseModel.from_pretrained(str(world / "base"), peft_config=tiny.lora(), held=held)
    torch.manual_seed(3)
    engine_first(str(world / "base"), None, options())
    assert torch.equal(torch.rand(2), expected)


def options() -> VLLMRolloutOptions:
    given = VLLMRolloutOptions(vllm_one_copy=True)
    given.seed = 0
    return given


def test_a_base_that_was_cut_out_of_the_engine_wrongly_is_found_before_training(world, tmp_path, monkeypatch):
    installed(monkeypatch, world / "base", order=1)
    with pytest.raises(VLLMError, match="Without an adapter they differ too"):
        one_copy(world, tmp_path)


def test_a_weight_that_is_a_copy_is_refused(world, monkeypatch):
    installed(monkeypatch, world / "base")
    held = engine_first(str(world / "base"), None, options())
    model = SharedBaseModel.from_pretrained(str(world / "base"), peft_config=tiny.lora(), held=held)
    check_held(base_weights(model).items(), held)
    name, weight = list(base_weights(model).items())[3]
    weight.data = weight.data.clone()
    with pytest.raises(ValueError, match=f"1 weights of the base are not the engine's but copies, first '{name}'"):
        check_held(base_weights(model).items(), held)


def shapes_and_weights(world):
    config = AutoConfig.from_pretrained(world / "base")
    shapes = {name: weight.shape for name, weight in empty_base(config).named_parameters()}
    plain = LlamaForCausalLM.from_pretrained(world / "base")
    return shapes, {name: weight.detach() for name, weight in plain.named_parameters()}


def test_weights_that_an_engine_lacks_or_holds_otherwise_are_refused_by_name(world):
    shapes, weights = shapes_and_weights(world)
    name = "model.layers.1.self_attn.k_proj.weight"
    del shapes[name.replace("k_proj", "v_proj")]
    with pytest.raises(ValueError, match=r"fuses 'model.layers.1.self_attn.qkv_proj'.*has no 'v_proj'"):
        weights_of(Fused(weights), shapes)
    shapes, weights = shapes_and_weights(world)
    del weights["model.norm.weight"]
    with pytest.raises(ValueError, match=r"the engine has no weight 'model.norm.weight'.*vllm_server_url"):
        weights_of(Fused(weights), shapes)
    shapes, weights = shapes_and_weights(world)
    shapes[name] = torch.Size([12, 16])
    with pytest.raises(ValueError, match=r"holds .*q_proj.weight.* in a weight of \(48, 16\)"):
        weights_of(Fused(weights), shapes)


def test_four_bits_are_slices_of_the_engines_bytes_and_share_its_states(world):
    """The layers are fused as vllm-bnb-plugin fuses them: bytes one behind the other, a state for each."""
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    quantization = BitsAndBytesConfig(**settings, bnb_4bit_use_double_quant=False)
    shapes, _ = shapes_and_weights(world)
    own = LlamaForCausalLM.from_pretrained(
        world / "base", dtype=torch.bfloat16, quantization_config=quantization, device_map={"": "cpu"}
    )
    quantised = dict(own.named_parameters())
    fused = Fused({name: weight.detach() for name, weight in quantised.items()})
    for name, weight in fused.named_parameters():
        plain = name.replace(".base_layer.", ".")
        parts = [plain]
        for whole, each in fused.packed_modules_mapping.items():
            if whole in plain:
                parts = [plain.replace(whole, part) for part in each]
        if hasattr(quantised[parts[0]], "quant_state"):
            weight.bnb_quant_state = {i: quantised[part].quant_state for i, part in enumerate(parts)}
            weight.bnb_shard_offsets = torch.tensor([0, *(len(quantised[part]) for part in parts)]).cumsum(0)
    held = HeldWeights(weights_of(fused, shapes), torch.bfloat16)
    asked = BitsAndBytesConfig(**settings, bnb_4bit_use_double_quant=True)
    model = SharedBaseModel.from_pretrained(
        str(world / "base"), peft_config=tiny.lora(), quantization_config=asked, held=held
    )
    check_held(base_weights(model).items(), held)
    layer = model.get_base_model().model.layers[1].self_attn.k_proj
    absmax = quantised["model.layers.1.self_attn.k_proj.weight"].quant_state.absmax
    assert layer.base_layer.weight.quant_state.absmax.data_ptr() == absmax.data_ptr()
    ids = torch.tensor([[6, 7, 8, 9]])
    with torch.no_grad(), model.role(Role.REFERENCE):  # the bare base
        assert torch.equal(model(ids).logits, own(ids).logits)
    with pytest.raises(ValueError, match="the engine holds the base in 4 bits, and the trainer asks for"):
        SharedBaseModel.from_pretrained(str(world / "base"), held=held)


def test_a_model_that_was_loaded_before_the_engine_is_refused(world, tmp_path):
    with pytest.raises(ValueError, match=r"loaded without the engine.*engine_first"):
        tiny.trainer(world, tmp_path, vllm_one_copy=True)


def test_without_vllm_in_the_environment_the_error_says_where_it_belongs(world, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "vllm", None)
    with pytest.raises(ImportError, match="vllm_one_copy=True needs vLLM in the trainer's own environment"):
        one_copy(world, tmp_path)


def test_a_quantisation_that_vllm_does_not_have_is_refused_before_it_is_started(world):
    with pytest.raises(ValueError, match="NF4 alone"):
        engine_first(str(world / "base"), None, options(), quantization_config=BitsAndBytesConfig(load_in_8bit=True))


def test_options_of_the_model_that_would_not_reach_the_engine_are_refused_by_name(world):
    with pytest.raises(ValueError, match="rope_scaling of model_init_kwargs would not reach the engine"):
        engine_first(str(world / "base"), None, options(), rope_scaling={"rope_type": "linear", "factor": 2.0})


def test_one_copy_goes_with_no_engine_that_holds_the_weights_itself(world, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="vllm_one_copy=True does not go with FSDP or DeepSpeed"):
        check_sampler(tiny.config(tmp_path, vllm_one_copy=True), str(world / "base"), None)


def test_one_copy_needs_prompts_whose_length_is_known(world, tmp_path):
    with pytest.raises(ValueError, match="a train_dataset whose prompts can be measured"):
        held_weights(tiny.config(tmp_path, vllm_one_copy=True), str(world / "base"), None, longest=None)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"vllm_one_copy": True, "vllm_server_url": "http://localhost:8000"}, "do not go together"),
        ({"vllm_one_copy": True, "rollout_lag": 1}, "rollout_lag=1 belongs to a server"),
        ({"vllm_one_copy": True, "vllm_wait": 5.0}, "vllm_wait=5.0 belongs to a server"),
        ({"vllm_kv_cache_gib": 2.0}, "vllm_kv_cache_gib=2.0 does nothing without vllm_one_copy"),
        ({"vllm_one_copy": True, "vllm_kv_cache_gib": 0.0}, "vllm_kv_cache_gib"),
        ({"vllm_one_copy": True, "cache_implementation": "static"}, "does not go with vllm_one_copy"),
    ],
)
def test_options_that_do_not_go_with_one_copy_are_refused(tmp_path, given, told):
    with pytest.raises(ValueError, match=told):
        tiny.config(tmp_path, **given)
