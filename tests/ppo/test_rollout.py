"""A rollout's masks come from lengths, and its figures do not depend on padding or chunks."""

from dataclasses import fields

import pytest
import torch

from tests.ppo import tiny
from trl_ext import Role
from trl_ext.ppo.losses import explained_variance
from trl_ext.ppo.rollout import Rollout, add_advantages, add_kl_and_rewards, score_tokens

EOS, END, NAN = 1, 5, float("nan")
PROMPTS = [[6, 7, 8], [9], [10, 11], [12, 13, 14, 15, 16]]
COMPLETIONS = [[6, EOS], [7, 8, 9, 10], [END], [11, EOS, EOS]]  # the last one: eos inside, as a generator may give it
FILLED = ("logps", "entropy", "reference_logps", "values")


@pytest.fixture(scope="module")
def model(world):
    return tiny.four_roles(world).eval()


def make(prompts=PROMPTS, completions=COMPLETIONS, pad=EOS):
    return Rollout.from_ids(prompts, completions, [EOS, END], pad)


def scored(model, rollout, batch_size=2, **options):
    score_tokens(model, rollout, batch_size, **{"temperature": 1.0, "with_reference": True} | options)
    return rollout


# ---------------------------------------------------------------------- masks


def test_masks_come_from_lengths_where_pad_is_eos():
    rollout = make()
    assert rollout.completion_mask.sum(1).tolist() == [2, 4, 1, 3]
    assert rollout.prompt_mask.sum(1).tolist() == [3, 1, 2, 5]
    for i, ids in enumerate(COMPLETIONS):  # eos is among the tokens that count
        assert rollout.completion_ids[i][rollout.completion_mask[i].bool()].tolist() == ids
        assert rollout.prompt_ids[i][rollout.prompt_mask[i].bool()].tolist() == PROMPTS[i]
    assert rollout.prompt_mask[:, -1].tolist() == [1] * 4  # prompts are padded on the left,
    assert rollout.completion_mask[:, 0].tolist() == [1] * 4  # completions on the right


def test_truncated_means_without_any_end_token():
    assert make().truncated.tolist() == [False, True, False, False]
    assert make(completions=[[6], [], [EOS], [6, END]]).truncated.tolist() == [True, True, False, False]


def test_what_generation_lost_is_an_error():
    with pytest.raises(ValueError, match="4 prompts but 3 completions"):
        make(completions=COMPLETIONS[:3])
    with pytest.raises(ValueError, match=r"prompts \[1\] of this batch have no token"):
        make(prompts=[[6], [], [7], [8]])


# ---------------------------------------------------------------------- figures


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4])
def test_chunks_and_padding_change_no_figure(model, batch_size):
    """Against each sequence alone, unpadded, with the model's own functions."""
    rollout = scored(model, make(), batch_size)
    for i, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        ids = torch.tensor([prompt + completion])
        ones = torch.ones_like(ids)
        here = slice(len(prompt) - 1, -1)
        for role, name in ((Role.POLICY, "logps"), (Role.REFERENCE, "reference_logps")):
            with torch.no_grad(), model.role(role):
                logps = model.get_base_model()(ids).logits.log_softmax(-1)[0, here]
            expected = logps[range(len(completion)), completion]
            torch.testing.assert_close(getattr(rollout, name)[i, : len(completion)], expected, rtol=1e-4, atol=1e-5)
        values = model.values(ids, ones)[0, here]  # of the state before each token
        torch.testing.assert_close(rollout.values[i, : len(completion)], values, rtol=1e-4, atol=1e-5)
    for name in ("logps", "entropy", "reference_logps"):
        assert not getattr(rollout, name)[rollout.completion_mask == 0].any(), name


def test_a_pass_holds_sequences_of_like_length_and_no_more_tokens_than_allowed(model):
    long, short = [6] * 200, [7]
    rollout = make([long, short, long, short], [[8] * 100, [8], [8, 9], [8, 9]])
    shapes = [tuple(part.input_ids.shape) for part in rollout.parts()]
    assert shapes == [(2, 300), (2, 3)]  # a further pass would cost more than the 98 columns of padding
    assert [tuple(part.input_ids.shape) for part in make().parts(max_tokens=10)] == [(1, 8), (2, 5), (1, 3)]
    seen = []
    model.get_base_model().base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_mask"].numel()), with_kwargs=True
    )
    scored(model, make(), batch_size=2)
    assert max(seen) <= 2 * 8
    seen.clear()
    scored(model, make(), batch_size=1)
    assert max(seen) == 8


