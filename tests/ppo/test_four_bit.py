"""PPO-Max on a 4-bit base with double quantisation, on a CPU: every step of a run, and what the card decides."""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import BitsAndBytesConfig, LlamaForCausalLM
from transformers.training_args import OptimizerNames
from trl import ModelConfig

from tests.layout import packed
from tests.ppo import tiny
from trl_ext import PPOMaxConfig, RewardModelConfig, Role, RRHFConfig, SharedBaseModel, runs
from trl_ext.ops.precision import best_dtype
from trl_ext.ppo import config as config_module
from trl_ext.roles import base as base_module
from trl_ext.roles import load_base
from trl_ext.scripts import models

pytest.importorskip("bitsandbytes")

NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


@pytest.fixture(scope="module")
def world_4bit(tmp_path_factory):
    """As `world`, of a size that the 4-bit kernels take: multiples of 32."""
    with pytest.MonkeyPatch.context() as patch:
        sizes = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 32}
        plain = tiny.tiny_config
        patch.setattr(tiny, "tiny_config", lambda **options: plain(**(sizes | options)))
        return tiny.build(tmp_path_factory.mktemp("world_4bit"))


def four_roles(world, **options):
    adapters = {"policy_adapter": world / "policy", "reward_adapter": world / "reward"}
    return SharedBaseModel.from_pretrained(str(world / "base"), quantization_config=NF4, **(adapters | options))


def run(world, folder, model=None, **options):
    return tiny.trainer(world, folder, model=four_roles(world) if model is None else model, **options)


def outputs(model, role):
    ids = torch.tensor([[6, 7, 8, 9, 10, 11]])
    model.eval()
    with torch.no_grad():
        if role is Role.REWARD:
            return model.score(ids, torch.ones_like(ids))
        found = model(**packed(ids, torch.ones_like(ids), 4), roles=(role,))
    return found.get("values", found.get("logps", found.get("reference_logps")))


@pytest.mark.parametrize(
    "path",
    [{"use_transformers_continuous_batching": True}, {"per_device_generate_batch_size": 1}],
    ids=["continuous batching", "one at a time"],
)
def test_the_policy_generates_from_its_adapter_and_the_base_is_left_alone(world_4bit, tmp_path, path):
    trainer = run(world_4bit, tmp_path, max_steps=2, generation_kwargs={"do_sample": False}, **path)
    quantised = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.dtype == torch.uint8}
    trainer.train()
    assert quantised
    assert all(torch.equal(quantised[name], p) for name, p in trainer.model.named_parameters() if name in quantised)
    plain = run(world_4bit, tmp_path, max_steps=2, generation_kwargs={"do_sample": False})
    plain.train()
    for entry, expected in zip(tiny.rollout_entries(trainer), tiny.rollout_entries(plain), strict=True):
        for name in ("completions/mean_length", "perplexity", "reward", "kl"):
            assert entry[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-4)


def test_merging_and_unmerging_the_policy_would_move_the_reference(world_4bit):
    """Why vLLM is refused: TRL does both at each sync."""
    model = four_roles(world_4bit)
    before = outputs(model, Role.REFERENCE)
    with pytest.raises(RuntimeError, match="quantises a 4-bit base anew"):
        model.merge_adapter()
    assert torch.equal(outputs(model, Role.REFERENCE), before)
    with pytest.warns(UserWarning, match="4-bit linear"):
        model.base_model.merge_adapter()
    with pytest.warns(UserWarning, match="4-bit linear"):
        model.base_model.unmerge_adapter()
    assert (outputs(model, Role.REFERENCE) - before).abs().max() > 0.01


def test_a_run_trains_two_roles_keeps_two_and_its_first_kl_is_zero(world_4bit, tmp_path):
    trainer = run(world_4bit, tmp_path, max_steps=3, gradient_checkpointing=True)
    layers = [m for m in trainer.model.modules() if type(m).__name__ == "Linear4bit" and hasattr(m, "quant_state")]
    assert trainer.model.is_loaded_in_4bit
    assert layers
    assert all(m.weight.quant_state.nested for m in layers if m.weight.quant_state is not None)
    before = {role: tiny.role_weights(trainer.model, role) for role in Role}
    scored = {role: outputs(trainer.model, role) for role in Role}
    assert torch.equal(scored[Role.POLICY], scored[Role.REFERENCE])
    trainer.train()
    history = tiny.rollout_entries(trainer)
    assert history[0]["kl"] == 0
    assert history[-1]["kl"] != 0
    assert all(entry["grad_norm/policy"] > 0 and entry["grad_norm/critic"] > 0 for entry in history)
    for role in Role:
        fixed = role in (Role.REFERENCE, Role.REWARD)
        assert tiny.same(before[role], tiny.role_weights(trainer.model, role)) is fixed, role
        assert torch.equal(scored[role], outputs(trainer.model, role)) is fixed, role


