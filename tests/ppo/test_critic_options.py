"""The options of `critic_options` in a run: what they reach, that presets load and train, and what is refused."""

import math
import re
import shutil

import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file, save_file

from tests.ppo import tiny
from trl_ext import Role, SharedBaseModel
from trl_ext.ops.packing import pack
from trl_ext.ppo.critic_options import check_critic_options
from trl_ext.ppo.data import check_references
from trl_ext.ppo.rollout import collect
from trl_ext.ppo.state import PPOState
from trl_ext.scripts.configs import CONFIGS, config_names, find_config
from trl_ext.text import TextEncoder
from trl_ext.token_rewards import PlacedReward

PRESETS = [path.stem for path in sorted((CONFIGS / "presets").glob("*.yaml"))]
RAW = {"reward_normalization": "none", "reward_clip": None, "beta": 0.0, "kl_control": "fixed"}
# Every option at once, as far as they go together
ALL = {
    "gae_lambda_alpha": 0.5,
    "value_lambda": 1.0,
    "critic_warmup_returns": "monte_carlo",
    "critic_warmup_steps": 2,
    "critic_warmup_explained_variance": None,
    "critic_updates": 2,
    "num_iterations": 2,
    "critic_freeze_attention": True,
    "policy_objective": "dis",
    "best_lm_coef": 0.1,
    "best_lm_score": 2.0,
    "reward_role_pays": "token",
}


@pytest.fixture(scope="module")
def model(world):
    return tiny.four_roles(world)


IDS = [[7, 8, 9, 1], [10, 11]]  # of two completions, the second cut
PROMPTS = ["w1 w2", "w3"]


def rollout_of(model, placed=(None,), numbers=(1.0, 2.0), references=None, **options):
    """A rollout batch of two completions that no policy sampled."""
    args = tiny.config("unused", **(RAW | options))
    tokenizer = tiny.tiny_tokenizer()
    encoder = TextEncoder(tokenizer)
    texts = tokenizer.batch_decode(IDS, skip_special_tokens=True)
    rows = [{"prompt": p, "reference_scores": r} for p, r in zip(PROMPTS, references or [0.0, 0.0], strict=True)]
    state = PPOState.of_run(args)
    state.rollouts = 1  # not the first, whose KL is checked
    model.train()
    return collect(
        rows,
        model,
        args,
        state,
        encoder,
        generate=lambda prompts: ([encoder.prompt_ids(p) for p in prompts], IDS, texts),
        reward=lambda *given: torch.tensor([[n] for n in numbers]),
        reduce=lambda x: x,
        device=torch.device("cpu"),
        placed=lambda: list(placed),
    )


# ---------------------------------------------------------------------- rewards in parts


def test_parts_arrive_on_their_tokens_and_the_sum_stays(model):
    """Raw scores 1 and 2 of the function, of which 0.75 and 0.5 are paid early; the role's weight is 0."""
    parts = [PlacedReward(characters=((2, 0.75),)), PlacedReward(tokens=((0, 0.5),))]
    rollout = rollout_of(model, [parts], reward_role_weight=0.0)
    torch.testing.assert_close(rollout.rewards, torch.tensor([[0.75, 0.0, 0.0, 0.25], [0.5, 1.5, 0.0, 0.0]]))
    plain = rollout_of(model, reward_role_weight=0.0)
    torch.testing.assert_close(plain.rewards, torch.tensor([[0.0, 0.0, 0.0, 1.0], [0.0, 2.0, 0.0, 0.0]]))
    torch.testing.assert_close(rollout.scores, plain.scores)


def test_the_role_pays_each_token_what_its_score_gains(model):
    """Against the role's score of every beginning, each in a pass of its own."""
    rollout = rollout_of(model, numbers=(0.0, 0.0), reward_role_pays="token")
    encoder = TextEncoder(tiny.tiny_tokenizer())
    for i, prompt in enumerate(PROMPTS):
        starts = [[*encoder.prompt_ids(prompt), *IDS[i][:n]] for n in range(len(IDS[i]))]
        scores = model.score_parts(pack([[ids] for ids in starts], [[len(ids)] for ids in starts], 0, share=False))
        gains = (scores[1:] - scores[:-1]).mean(1)
        torch.testing.assert_close(rollout.rewards[i, : len(gains)], gains, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rollout.rewards.sum(1), rollout.role_scores, rtol=1e-4, atol=1e-5)
    assert (rollout.rewards[0, :3].abs() > 1e-4).all()


