"""What the passes compute, against plain transformers: five architectures, both padding sides, changed LM heads."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from tests.layout import packed
from trl_ext.roles import AdapterWeights, Role, SharedBaseModel

P, T = 4, 5  # columns of the prompt and of the completion in `batch`
CLOSE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture
def model(make_base, make_adapter, architecture):
    return four_roles(make_base, make_adapter, architecture)


def four_roles(make_base, make_adapter, architecture, **options):
    base = make_base(architecture, **options)
    reward, critic = make_adapter(base, seed=2, head=True), make_adapter(base, seed=3, head=True)
    return SharedBaseModel(base, policy=make_adapter(base), reward=reward, critic=critic)


def unpadded_rows(ids, mask):
    """Each row alone, without its padding: (ids, prompt length), ids of shape (1, n)."""
    return [(row[keep.bool()][None], int(keep[:P].sum())) for row, keep in zip(ids, mask, strict=True)]


@torch.no_grad()
def plain_logits(model, ids, role):
    """Logits of one unpadded row, by the model's own forward, in double precision from the softmax on."""
    with model.role(role):
        return model(input_ids=ids).logits[0].double()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logps_and_entropy_are_those_of_the_logits_over_the_temperature(model, batch, temperature):
    ids, mask = batch
    with torch.no_grad():
        outputs = model(
            **packed(ids, mask, T), roles=(Role.POLICY, Role.REFERENCE), entropy="values", temperature=temperature
        )
    assert {name: x.shape for name, x in outputs.items()} == dict.fromkeys(outputs, (3, T))
    for i, (row, prompt) in enumerate(unpadded_rows(ids, mask)):
        completion = row[0, prompt:]
        for role, name in ((Role.POLICY, "logps"), (Role.REFERENCE, "reference_logps")):
            logps = F.log_softmax(plain_logits(model, row, role)[prompt - 1 : -1] / temperature, dim=-1)
            expected = logps.gather(1, completion[:, None])[:, 0]
            torch.testing.assert_close(outputs[name][i, : len(completion)].double(), expected, **CLOSE)
            if role is Role.POLICY:
                entropy = -(logps.exp() * logps).sum(-1)
                torch.testing.assert_close(outputs["entropy"][i, : len(completion)].double(), entropy, **CLOSE)
        for x in outputs.values():
            assert (x[i, len(completion) :] == 0).all()


def test_padding_changes_no_value_and_no_score(model, batch):
    ids, mask = batch
    values, scores = model.values(ids, mask), model.score(ids, mask)
    with torch.no_grad():
        completion_values = model(**packed(ids, mask, T), roles=(Role.CRITIC,))["values"]
    assert scores.std() > 0.1
    assert values.std() > 0.1
    for i, (row, prompt) in enumerate(unpadded_rows(ids, mask)):
        ones = torch.ones_like(row)
        alone = model.values(row, ones)[0]
        torch.testing.assert_close(values[i][mask[i].bool()], alone, **CLOSE)
        torch.testing.assert_close(scores[i], model.score(row, ones)[0], **CLOSE)
        # the value of a token is that of the state before it: of the prompt, for the first one
        before = alone[prompt - 1 : -1]
        torch.testing.assert_close(completion_values[i, : len(before)], before, **CLOSE)


def test_the_score_is_the_head_on_the_last_real_token(model, batch):
    ids, mask = batch
    scores = model.score(ids, mask)
    for i, (row, _) in enumerate(unpadded_rows(ids, mask)):
        with torch.no_grad(), model.role(Role.REWARD):
            hidden = model.get_base_model().base_model(input_ids=row).last_hidden_state[0, -1]
        torch.testing.assert_close(scores[i], hidden @ model.heads["reward"].weight[0], **CLOSE)
    assert torch.equal(model.score(ids, mask.bool()), scores)


def test_left_and_right_padding_give_the_same_scores(model):
    ids = torch.tensor([[5, 9, 11, 7], [6, 8, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    right = model.score(ids, mask)
    left = model.score(torch.stack([ids[0], ids[1].roll(2)]), torch.stack([mask[0], mask[1].roll(2)]))
    torch.testing.assert_close(left, right, **CLOSE)


def test_the_language_model_loss_is_that_of_transformers(model):
    ids = torch.randint(3, 48, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    labels = ids.masked_fill(mask == 0, -100)
    with torch.no_grad():
        outputs = model(**packed(ids, mask, 3), roles=(Role.CRITIC,), ptx={"input_ids": ids, "attention_mask": mask})
        expected = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(outputs["ptx_loss"], expected, **CLOSE)


HEADS = {
    "gemma2": {"final_logit_softcapping": 3.0, "head_dim": 8, "num_key_value_heads": 1},
    "cohere": {"logit_scale": 0.25, "num_key_value_heads": 1},
    "granite": {"logits_scaling": 4.0, "num_key_value_heads": 1},
}


@pytest.mark.parametrize("architecture", HEADS)
def test_heads_that_scale_or_cap_their_logits(make_base, make_adapter, batch, architecture):
    model = four_roles(make_base, make_adapter, architecture, **HEADS[architecture])
    assert (model.language_head.factor, model.language_head.cap) != (1.0, None)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(5)  # so that the cap and the factor matter
    test_logps_and_entropy_are_those_of_the_logits_over_the_temperature(model, batch, 0.7)


def test_a_trained_head_of_another_width_or_a_batch_without_tokens_is_refused(make_base, make_adapter):
    model = four_roles(make_base, make_adapter, "llama")
    ids = torch.full((2, 3), 5)
    with pytest.raises(ValueError, match=r"rows \[1\]"):
        model.score(ids, torch.tensor([[1, 1, 1], [0, 0, 0]]))
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 2\)"):
        model.values(ids, torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"\(3,\)"):
        model.score(ids[0], torch.ones(3))
    base = make_base()
    adapter = make_adapter(base, head=True)
    with pytest.raises(ValueError, match=r"\(2, 16\)"):
        SharedBaseModel(base, reward=AdapterWeights(adapter.config, adapter.weights, torch.zeros(2, 16)))


def test_generation_is_the_policys(make_base, make_adapter, batch):
    model = four_roles(make_base, make_adapter, "llama")
    ids, mask = batch[0][:, :P], batch[1][:, :P]
    generated = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=T, do_sample=False, eos_token_id=None)
    completion_mask = torch.cat([mask, torch.ones(3, T, dtype=mask.dtype)], 1)
    for i, (row, prompt) in enumerate(unpadded_rows(generated, completion_mask)):
        greedy = plain_logits(model, row, Role.POLICY).argmax(-1)[prompt - 1 : -1]
        assert torch.equal(generated[i, P:], greedy)


def test_the_bfloat16_base_keeps_its_dtype(make_base, batch):
    model = SharedBaseModel(make_base(dtype=torch.bfloat16))
    assert isinstance(model.get_base_model(), AutoModelForCausalLM.from_config(model.config).__class__)
    assert model.get_output_embeddings().weight.dtype == torch.bfloat16
    with torch.no_grad():
        outputs = model(**packed(*batch, T), roles=(Role.POLICY, Role.CRITIC))
    assert {outputs[name].dtype for name in ("logps", "values")} == {torch.float32}