def test_the_policy_that_sampled_is_the_reference_at_first(model):
    rollout = scored(model, make(), temperature=0.5)
    assert torch.equal(rollout.logps, rollout.reference_logps)
    warmer = scored(model, make(), temperature=2.0)
    assert warmer.entropy.sum() > rollout.entropy.sum()  # of the distribution that was sampled from


# ---------------------------------------------------------------------- rewards and advantages


def test_the_score_lands_on_the_last_real_token_which_is_eos(model):
    rollout = scored(model, make())
    rollout.shaped_scores = torch.tensor([1.0, 2.0, 3.0, 4.0])
    add_kl_and_rewards(rollout, estimator="k1", beta=0.5)
    assert not rollout.rewards.isnan().any()
    assert rollout.rewards.nonzero().tolist() == [[0, 1], [1, 3], [2, 0], [3, 2]]
    last = rollout.completion_mask.sum(1) - 1
    assert [COMPLETIONS[i][t] for i, t in enumerate(last)] == [EOS, 10, END, EOS]
    assert rollout.rewards.sum(1).tolist() == [1.0, 2.0, 3.0, 4.0]


def test_the_penalty_is_on_every_token(model):
    rollout = scored(model, make())
    rollout.reference_logps = rollout.logps - 0.25
    rollout.shaped_scores = torch.zeros(4)
    add_kl_and_rewards(rollout, estimator="k1", beta=2.0)
    torch.testing.assert_close(rollout.rewards, -0.5 * rollout.completion_mask.float())
    rollout.reference_logps = None
    add_kl_and_rewards(rollout, estimator="k1", beta=2.0)
    assert not rollout.rewards.any()


@pytest.mark.parametrize("clip", [None, 0.5])
def test_advantages_are_whitened_then_clipped_over_real_tokens(model, clip):
    rollout = scored(model, make())
    rollout.shaped_scores = torch.tensor([1.0, -1.0, 0.5, 0.0])
    add_kl_and_rewards(rollout, estimator="k1", beta=0.0)
    options = {"gamma": 1.0, "lam": 0.95, "value_lam": 0.95, "clip": clip}
    add_advantages(rollout, whiten=True, **options)
    mask = rollout.completion_mask.bool()
    assert not rollout.advantages[~mask].any()
    if clip is None:
        assert rollout.advantages[mask].mean().item() == pytest.approx(0.0, abs=1e-6)
        assert rollout.advantages[mask].std(unbiased=False).item() == pytest.approx(1.0, abs=1e-5)
    else:
        assert rollout.advantages.abs().max().item() == clip
    # One token: its advantage is score - value, its return the score
    add_advantages(rollout, whiten=False, **options | {"clip": None})
    assert rollout.returns[2, 0].item() == pytest.approx(0.5)
    assert rollout.advantages[2, 0].item() == pytest.approx(0.5 - rollout.values[2, 0].item(), abs=1e-6)


# ---------------------------------------------------------------------- empty completions


@pytest.mark.parametrize(
    ("completions", "empty"), [([[], [7, EOS], [8], [9, 9, END]], 1), ([[], [], [], []], 4)], ids=["one", "all"]
)
def test_an_empty_completion_is_counted_and_harms_nothing(world, tmp_path, completions, empty):
    trainer = tiny.trainer(world, tmp_path, max_steps=1, missing_eos_penalty=1.0)
    trainer._generate = lambda prompts: (PROMPTS, completions, [" ".join(map(str, ids)) for ids in completions])
    trainer.train()
    entry = tiny.rollout_entries(trainer)[0]
    assert entry["completions/empty"] == empty
    for role in Role:
        assert all(weight.isfinite().all() for weight in tiny.role_weights(trainer.model, role).values())
    assert entry["completions/truncated_ratio"] == sum(ids[-1:] not in ([EOS], [END]) for ids in completions) / 4


