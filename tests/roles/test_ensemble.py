"""The reward role as several adapters on one base, each with its stored scale; and models without a critic."""

import pytest
import torch

from trl_ext.roles import AdapterWeights, RewardScale, Role, SharedBaseModel
from trl_ext.roles.folders import adapter_weights

SCALES = (RewardScale(0.5, 2.0, 10), None)
NAMES = ["reward", "reward_2"]


@pytest.fixture
def members(make_base, make_adapter):
    """Two reward adapters of different rank, the first with a scale."""
    base = make_base("llama")
    made = [make_adapter(base, seed=seed, head=True, r=r) for seed, r in ((2, 4), (3, 2))]
    return [AdapterWeights(m.config, m.weights, m.head, scale) for m, scale in zip(made, SCALES, strict=True)]


@pytest.fixture
def make(make_base, make_adapter, members):
    def build(reward=members, **options):
        base = make_base("llama")
        return SharedBaseModel(base, make_adapter(base), reward, **options).eval()

    return build


def weights_of(model, name):
    return adapter_weights(model, name)


def same(a, b):
    return all(torch.equal(a.weights[k], b.weights[k]) for k in a.weights) and torch.equal(a.head, b.head)


def test_columns_are_the_scores_of_each_adapter_alone_and_the_score_is_their_mean(make, members, batch):
    model = make()
    assert model.reward_adapters() == NAMES
    scores = model.score_members(*batch)
    assert scores.shape == (3, 2)
    alone = torch.stack([make(member).score(*batch) for member in members], dim=1)
    assert torch.equal(scores, alone)
    assert (scores[:, 0] - scores[:, 1]).abs().min() > 0.1
    assert torch.equal(model.score(*batch), scores.mean(1))
    assert model.active_role is Role.POLICY
    hidden = model.hidden_states(*batch)
    model.score(*batch)
    assert torch.equal(model.hidden_states(*batch), hidden), "the policy computes again"


def test_a_scale_is_taken_off_the_raw_score(make, members, batch):
    raw = make(AdapterWeights(members[0].config, members[0].weights, members[0].head)).score(*batch)
    torch.testing.assert_close(make(members[0]).score(*batch), (raw - 0.5) / 2.0)


def test_the_critic_starts_from_the_first_on_the_normalised_scale(make, members, batch):
    model = make()
    ids, mask = batch
    last = (mask * torch.arange(9)).argmax(-1)
    values = model.values(ids, mask)[torch.arange(3), last]
    # the head has no bias: the value is the normalised score but for its constant, mean / std
    torch.testing.assert_close(values, model.score_members(ids, mask)[:, 0] + 0.5 / 2.0)
    critic = weights_of(model, "critic")
    assert all(torch.equal(critic.weights[k], members[0].weights[k]) for k in members[0].weights)
    assert critic.scale is None, "its head has the scale in it"


def test_every_adapter_is_frozen_but_policy_and_critic(make):
    model = make()
    owners = {model.owner(name) for name, p in model.named_parameters() if p.requires_grad}
    assert owners == {Role.POLICY, Role.CRITIC}
    groups = model.parameter_groups({Role.POLICY: 1.0, Role.CRITIC: 2.0})
    assert [group["role"] for group in groups] == ["policy", "critic"]
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in model.parameters())


def test_saved_and_loaded_every_member_is_back_with_its_scale(make, members, batch, tmp_path):
    model = make()
    expected = model.score_members(*batch)
    model.save_pretrained(str(tmp_path))
    for name in ("", "reference", "critic", *NAMES):
        assert (tmp_path / name / "adapter_config.json").is_file()
    assert (tmp_path / "reward" / "reward_scale.json").is_file()
    assert not (tmp_path / "reward_2" / "reward_scale.json").exists()

    other = make([AdapterWeights(m.config, m.weights, torch.zeros_like(m.head), SCALES[0]) for m in members])
    assert not torch.equal(other.score_members(*batch), expected)
    for name in ("default", *NAMES):
        other.load_adapter(str(tmp_path / ("" if name == "default" else name)), name)
    assert torch.equal(other.score_members(*batch), expected)
    assert other.reward_scales == {"reward": SCALES[0]}


@pytest.mark.parametrize("reward", ["one", "none"])
def test_another_number_of_members_cannot_resume(make, members, tmp_path, reward):
    make().save_pretrained(str(tmp_path))
    other = make({"one": members[0], "none": None}[reward])
    with pytest.raises(ValueError, match=r"'reward_2'.*Resume with the adapters"):
        other.load_adapter(str(tmp_path), "default")


def test_adapters_kept_keeps_every_member(make, batch):
    model = make()
    scores, kept = model.score_members(*batch), [weights_of(model, name) for name in NAMES]
    with model.adapters_kept():
        model.add_adapter("ref", model.peft_config["default"])
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(torch.bfloat16)
    assert set(model.peft_config) == {"default", "reference", "critic", *NAMES}
    assert all(same(weights_of(model, name), before) for name, before in zip(NAMES, kept, strict=True))
    assert torch.equal(model.score_members(*batch), scores)


def test_a_model_without_a_critic(make, batch):
    model = make(with_critic=False)
    assert not model.has_role(Role.CRITIC)
    assert set(model.heads) == set(NAMES)
    with pytest.raises(ValueError, match="no critic role"):
        model.values(*batch)
    assert model.score(*batch).shape == (3,)
    assert {model.owner(n) for n, p in model.named_parameters() if p.requires_grad} == {Role.POLICY}


def test_folders_make_an_ensemble(make, make_base, batch, tmp_path):
    make_base("llama").save_pretrained(tmp_path / "base")
    model = make()
    model.save_pretrained(str(tmp_path / "saved"))
    again = SharedBaseModel.from_pretrained(
        str(tmp_path / "base"), reward_adapter=[tmp_path / "saved" / name for name in NAMES]
    )
    torch.testing.assert_close(again.score_members(*batch), model.score_members(*batch), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="has no scalar head"):
        SharedBaseModel.from_pretrained(
            str(tmp_path / "base"), reward_adapter=[tmp_path / "saved" / "reward", tmp_path / "saved"]
        )
