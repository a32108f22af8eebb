"""Switching roles changes what computes, and nothing else; gradients stay with the role that they belong to."""

import copy

import pytest
import torch
from peft import LoraConfig

from tests.layout import packed
from trl_ext.roles import Role, SharedBaseModel


@pytest.fixture
def model(make_base, make_adapter):
    base = make_base()
    return SharedBaseModel(base, policy=make_adapter(base), reward=make_adapter(base, seed=2, head=True))


def state(model):
    """Everything that switching must bring back."""
    layers = tuple((tuple(layer.active_adapters), layer.disable_adapters) for layer in model.lora_layers)
    return model.active_role, layers, tuple(p.requires_grad for p in model.parameters()), model.training


def owner(name):
    """Which role a parameter is for, by its name alone."""
    if name.startswith("heads."):
        return name.split(".")[1]
    adapters = {"default": "policy", "reference": "reference", "reward": "reward", "critic": "critic"}
    return adapters[name.split(".")[-2]] if "lora_" in name else "base"


@torch.no_grad()
def logits(model, batch):
    return model(input_ids=batch[0], attention_mask=batch[1]).logits


def test_only_policy_and_critic_are_trained(model):
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (owner(name) in ("policy", "critic")), name


@pytest.mark.parametrize("role", list(Role))
def test_a_role_touches_no_requires_grad_and_is_left_behind(model, batch, role):
    before = state(model)
    with model.role(role) as inside:
        assert inside is model
        assert model.active_role is role
        assert state(model)[2:] == before[2:]
        logits(model, batch)
    assert state(model) == before


@pytest.mark.parametrize("fresh", [True, False])
def test_every_role_computes_something_else(make_base, make_adapter, batch, fresh):
    base = make_base()
    policy = LoraConfig(r=4) if fresh else make_adapter(base)
    critic = make_adapter(base, seed=3, head=True)
    model = SharedBaseModel(base, policy=policy, reward=make_adapter(base, seed=2, head=True), critic=critic)
    for name, parameter in model.named_parameters():
        if owner(name) == "policy":
            parameter.data.add_(0.1)
    outputs = []
    for role in Role:
        with model.role(role):
            outputs.append(logits(model, batch))
    for i, first in enumerate(outputs):
        for second in outputs[:i]:
            assert not torch.allclose(first, second, atol=1e-3)


def test_an_error_inside_restores_the_role(model):
    before = state(model)
    with pytest.raises(ZeroDivisionError), model.role(Role.CRITIC), model.role(Role.REWARD):
        raise ZeroDivisionError
    assert state(model) == before


def test_roles_nest(model):
    with model.role(Role.CRITIC):
        with model.role(Role.REFERENCE):
            with model.role(Role.CRITIC):
                assert model.active_role is Role.CRITIC
            assert model.active_role is Role.REFERENCE
        assert model.active_role is Role.CRITIC
    assert model.active_role is Role.POLICY


def test_one_switch_object_may_be_entered_twice(model):
    critic = model.role(Role.CRITIC)
    with critic:
        with model.role(Role.REWARD), critic:
            pass
        assert model.active_role is Role.CRITIC
    assert model.active_role is Role.POLICY
    with critic:
        assert model.active_role is Role.CRITIC
    assert model.active_role is Role.POLICY


def test_roles_may_be_given_as_strings(model):
    assert model.has_role("reference")
    assert SharedBaseModel(model.unload()).has_role("reference")
    with model.role("critic"):
        assert model.active_role is Role.CRITIC
    with pytest.raises(ValueError, match="judge"):
        model.role("judge")


def test_a_role_that_the_model_has_not_is_an_error_that_says_how_to_get_it(make_base, batch):
    model = SharedBaseModel(make_base())
    for use in (lambda: model.role(Role.REWARD), lambda: model.score(*batch)):
        with pytest.raises(ValueError, match=r"no reward role.*reward_adapter"):
            use()
    assert model.active_role is Role.POLICY


def test_set_adapter_switches_without_touching_requires_grad(model, batch):
    before = state(model)
    with model.role(Role.CRITIC):
        expected = logits(model, batch)
    model.set_adapter("critic")
    assert torch.equal(logits(model, batch), expected)
    assert state(model)[2] == before[2]
    model.set_adapter("default")
    assert state(model) == before
    with pytest.raises(ValueError, match=r"'ref'.*default, reference, reward, critic"):
        model.set_adapter("ref")


def test_disable_adapter_is_refused(model):
    before = state(model)
    with pytest.raises(RuntimeError, match=r"role\(Role.REFERENCE\)"):
        model.disable_adapter()
    assert state(model) == before


