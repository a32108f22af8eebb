"""The folded product of a LoRA layer: PEFT's numbers and gradients, and PEFT's own code wherever it does not apply."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from trl_ext.roles.folding import _FoldedLinear, fold


class Projections(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(12, 8)


def layers(**options):
    """The same LoRA layer twice, with adapters "default" and "reward": as PEFT made it, and folded."""
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["linear"], init_lora_weights=False, **options)
    model = get_peft_model(Projections(), config)
    model.add_adapter("reward", config)
    plain = model.base_model.model.linear.eval()
    plain.base_layer.requires_grad_(False)
    folded = copy.deepcopy(plain)
    fold(folded)
    return plain, folded


@pytest.fixture
def calls(monkeypatch):
    """The inputs that went through the folded product."""
    seen = []
    apply = _FoldedLinear.apply
    monkeypatch.setattr(_FoldedLinear, "apply", lambda *args: seen.append(args[0]) or apply(*args))
    return seen


def x_of(tokens=16, dtype=torch.float32):
    return torch.randn(2, tokens // 2, 12, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def outputs_and_gradients(layer, x):
    layer.zero_grad()
    y = layer(x)
    y.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad} | gradients


def test_output_and_gradients_are_those_of_peft(calls):
    plain, folded = layers()
    expected, actual = outputs_and_gradients(plain, x_of()), outputs_and_gradients(folded, x_of())
    assert len(calls) == 1
    assert {"lora_A.default.weight", "lora_B.default.weight"} < actual.keys() == expected.keys()
    for name, value in expected.items():
        assert value.any()
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-4)


def test_where_it_does_not_apply_peft_computes(calls):
    plain, folded = layers(lora_dropout=0.5)
    x = x_of().detach()

    def same(x=x):
        torch.manual_seed(2)
        expected = plain(x)
        torch.manual_seed(2)
        assert torch.equal(folded(x), expected)
        assert not calls

    same(x_of(tokens=2).detach())  # too few tokens: 12 * 8 / (12 + 8) is 4.8
    for layer in (plain, folded):
        layer.train()
    same()  # dropout
    for layer in (plain, folded):
        layer.eval()
        layer._active_adapter = ["reward"]
    same()
    for layer in (plain, folded):
        layer._active_adapter = ["default"]
        layer._disable_adapters = True
    same()
    for layer in (plain, folded):
        layer._disable_adapters = False
        layer.base_layer.weight.requires_grad_(True)
    same()  # it has no gradient for the weight
    for layer in (plain, folded):
        layer.base_layer.weight.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        same()
    folded(x)
    assert len(calls) == 1


def test_merged_half_precision_and_foreign_layers_are_left_alone(calls):
    plain, folded = layers()
    x = x_of().detach()
    for layer in (plain, folded):
        layer.merge()
    assert torch.equal(folded(x), plain(x))
    half = layers()[0].to(torch.bfloat16)
    fold(half)
    assert "forward" not in vars(half)
    hooked = layers()[0]
    hooked.base_layer.forward = lambda x: x.new_zeros(*x.shape[:-1], 8)  # as Accelerate's hooks for offloaded weights
    fold(hooked)
    assert "forward" not in vars(hooked)
    assert not calls


def test_a_deep_copy_computes_with_its_own_weights(calls):
    _, folded = layers()
    copied = copy.deepcopy(folded)
    copied.lora_B["default"].weight.data.zero_()
    x = x_of().detach()
    assert torch.allclose(copied(x), copied.base_layer(x), atol=1e-6)
    assert not torch.allclose(copied(x), folded(x), atol=1e-3)
    assert len(calls) == 3
