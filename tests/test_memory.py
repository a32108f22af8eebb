"""The memory plan against real models: bytes of weights exactly, activations and caches within 10 %."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from tests.layout import packed
from trl_ext import Role, SharedBaseModel, memory
from trl_ext.memory import (
    LiveBytes,
    Setup,
    TooSmallError,
    Tracer,
    card_bytes,
    choose_batches,
    count_weights,
    largest_batches,
    load_config,
    parse_size,
    plan_memory,
    tensor_bytes,
)
from trl_ext.roles import AdapterWeights, load_base, lora_config

ROPE = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "num_hidden_layers": 4}
SIZES = {
    "llama": {**ROPE, "num_key_value_heads": 2},
    "qwen2": {**ROPE, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "gpt2": {"n_embd": 64, "n_head": 4, "n_layer": 4, "n_positions": 2048},
    "gpt_neox": ROPE,
}
SPECIAL = {"vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FLOAT32 = Setup(dtype=torch.float32, autocast=False, prompt_length=24, completion_length=40, optim="adamw_torch")
each_architecture = pytest.mark.parametrize("architecture", SIZES)


def make_config(architecture="llama", **options):
    config = AutoConfig.for_model(architecture, **SIZES.get(architecture, SIZES["llama"]) | SPECIAL | options)
    for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    return config


def real_model(config):
    model = SharedBaseModel(AutoModelForCausalLM.from_config(config), lora_config())
    return model.train()


def real_batch(rows, setup):
    """Left-padded prompts, so that the model needs its attention mask."""
    columns = setup.prompt_length + setup.completion_length
    mask = torch.ones(rows, columns, dtype=torch.long)
    mask[-1, :2] = 0
    return torch.full((rows, columns), 5), mask


# ---------------------------------------------------------------------------- sizes


def test_sizes_are_read_as_people_write_them():
    assert parse_size("24GB") == parse_size("24 GiB") == parse_size("24gib") == 24 * 2**30
    assert parse_size("8192MiB") == card_bytes("8GB") == 8 * 2**30


@pytest.mark.parametrize("text", ["24", "GB", "", "-3GB", "0GB", "many GB", "24 G"])
def test_a_size_that_cannot_be_read_is_refused(text):
    with pytest.raises(ValueError, match="24GB"):
        parse_size(text)


def test_auto_needs_a_card():
    if torch.cuda.is_available():
        assert card_bytes("auto") > 0
    else:
        with pytest.raises(ValueError, match="needs a CUDA device"):
            card_bytes("auto")


# ---------------------------------------------------------------------------- weights


@each_architecture
def test_parameters_and_bytes_are_those_of_the_real_model_in_float32(architecture):
    config = make_config(architecture)
    weights = count_weights(config, FLOAT32)
    base = AutoModelForCausalLM.from_config(config)
    assert weights.parameters == sum(p.numel() for p in base.parameters())
    assert weights.base_bytes == tensor_bytes(base)
    head = torch.zeros(1, 64)
    model = SharedBaseModel(base, lora_config(), AdapterWeights(lora_config(), None, head))
    adapters = sum(weights.adapter_bytes[role] for role in (Role.POLICY, Role.REWARD, Role.CRITIC))
    assert tensor_bytes(model) == weights.base_bytes + adapters + weights.head_bytes
    assert weights.adapted == len(model.lora_layers)
    assert sorted(weights.trained) == sorted(p.numel() for p in model.parameters() if p.requires_grad)
    assert weights.gradient_bytes == 4 * sum(weights.trained)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert weights.trained_bytes == sum(p.numel() * p.element_size() for p in trained)
    assert weights.optimizer_bytes == 8 * sum(weights.trained)


@each_architecture
def test_bytes_in_4_bits_are_those_of_the_real_model(architecture, tmp_path):
    AutoModelForCausalLM.from_config(make_config(architecture)).save_pretrained(tmp_path)
    for double_quant in (True, False):
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double_quant
        )
        base = load_base(str(tmp_path), quantization_config=quantization, dtype=torch.bfloat16)
        setup = Setup(load_in_4bit=True, double_quant=double_quant)
        weights = count_weights(load_config(str(tmp_path)), setup)
        assert weights.base_bytes == tensor_bytes(base)
        assert weights.quantised == sum(type(module).__name__ == "Linear4bit" for module in base.modules())
        model = SharedBaseModel(base, lora_config())
        trained = weights.adapter_bytes[Role.POLICY] + weights.adapter_bytes[Role.CRITIC] + 4 * 64
        assert tensor_bytes(model) == weights.base_bytes + trained


def test_states_of_the_8_bit_optimizer_by_hand():
    config = make_config(hidden_size=64)
    weights = count_weights(config, replace(FLOAT32, optim="adamw_8bit", lora=lora_config(r=128)))
    # A q projection's A is 128 x 64 = 8192 elements: 2 bytes each, 32 blocks with two float32 constants.
    # A critic's head, 64 elements, stays in 32 bits.
    by_hand = sum(8 * n if n < 4096 else 2 * n + 8 * -(-n // 256) for n in weights.trained)
    assert 8192 in weights.trained
    assert weights.optimizer_bytes == by_hand
    assert weights.paged_bytes == 0


# ---------------------------------------------------------------------------- activations and caches


@pytest.mark.parametrize(
    "architecture", ["llama", "gpt_neox", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen2", "gpt2"))]
)
@pytest.mark.parametrize("checkpointing", [True, False])
def test_what_the_update_keeps_and_peaks_at(architecture, checkpointing):
    config, setup = make_config(architecture), replace(FLOAT32, checkpointing=checkpointing)
    predicted = Tracer(config, setup).update(3)
    model = real_model(config)
    if checkpointing:
        model.gradient_checkpointing_enable()
    ids, mask = real_batch(3, setup)
    weights = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    options = {"roles": (Role.POLICY, Role.CRITIC), **packed(ids, mask, setup.completion_length)}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(**options)
    if not checkpointing:  # the hooks of checkpointing take the place of these, and keep its inputs elsewhere
        assert predicted.kept == pytest.approx(sum(saved.values()), rel=0.1)
    del out
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        out = model(**options)
        kept = live.now
        (out["logps"].sum() + out["values"].sum()).backward()
    assert predicted.kept == pytest.approx(kept, rel=0.1)
    gradients = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    assert live.peak - gradients <= 1.1 * predicted.peak
    assert live.peak >= 0.9 * predicted.peak


@pytest.mark.parametrize("architecture", [*SIZES, "mistral"])
def test_the_cache_is_the_real_one(architecture):
    options = {"sliding_window": 16} if architecture == "mistral" else {}
    config = make_config(architecture, **options)
    predicted = Tracer(config, FLOAT32).decode(3)
    base = AutoModelForCausalLM.from_config(config).eval()
    ids, mask = real_batch(3, FLOAT32)
    with torch.no_grad():
        cache = base(ids[:, :-1], attention_mask=mask[:, :-1], use_cache=True).past_key_values
    storages = {
        t.untyped_storage()._cdata: t.untyped_storage() for layer in cache.layers for t in (layer.keys, layer.values)
    }
    assert predicted.kept == pytest.approx(sum(s.nbytes() for s in storages.values()), rel=0.1)
    if architecture == "llama":  # keys and values, 4 layers, 2 heads of 16, float32
        assert predicted.kept == pytest.approx(2 * 4 * 3 * 63 * 2 * 16 * 4, rel=0.02)


@pytest.mark.slow
def test_other_batches_and_depths_lie_on_the_line():
    config = make_config(num_hidden_layers=6)
    tracer = Tracer(config, FLOAT32)
    between = tracer.update(4)
    exact = tracer._traced("update", 4)
    assert between.peak == pytest.approx(exact.peak, rel=0.02)
    tracer.depths = (6, 7)
    assert tracer._traced("update", 4).peak == pytest.approx(exact.peak, rel=0.02)


# ---------------------------------------------------------------------------- the plan


@pytest.fixture(scope="module")
def planned():
    config = make_config(num_hidden_layers=1)  # what depends on depth is tested on real models
    return config, Tracer(config, FLOAT32), count_weights(config, FLOAT32)


def test_phases_add_up_and_grow_with_the_batch(planned):
    _, tracer, weights = planned
    plan = plan_memory(tracer, weights, 4, rollout_batch=8)
    update = plan.phases["update"]
    parts = update.base + update.adapters + update.heads + update.optimizer + update.gradients + update.copy
    assert update.allocated == parts + update.kept + update.working
    assert update.needed == update.allocated + update.fragmentation + update.context
    assert plan.allocated == max(phase.allocated for phase in plan.phases.values())
    assert plan_memory(tracer, weights, 8, rollout_batch=8).phases["update"].needed > update.needed
    largest = largest_batches(tracer, weights, plan.needed)
    assert largest["update"] >= 4 or largest["generate"] >= 8
    assert min(largest.values()) >= 4


def test_where_the_size_of_updates_is_held_a_copy_of_what_is_trained_lies_beside_the_update(planned):
    config, tracer, weights = planned
    phases = plan_memory(tracer, weights, 4).phases
    assert {name: phase.copy for name, phase in phases.items() if phase.copy} == {"update": weights.trained_bytes}
    free = plan_memory(Tracer(config, replace(FLOAT32, holds_updates=False)), weights, 4).phases["update"]
    assert phases["update"].allocated - free.allocated == weights.trained_bytes > 0
    assert ("copy before the update", "0.00", "0.00", "0.00", "0.00") in plan_memory(tracer, weights, 4).table()[1]


def test_chosen_batches_fit_and_divide_the_optimizer_batch(planned):
    config, tracer, weights = planned
    card = plan_memory(tracer, weights, 5, rollout_batch=24).needed
    plan, evaluated = choose_batches(config, FLOAT32, card, optimizer_batch=24, rollout_batch=24)
    assert plan.fits(card)
    assert 24 % plan.train_batch == 0
    assert plan.generate_batch == 24
    assert evaluated >= plan.train_batch


def test_a_rollout_batch_whose_cache_does_not_fit_is_generated_in_parts(planned):
    config, tracer, weights = planned
    card = plan_memory(tracer, weights, 1, rollout_batch=64).needed
    rollout = 2048
    assert not plan_memory(tracer, weights, 1, rollout_batch=rollout).fits(card)
    plan, evaluated = choose_batches(config, FLOAT32, card, optimizer_batch=1, rollout_batch=rollout)
    assert plan.fits(card)
    assert 64 <= plan.generate_batch < rollout
    assert evaluated <= plan.generate_batch
    assert not plan_memory(tracer, weights, 1, rollout_batch=2 * plan.generate_batch).fits(card)


@pytest.mark.slow
def test_a_card_too_small_says_what_is_missing_and_what_would_help(planned):
    config, *_ = planned
    with pytest.raises(TooSmallError, match=r"missing(.|\n)*load_in_4bit: true: (.|\n)*a smaller model"):
        choose_batches(config, replace(FLOAT32, checkpointing=False), 2**20, optimizer_batch=2, rollout_batch=4)


def test_bad_setups_are_refused(planned, tmp_path):
    _, tracer, weights = planned
    with pytest.raises(ValueError, match="optim='sgd'"):
        Setup(optim="sgd")
    with pytest.raises(ValueError, match="policy and critic"):
        Setup(adapters=(Role.POLICY,))
    with pytest.raises(ValueError, match="completion_length=0"):
        Setup(completion_length=0)
    with pytest.raises(ValueError, match="batch of phase generate is 0"):
        plan_memory(tracer, weights, 0)
    with pytest.raises(ValueError, match="has no configuration"):
        load_config(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "no_such_thing"}')
    with pytest.raises(ValueError, match="upgrade transformers"):
        load_config(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}')
    with pytest.raises(ValueError, match=r"quantised already \(gptq\)"):
        load_config(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ValueError, match="causal language model"):
        count_weights(load_config(str(tmp_path)), Setup())


def test_sequences_longer_than_the_positions_are_refused(planned):
    config = make_config(max_position_embeddings=32)
    with pytest.raises(ValueError, match="32 positions"):
        plan_memory(Tracer(config, FLOAT32), planned[2], 1)


@pytest.mark.slow
def test_on_several_cards_weights_are_shared_out_and_nothing_is_lost():
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=256, num_key_value_heads=2, max_position_embeddings=64, **sizes)
    setup = memory.Setup(load_in_4bit=True, optim="adamw_torch", prompt_length=16, completion_length=16)
    weights = memory.count_weights(config, setup)
    plan = memory.plan_memory(memory.Tracer(config, setup), weights, 1)
    found = memory.shares(config, setup)
    assert found.split + found.unsplit == weights.base_bytes
    assert found.layers == 4
    assert found.head == 256 * 64 * 2
    assert found.layer == (4 * 64 * 64 + 3 * 64 * 128) // 2 + 2 * 64 * 2  # packed, and two norms in bfloat16
    one, two = (memory.on_cards(plan, found, cards)["update"] for cards in (1, 2))
    assert one == plan.phases["update"]
    assert two.base == found.split // 2 + found.unsplit
    assert (two.optimizer, two.gradients) == (one.optimizer // 2, one.gradients // 2)
    assert two.copy == -(-one.copy // 2) > 0
    assert two.kept == one.kept
    adapters = sum(weights.adapter_bytes.values())
    assert two.working == one.working + 2 * (found.layer + adapters // 4) + found.head
    with pytest.raises(ValueError, match="cards=0"):
        memory.on_cards(plan, found, 0)
