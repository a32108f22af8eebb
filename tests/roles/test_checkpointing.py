"""Gradient checkpointing must recompute under the role that was active in forward, not the one active in backward."""

import inspect
import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainingArguments
from trl.models.utils import unwrap_model_for_generation

from tests.layout import packed
from trl_ext.roles import Role, SharedBaseModel

NAMES = ("gradient_checkpointing_enable", "activation_checkpointing_enable")


@pytest.fixture
def model(make_base, make_adapter, architecture):
    base = make_base(architecture)
    critic = make_adapter(base, seed=3, head=True)
    return SharedBaseModel(base, policy=make_adapter(base), critic=critic).train()


@pytest.fixture(autouse=True)
def _without_deprecations():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def gradients(model, batch):
    """Of one loss over two passes, under policy and critic, as in PPO: one backward, after both."""
    model.zero_grad()
    outputs = model(**packed(*batch, 5), roles=(Role.POLICY, Role.CRITIC))
    (outputs["logps"].sum() + outputs["values"].square().sum()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def recomputations(layer):
    """Counts how often a layer runs: the proof that checkpointing is on at all. Not the last of its block, at which a
    recomputation stops early."""
    count = SimpleNamespace(n=0)
    layer.register_forward_hook(lambda *_: setattr(count, "n", count.n + 1))
    return count


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kwargs", [None, {"use_reentrant": False}], ids=["default", "non-reentrant"])
def test_gradients_are_those_without_checkpointing_to_the_last_bit(model, batch, name, kwargs):
    expected = gradients(model, batch)
    getattr(model, name)(kwargs)
    count = recomputations(model.lora_layers[0])
    actual = gradients(model, batch)
    assert count.n == 4  # two roles, each forward and recomputation
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert value.any(), key
        assert torch.equal(actual[key], value), key
    assert model.active_role is Role.POLICY


def test_plain_checkpointing_gives_other_gradients(model, batch):
    """The trap itself: were it not there, the tests above could not fail."""
    expected = gradients(model, batch)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    model.get_base_model().disable_input_require_grads()
    model.zero_grad()
    outputs = model(**packed(*batch, 5), roles=(Role.POLICY, Role.CRITIC))
    (outputs["logps"].sum() + outputs["values"].square().sum()).backward()
    off = [
        key
        for key, value in expected.items()
        if (grad := model.get_parameter(key).grad) is None or not torch.allclose(grad, value)
    ]
    assert off


def test_the_bare_reference_is_recomputed_without_an_adapter(make_base, batch):
    """A fresh policy's reference is "adapters off": that too must be what the recomputation sees."""
    model = SharedBaseModel(make_base()).train()
    for name, parameter in model.named_parameters():
        if "lora_B.default" in name:
            parameter.data.normal_()
    embeddings = model.get_input_embeddings().weight.requires_grad_()

    def gradient():
        embeddings.grad = None
        with model.role(Role.REFERENCE):
            loss = model(input_ids=batch[0], attention_mask=batch[1]).logits.square().sum()
        loss.backward()
        return embeddings.grad.clone()

    expected = gradient()
    model.activation_checkpointing_enable()
    assert torch.equal(gradient(), expected)


def test_checkpointing_on_the_base_before_is_taken_over(make_base, make_adapter, batch):
    base = make_base()
    model = SharedBaseModel(base, policy=make_adapter(base), critic=make_adapter(base, seed=3, head=True)).train()
    expected = gradients(model, batch)
    base = make_base()
    base.gradient_checkpointing_enable()
    model = SharedBaseModel(base, policy=make_adapter(base), critic=make_adapter(base, seed=3, head=True)).train()
    count = recomputations(model.lora_layers[0])
    actual = gradients(model, batch)
    assert count.n == 4
    assert all(torch.equal(actual[key], value) for key, value in expected.items())


@pytest.mark.parametrize("kwargs", [None, {"use_reentrant": False}], ids=str)
def test_it_survives_the_generation_of_trl(make_base, make_adapter, batch, kwargs):
    """TRL switches checkpointing off to generate, and on again by the older name, with the arguments as they are."""
    base = make_base()
    model = SharedBaseModel(base, policy=make_adapter(base), critic=make_adapter(base, seed=3, head=True)).train()
    expected = gradients(model, batch)
    model.activation_checkpointing_enable(kwargs)
    accelerator = SimpleNamespace(
        unwrap_model=lambda m: m, state=SimpleNamespace(deepspeed_plugin=None, fsdp_plugin=None), distributed_type="NO"
    )
    model.gradient_checkpointing_disable()
    count = recomputations(model.lora_layers[0])
    gradients(model, batch)
    assert count.n == 2
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    takes_kwargs = "gradient_checkpointing_kwargs" in inspect.signature(unwrap_model_for_generation).parameters
    options = {"gradient_checkpointing_kwargs": kwargs} if takes_kwargs else {}  # TRL 1.16 does, 1.15 does not
    with unwrap_model_for_generation(model, accelerator, **options) as unwrapped:
        assert not unwrapped.is_gradient_checkpointing
        unwrapped.generate(input_ids=batch[0], attention_mask=batch[1], max_new_tokens=2)
    assert model.is_gradient_checkpointing
    count.n = 0
    actual = gradients(model, batch)
    assert count.n == 4
    assert all(torch.equal(actual[key], value) for key, value in expected.items())


def test_the_options_that_trainer_takes_out_of_the_arguments_and_trl_does_not(make_base, batch):
    model = SharedBaseModel(make_base()).train()
    first, last = (recomputations(model.get_base_model().model.layers[i].self_attn.q_proj) for i in (0, 1))
    model.gradient_checkpointing_enable({"every_n_layers": 2})
    gradients(model, batch)
    assert (first.n, last.n) == (4, 2)


@pytest.mark.parametrize("name", NAMES)
def test_reentrant_checkpointing_is_refused(make_base, name):
    model = SharedBaseModel(make_base())
    with pytest.raises(ValueError, match="use_reentrant=False"):
        getattr(model, name)({"use_reentrant": True})
    assert not model.is_gradient_checkpointing


def test_context_fn_stays_out_of_the_training_arguments(make_base, tmp_path):
    """A Python callable in the arguments breaks their serialisation: it lives on the model."""
    arguments = {"use_reentrant": False}
    args = TrainingArguments(
        output_dir=str(tmp_path), gradient_checkpointing=True, gradient_checkpointing_kwargs=arguments, report_to="none"
    )
    model = SharedBaseModel(make_base())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs=arguments)
    assert arguments == args.gradient_checkpointing_kwargs == {"use_reentrant": False}
    json.dumps(args.to_dict())


def test_no_gradient_is_asked_for_at_the_embeddings(make_base, batch):
    """Only reentrant checkpointing needs one. With it, generation and scoring would build a graph from there."""
    model = SharedBaseModel(make_base()).train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()  # as TRL does
    assert not model.get_input_embeddings()(batch[0]).requires_grad