def test_of_an_ensemble_the_parts_are_weighted_as_the_whole(world, tmp_path):
    shutil.copytree(world / "reward", tmp_path / "other")
    weights = load_file(tmp_path / "other" / "adapter_model.safetensors")
    scaled = {name: -2 * x if "score" in name else x for name, x in weights.items()}
    save_file(scaled, tmp_path / "other" / "adapter_model.safetensors")
    rewards = [world / "reward", tmp_path / "other"]
    model = SharedBaseModel.from_pretrained(
        str(world / "base"), policy_adapter=world / "policy", reward_adapter=rewards
    )
    one = rollout_of(model, numbers=(0.0, 0.0), reward_role_pays="token", reward_ensemble_weights=[1.0, 0.0])
    other = rollout_of(model, numbers=(0.0, 0.0), reward_role_pays="token", reward_ensemble_weights=[0.0, 1.0])
    even = rollout_of(model, numbers=(0.0, 0.0), reward_role_pays="token")
    torch.testing.assert_close((one.rewards + other.rewards) / 2, even.rewards, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(one.rewards[:, 0], even.rewards[:, 0], atol=1e-6)


def test_the_sigmoid_is_around_each_prompt_s_own_references(model):
    rollout = rollout_of(model, reward_role_weight=0.0, reward_sigmoid=True, references=[1.0, [2.0, 2.0]])
    torch.testing.assert_close(rollout.shaped_scores, torch.tensor([0.5, 0.5]))
    assert rollout.scores.tolist() == [1.0, 2.0]
    with pytest.raises(ValueError, match="reward_sigmoid=True shapes the score of a whole completion"):
        rollout_of(model, [[PlacedReward(score=1.0), None]], reward_sigmoid=True)


def test_lambda_reaches_advantages_and_the_critic_keeps_its_own(model):
    """Completions of 4 and 2 tokens at alpha 0.5: lambda 0.5 and 0. At lambda 0: r + V' - V."""
    options = {"normalize_advantages": False, "critic_baseline": "always", "reward_role_weight": 0.0}
    rollout = rollout_of(model, gae_lambda_alpha=0.5, value_lambda=1.0, **options)
    values = rollout.values
    torch.testing.assert_close(rollout.advantages[1, 0], values[1, 1] - values[1, 0])
    last, first = 1.0 - values[0, 3], values[0, 3] - values[0, 2]
    torch.testing.assert_close(rollout.advantages[0, 2], first + 0.5 * last)
    torch.testing.assert_close(rollout.returns[0], torch.ones(4))  # Monte Carlo of one terminal reward of 1


# ---------------------------------------------------------------------- a run


def test_all_options_at_once(world, tmp_path):
    trainer = tiny.trainer(world, tmp_path, reward_funcs=[steps_of_words], max_steps=6, **ALL)
    before = tiny.role_weights(trainer.model, Role.CRITIC)
    policy = tiny.role_weights(trainer.model, Role.POLICY)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "value_loss" in entry]
    # Two steps of the critic's warm-up; then the policy takes part in the first of two passes
    assert ["grad_norm/policy" in entry for entry in entries] == [False, False, True, False, True, False]
    assert all("grad_norm/critic" in entry for entry in entries)
    assert "best_lm_loss" in entries[2]
    after = tiny.role_weights(trainer.model, Role.CRITIC)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any("attn" in name for name in moved)
    assert any("mlp" in name for name in moved)
    assert "head" in moved
    assert not tiny.same(policy, tiny.role_weights(trainer.model, Role.POLICY))


def steps_of_words(prompts, completions, completion_ids, **kwargs):
    """A quarter for each token, as parts."""
    return [[0.25] * len(ids) for ids in completion_ids]