def test_evaluating_in_between_does_not_change_what_is_learned(world_4bit, tmp_path):
    """On some CPUs bitsandbytes packs the weights in eval mode and computes no gradient through them after that."""
    rollout = tiny.random_rollout(rows=4)
    plain, evaluated = run(world_4bit, tmp_path / "a"), run(world_4bit, tmp_path / "b")
    for role in Role:
        outputs(evaluated.model, role)
    evaluated.model.train()
    left, right = (tiny.gradients(trainer, copy.deepcopy(rollout)) for trainer in (plain, evaluated))
    assert left.keys() == right.keys()
    for name, gradient in left.items():
        torch.testing.assert_close(right[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_what_was_saved_loads_on_a_4_bit_base_and_computes_the_same(world_4bit, tmp_path):
    trainer = run(world_4bit, tmp_path, learning_rate=1e-3)
    trainer.train()
    trainer.save_model()
    found = {role: outputs(trainer.model, role) for role in (Role.POLICY, Role.CRITIC, Role.REWARD)}
    again = four_roles(
        world_4bit, policy_adapter=tmp_path, reward_adapter=tmp_path / "reward", critic_adapter=tmp_path / "critic"
    )
    for role, expected in found.items():
        torch.testing.assert_close(outputs(again, role), expected, rtol=0, atol=1e-6)
    assert torch.equal(outputs(again, Role.POLICY), outputs(again, Role.REFERENCE))


def test_a_resumed_run_ends_where_the_whole_run_ends(world_4bit, tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = run(world_4bit, tmp_path / "run", **options)
    whole.train()
    torch.manual_seed(12345)
    resumed = run(world_4bit, tmp_path / "run", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for role in Role:
        assert tiny.same(tiny.role_weights(whole.model, role), tiny.role_weights(resumed.model, role)), role
    left, right = (tiny.comparable(t.state.log_history[:-1]) for t in (whole, resumed))
    assert left == right


# ---------------------------------------------------------------------- precision of the adapters


def test_adapters_in_bfloat16_train_and_heads_stay_float32(world_4bit, tmp_path):
    model = four_roles(world_4bit, adapter_dtype="bfloat16")
    adapters = {p for name, p in model.named_parameters() if "lora_" in name}
    assert {p.dtype for p in adapters} == {torch.bfloat16}
    assert {p.dtype for p in model.heads.parameters()} == {torch.float32}
    before = tiny.role_weights(model, Role.POLICY)
    trainer = run(world_4bit, tmp_path, model)
    assert {p.dtype for p in adapters} == {torch.bfloat16}
    trainer.train()
    assert tiny.rollout_entries(trainer)[0]["kl"] == 0
    assert not tiny.same(before, tiny.role_weights(model, Role.POLICY))
    trainer.save_model()
    again = four_roles(world_4bit, policy_adapter=tmp_path, adapter_dtype=torch.bfloat16)
    assert tiny.same(tiny.role_weights(model, Role.POLICY), tiny.role_weights(again, Role.POLICY))


def test_adapters_are_float32_unless_asked(world_4bit):
    model = four_roles(world_4bit)
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.float32}


@pytest.mark.parametrize("dtype", ["float16", "int8", torch.float16, "half of it"])
def test_another_adapter_dtype_is_refused_before_loading(dtype):
    with pytest.raises(ValueError, match=r"adapter_dtype=.* must be 'float32' or 'bfloat16'"):
        SharedBaseModel.from_pretrained("no/such-model", adapter_dtype=dtype)


# ---------------------------------------------------------------------- what the card decides


@pytest.mark.parametrize(
    ("has_card", "has_bf16", "use_cpu", "expected"),
    [
        (False, False, False, torch.float32),
        (True, True, False, torch.bfloat16),
        (True, False, False, torch.float16),
        (True, True, True, torch.float32),
    ],
)
def test_the_best_dtype_of_a_card(monkeypatch, has_card, has_bf16, use_cpu, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_card)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16)
    assert best_dtype(use_cpu) == expected


@pytest.mark.parametrize(
    ("best", "given", "bf16", "fp16"),
    [
        (torch.float32, {}, False, False),
        (torch.float16, {}, False, True),
        (torch.float16, {"bf16": False}, False, False),
        (torch.bfloat16, {"fp16": True}, False, True),
        (torch.bfloat16, {"bf16": False}, False, False),
        (torch.bfloat16, {}, True, False),
    ],
)
@pytest.mark.parametrize("config", [PPOMaxConfig, RRHFConfig, RewardModelConfig])
def test_mixed_precision_is_what_the_card_has_unless_given(monkeypatch, tmp_path, config, best, given, bf16, fp16):
    monkeypatch.setattr(runs, "best_dtype", {True: best}.__getitem__)  # of use_cpu, which is True below
    args = config(str(tmp_path), report_to="none", use_cpu=True, **given)
    assert (args.bf16, args.fp16) == (bf16, fp16)


@pytest.mark.parametrize(
    ("given", "device", "quantised", "expected"),
    [
        (None, "cuda", True, OptimizerNames.PAGED_ADAMW_8BIT),
        (None, "cuda", False, config_module.DEFAULT_OPTIM),
        (None, "cpu", True, config_module.DEFAULT_OPTIM),
        ("adamw_torch", "cuda", True, "adamw_torch"),
        (config_module.DEFAULT_OPTIM, "cuda", True, config_module.DEFAULT_OPTIM),
    ],
)
def test_the_optimizer_of_a_quantised_base_on_a_card(monkeypatch, tmp_path, given, device, quantised, expected):
    args = PPOMaxConfig(str(tmp_path), report_to="none", use_cpu=True, **({"optim": given} if given else {}))
    monkeypatch.setattr(PPOMaxConfig, "device", torch.device(device))
    args.choose_optim(quantised)
    assert args.optim == expected


def test_the_trainer_says_whether_its_base_is_quantised(monkeypatch, world, world_4bit, tmp_path):
    asked = []
    monkeypatch.setattr(PPOMaxConfig, "choose_optim", lambda self, quantised: asked.append(quantised))
    run(world_4bit, tmp_path)
    tiny.trainer(world, tmp_path)
    assert asked == [True, False]


def test_on_a_card_without_bfloat16_a_base_in_bfloat16_is_loaded_in_float16(monkeypatch, tmp_path):
    monkeypatch.setattr(base_module, "best_dtype", lambda: torch.float16)
    for dtype, loaded in ((torch.bfloat16, torch.float16), (torch.float32, torch.float32)):
        model = LlamaForCausalLM(tiny.tiny_config(hidden_size=64, intermediate_size=64, head_dim=32)).to(dtype)
        model.save_pretrained(tmp_path / "base")
        base = load_base(str(tmp_path / "base"), quantization_config=copy.deepcopy(NF4))
        assert base.get_output_embeddings().weight.dtype == loaded
    base = load_base(str(tmp_path / "base"), quantization_config=copy.deepcopy(NF4), dtype="bfloat16")
    assert base.get_output_embeddings().weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("dtype", "training", "expected"),
    [
        (None, {"bf16": True, "fp16": False}, torch.bfloat16),
        ("auto", {"bf16": False, "fp16": True}, torch.float16),
        ("auto", {"bf16": False, "fp16": False}, torch.float32),
        (None, None, torch.bfloat16),
        ("float32", {"bf16": True, "fp16": False}, torch.float32),
    ],
)
def test_in_the_recipes_a_4_bit_base_computes_in_what_the_run_does(monkeypatch, dtype, training, expected):
    monkeypatch.setattr(models, "best_dtype", lambda: torch.bfloat16)
    flags = ModelConfig("base", load_in_4bit=True, use_bnb_nested_quant=True, dtype=dtype)
    found = models.quantization_of(flags, training and SimpleNamespace(**training))
    assert found.bnb_4bit_compute_dtype == expected
    assert found.bnb_4bit_use_double_quant
    assert flags.dtype == dtype
    assert models.quantization_of(ModelConfig("base", dtype=dtype)) is None
