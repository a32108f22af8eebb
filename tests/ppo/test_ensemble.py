"""PPO-Max against an ensemble of reward adapters: what the policy is paid, and what is logged."""

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaForSequenceClassification

from tests.ppo import tiny
from trl_ext import SharedBaseModel


@pytest.fixture(scope="module")
def second(world, tmp_path_factory):
    """Another reward adapter, with the opposite sign and twice the size."""
    folder = tmp_path_factory.mktemp("second")
    torch.manual_seed(0)
    classifier = LlamaForSequenceClassification.from_pretrained(world / "base", num_labels=1)
    model = tiny.randomized(get_peft_model(classifier, tiny.lora("SEQ_CLS")))
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data *= -2
    model.save_pretrained(folder)
    return folder


def shared(world, *rewards):
    return SharedBaseModel.from_pretrained(
        str(world / "base"), policy_adapter=world / "policy", reward_adapter=[world / "reward", *rewards]
    )


def run(world, folder, *rewards, **options):
    """The trainer after a rollout, and the scores of its completions by each adapter."""
    options |= {"reward_normalization": "none", "reward_clip": None, "max_steps": 1}
    trainer = tiny.trainer(world, folder, model=shared(world, *rewards), **options)
    members, score = [], trainer.model.score_parts

    def record(parts):
        members.append(score(parts))
        return members[-1]

    trainer.model.score_parts = record
    trainer.train()
    return tiny.rollout_entries(trainer)[0], torch.cat(members)


@pytest.mark.parametrize(("mode", "coef"), [("mean", 0.5), ("min", 0.5), ("variance", 0.5), ("variance", 2.0)])
def test_the_reward_is_what_the_mode_makes_of_the_members(world, second, tmp_path, mode, coef):
    entry, members = run(world, tmp_path, second, reward_ensemble=mode, reward_ensemble_coef=coef)
    a, b = members.unbind(1)
    assert (a - b).abs().mean() > 0.1
    spread = (a - b) / 2
    expected = {"mean": (a + b) / 2, "min": torch.minimum(a, b), "variance": (a + b) / 2 - coef * spread**2}[mode]
    assert entry["reward"] == pytest.approx(expected.mean().item(), abs=1e-5)
    assert entry["rewards/reward_role/mean"] == pytest.approx(entry["reward"], abs=1e-5)
    assert entry["reward_uncertainty"] == pytest.approx(spread.abs().mean().item(), abs=1e-5)


def test_one_adapter_has_no_uncertainty_to_log(world, tmp_path):
    entry, members = run(world, tmp_path, reward_ensemble="min")
    assert members.shape[1] == 1
    assert not [name for name in entry if "uncertainty" in name]


def test_a_checkpoint_holds_the_ensemble_and_a_run_goes_on_from_it(world, second, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "reward_ensemble": "min"}
    first = tiny.trainer(world, tmp_path, model=shared(world, second), **options)
    first.train()
    assert (tmp_path / "checkpoint-1" / "reward_2" / "adapter_model.safetensors").is_file()
    again = tiny.trainer(world, tmp_path, model=shared(world, second), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    entries = [tiny.comparable(tiny.rollout_entries(trainer))[-1] for trainer in (first, again)]
    assert entries[0] == entries[1]


@pytest.mark.parametrize(("name", "value"), [("reward_ensemble", "median"), ("reward_ensemble_coef", -1.0)])
def test_an_unknown_mode_or_a_negative_coefficient_is_refused(tmp_path, name, value):
    with pytest.raises(ValueError, match=name):
        tiny.config(tmp_path, **{name: value})