def test_the_ratio_of_dis_is_to_the_engine_that_sampled(world, tmp_path):
    """And its importance weights are left out: the ratio holds them."""
    trainer = tiny.trainer(world, tmp_path, policy_objective="dis", epsilon=0.8, epsilon_high=3.0)
    batch = tiny.random_rollout(rows=4)
    mask = batch.completion_mask.bool()
    logps, number = batch.logps + 0.1, torch.tensor(7.0)
    own, _ = trainer._policy_loss(logps, batch, mask, number)
    batch.sampler_logps, batch.importance = batch.logps - 0.2, torch.full_like(batch.logps, 5.0)
    engine, _ = trainer._policy_loss(logps, batch, mask, number)
    summed = (batch.advantages * mask).sum() / number  # at a ratio that is the same everywhere
    torch.testing.assert_close(own, -summed * math.exp(0.1))
    torch.testing.assert_close(engine, -summed * math.exp(0.3))


@pytest.mark.slow
def test_a_run_with_all_options_goes_on_from_a_checkpoint_as_if_nothing_had_happened(world, tmp_path):
    options = {"reward_funcs": [steps_of_words], "save_strategy": "steps", "save_steps": 4, **ALL}
    whole = tiny.trainer(world, tmp_path / "whole", max_steps=8, **options)
    whole.train()
    resumed = tiny.trainer(world, tmp_path / "resumed", max_steps=8, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    for role in (Role.POLICY, Role.CRITIC):
        assert tiny.same(tiny.role_weights(whole.model, role), tiny.role_weights(resumed.model, role))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_load_by_name_and_train_a_step(world, tmp_path, name):
    assert name in config_names()
    options = yaml.safe_load(find_config(name).read_text())
    warmup = min(options.get("critic_warmup_steps", 0), 1)
    options |= {"critic_warmup_steps": warmup, "max_steps": 1 + 2 * warmup}
    trainer = tiny.trainer(world, tmp_path, reward_funcs=[tiny.count_words], **options)
    policy = tiny.role_weights(trainer.model, Role.POLICY)
    trainer.train()
    assert not tiny.same(policy, tiny.role_weights(trainer.model, Role.POLICY))


def test_there_is_a_preset_for_each_method():
    assert PRESETS == ["open_reasoner_zero", "ppo_max", "sao", "vapo"]


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"critic_updates": 3, "num_iterations": 2}, "critic_updates=3 must divide num_iterations=2"),
        ({"gae_lambda_alpha": 0.1, "gae_lambda": 0.9}, "gae_lambda=0.9 does nothing with gae_lambda_alpha=0.1"),
        ({"best_lm_coef": 0.1}, "best_lm_coef=0.1 and best_lm_score=None go together"),
        ({"best_lm_score": 1.0}, "best_lm_coef=0 and best_lm_score=1.0 go together"),
        ({"reward_sigmoid": True, "reward_role_pays": "token"}, "set one of them"),
        ({"critic_warmup_returns": "monte_carlo"}, "does nothing with critic_warmup_steps=0"),
        ({"policy_objective": "dis", "kl_penalty_coef": 2.0}, "kl_penalty_coef=2 does nothing"),
        ({"reward_role_pays": "token", "gamma": 0.9}, "with gamma=1 only, and gamma is 0.9"),
        ({"reward_role_pays": "word"}, "reward_role_pays='word' must be one of end, sentence, token"),
        ({"gae_lambda_alpha": 0.0}, "gae_lambda_alpha=0.0 must be a number above 0"),
    ],
)
def test_options_that_do_not_go_together_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny.config(tmp_path, **options)


def test_critic_updates_are_refused_under_deepspeed(tmp_path):
    args = tiny.config(tmp_path, critic_updates=2, num_iterations=2)
    args.deepspeed = "zero2.json"
    with pytest.raises(ValueError, match="critic_updates=2 does not go with DeepSpeed"):
        check_critic_options(args)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({}, "needs the column 'reference_scores', which train_dataset lacks"),
        ({"reference_scores": [[1.0], []]}, r"train_dataset row 1: reference_scores=\[\] is not"),
        ({"reference_scores": [1.0, float("nan")]}, "train_dataset row 1: reference_scores=nan is not"),
    ],
)
def test_reference_scores_are_checked(column, message):
    dataset = Dataset.from_dict({"prompt": ["w1", "w2"], **column})
    with pytest.raises(ValueError, match=message):
        check_references(dataset, "train_dataset", True)
    check_references(dataset, "train_dataset", False)