def test_merge_adapter_is_refused_since_it_changes_what_the_other_roles_compute(model, batch):
    before, scores = state(model), model.score(*batch)
    with pytest.raises(RuntimeError, match=r"base that all roles share.*merge_and_unload there"):
        model.merge_adapter()
    assert state(model) == before
    assert torch.equal(model.score(*batch), scores)
    model.base_model.merge_adapter()  # what PEFT would have done
    assert not torch.allclose(model.score(*batch), scores, atol=1e-3)


def test_parameter_groups_hold_each_trained_parameter_once(model):
    groups = model.parameter_groups({Role.POLICY: 1e-3, Role.CRITIC: 3e-3}, weight_decay=0.1)
    assert [(g["role"], g["lr"], g["weight_decay"]) for g in groups] == [("policy", 1e-3, 0.1), ("critic", 3e-3, 0.1)]
    for group in groups:
        expected = {id(p) for name, p in model.named_parameters() if owner(name) == group["role"]}
        assert expected == {id(p) for p in group["params"]}
        assert len(expected) == len(group["params"]) > 0
    assert id(model.heads["critic"].weight) in {id(p) for p in groups[1]["params"]}


@pytest.mark.parametrize(("term", "trained"), [("logps", "policy"), ("entropy", "policy"), ("values", "critic")])
def test_a_loss_reaches_only_the_adapter_of_its_role(make_base, make_adapter, batch, architecture, term, trained):
    base = make_base(architecture)
    reward = make_adapter(base, seed=2, head=True)
    model = SharedBaseModel(base, policy=make_adapter(base), reward=reward).train()
    roles = (Role.POLICY, Role.REFERENCE, Role.CRITIC)
    outputs = model(**packed(*batch, 5), roles=roles, entropy="gradient")
    assert not outputs["reference_logps"].requires_grad
    outputs[term].square().sum().backward()
    for name, parameter in model.named_parameters():
        if owner(name) != trained:
            assert parameter.grad is None or not parameter.grad.any(), name
        else:
            assert parameter.grad.abs().max() > 0, name


def test_a_step_of_the_optimizer_moves_policy_and_critic_and_nothing_else(model, batch):
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameter_groups({Role.POLICY: 0.1, Role.CRITIC: 0.1}))
    outputs = model(**packed(*batch, 5), roles=(Role.POLICY, Role.REFERENCE, Role.CRITIC))
    (outputs["logps"].sum() + outputs["values"].square().sum()).backward()
    model.score(*batch)
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != (owner(name) in ("policy", "critic")), name


def test_scoring_between_two_steps_does_not_stop_the_critic(model, batch):
    """The trap of PEFT's own switch: after scoring, the critic is frozen and nothing says so."""
    for _ in range(2):
        model.score(*batch)
        with model.role(Role.REFERENCE):
            logits(model, batch)
        model.zero_grad()
        model(**packed(*batch, 5), roles=(Role.CRITIC,))["values"].sum().backward()
        assert all(p.grad is not None for name, p in model.named_parameters() if owner(name) == "critic")


def test_adapters_kept_undoes_what_the_trainer_of_trl_does(model):
    """`RLOOTrainer.__init__` on a 4-bit base: it adds "ref", and casts what is trainable to bfloat16."""
    before = {name: (p, p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    with model.adapters_kept():
        model.add_adapter("ref", model.peft_config["default"])
        for name, parameter in list(model.named_parameters()):
            if ".default." in name:
                model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
        model.requires_grad_(True)
    assert "ref" not in model.peft_config
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for name, (parameter, value, requires_grad) in before.items():
        assert after[name] is parameter, "an optimizer made before would hold another parameter"
        assert parameter.dtype == value.dtype
        assert torch.equal(parameter, value)
        assert parameter.requires_grad == requires_grad
    assert model.active_role is Role.POLICY


def test_adapters_kept_undoes_it_after_an_error_too(model):
    before = state(model), set(model.state_dict())

    def fail():
        with model.adapters_kept():
            model.add_adapter("ref", model.peft_config["default"])
            raise ValueError("wrong argument")

    with pytest.raises(ValueError, match="wrong argument"):
        fail()
    assert (state(model), set(model.state_dict())) == before
    with model.adapters_kept():
        model.add_adapter("ref", model.peft_config["default"])


def test_a_deep_copy_is_a_model_of_its_own(model, batch):
    expected = logits(model, batch)
    copied = copy.deepcopy(model)
    with copied.role(Role.CRITIC):
        assert torch.equal(logits(model, batch), expected)
        assert not torch.equal(logits(copied, batch), expected)