def test_every_field_has_its_shape(model):
    rollout = scored(model, make())
    rollout.scores = rollout.shaped_scores = torch.zeros(4)
    add_kl_and_rewards(rollout, estimator="k3", beta=0.1)
    add_advantages(rollout, gamma=1.0, lam=0.95, value_lam=1.0, whiten=True, clip=None)
    shapes = dict.fromkeys((*FILLED, "kl", "rewards", "advantages", "returns", "completion_ids"), (4, 4))
    shapes |= {"scores": (4,), "shaped_scores": (4,), "truncated": (4,), "prompt_ids": (4, 5), "prompt_mask": (4, 5)}
    assert rollout.uncertainty is None, "one reward adapter is no ensemble"
    assert rollout.sampler_logps is rollout.importance is None, "the model itself samples"
    only_if_asked = {"placed", "best_weights", "action_mask"}
    assert all(getattr(rollout, name) is None for name in only_if_asked)
    by_collect = {"baseline_is_critic", "explained", "uncertainty", "per_function", "role_scores"}
    by_collect |= {"prompts", "completions"}
    for field in fields(Rollout):
        if field.name in by_collect | only_if_asked | {"sampler_logps", "importance"}:
            continue
        assert getattr(rollout, field.name).shape == shapes.get(field.name, (4, 4)), field.name


# Rewards (1, 2) and (3, -, with the last token outside): G = (3, 2) and (3); their mean over three tokens is 8/3
REWARDS = torch.tensor([[1.0, 2.0], [3.0, 9.0]])
HAND_MASK = torch.tensor([[1, 1], [1, 0]])


def advantages(values, whiten=False, **options):
    rollout = make(prompts=[[6], [7]], completions=[[8, 9], [8]])
    rollout.completion_mask, rollout.rewards, rollout.values = HAND_MASK, REWARDS, torch.tensor(values)
    add_advantages(rollout, gamma=1.0, lam=0.5, value_lam=1.0, whiten=whiten, clip=None, **options)
    return rollout


def test_where_the_critic_explains_nothing_the_baseline_is_the_mean_return():
    values = [[2.0, 3.0], [2.0, 7.0]]  # R - V = (1, -1, 1) varies more than R = (3, 2, 3)
    rollout = advantages(values, trust_critic=False)
    assert rollout.baseline_is_critic is False
    expected = torch.tensor([[3 - 8 / 3, 2 - 8 / 3], [3 - 8 / 3, 0.0]])
    torch.testing.assert_close(rollout.advantages, expected)
    torch.testing.assert_close(rollout.returns, torch.tensor([[3.0, 2.0], [3.0, 0.0]]))  # what the critic learns
    # whitened: mean 0, variance (1 + 4 + 1) / 27 = 2/9
    white = advantages(values, whiten=True, trust_critic=False).advantages
    torch.testing.assert_close(white, expected / (2 / 9) ** 0.5, rtol=1e-6, atol=1e-6)


def test_a_critic_that_explains_some_or_is_trusted_stays_the_baseline():
    good = [[2.5, 2.0], [2.5, 7.0]]  # R - V = (0.5, 0, 0.5) against R = (3, 2, 3): a quarter of the variance is left
    bad = [[2.0, 3.0], [2.0, 7.0]]
    for values, options in ((good, {"trust_critic": False}), (bad, {}), (bad, {"trust_critic": True})):
        rollout = advantages(values, **options)
        assert rollout.baseline_is_critic is True
        # GAE, lambda 0.5: delta = (1 + V2 - V1, 2 - V2) and 3 - V1
        (v1, v2), (w1, _) = values
        last = 2 - v2
        expected = torch.tensor([[1 + v2 - v1 + 0.5 * last, last], [3 - w1, 0.0]])
        torch.testing.assert_close(rollout.advantages, expected)


def test_what_a_critic_explains_of_the_rewards_holds_nothing_of_its_values():
    """Values that rise along a response and know nothing of its reward: returns at lambda 0 are the next token's."""
    rollout = make(prompts=[[6], [7]], completions=[[8] * 20, [8] * 20])
    rollout.rewards = torch.zeros(2, 20)
    rollout.rewards[0, -1] = 1.0
    rollout.values = torch.linspace(0, 5, 20).expand(2, 20).clone()
    add_advantages(rollout, gamma=1.0, lam=0.0, value_lam=0.0, whiten=False, clip=None)
    of_returns = explained_variance(rollout.values, rollout.returns, rollout.actions)
    assert of_returns > 0.4
    assert rollout.explained < -1
    sums = torch.tensor([[1.0], [0.0]]).expand(2, 20)
    assert rollout.explained == explained_variance(rollout.values, sums, rollout.actions)


def test_what_the_critic_explains_is_of_all_processes():
    # alone it explains some; sums that another process spoils explain nothing
    assert not advantages([[2.5, 2.0], [2.5, 7.0]], trust_critic=False, reduce=lambda x: x * NAN).baseline_is_critic
