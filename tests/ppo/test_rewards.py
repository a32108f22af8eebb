"""Score shaping and token rewards: hand numbers, and the cases that ruin a run in silence."""

import math

import pytest
import torch

from trl_ext.ops.advantages import gae
from trl_ext.ops.moments import RunningMoments
from trl_ext.ppo.rewards import (
    best_answer_weights,
    shape_placed,
    shape_scores,
    sigmoid_scores,
    token_rewards,
)

NAN, INF = float("nan"), float("inf")
SCORES = torch.tensor([1.0, 2.0, 4.0, 3.0])  # mean 2.5, unbiased std sqrt(5 / 3)
STD = (5 / 3) ** 0.5


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("norm", [-1.5 / STD, -0.5 / STD, 1.5 / STD, 0.5 / STD]),
        ("scale", [1 / STD, 2 / STD, 4 / STD, 3 / STD]),
        ("none", [1.0, 2.0, 4.0, 3.0]),
    ],
)
def test_modes_by_hand_with_and_without_clip(mode, expected):
    expected = torch.tensor(expected)
    torch.testing.assert_close(shape_scores(SCORES, RunningMoments(), mode, None), expected)
    torch.testing.assert_close(shape_scores(SCORES, RunningMoments(), mode, 0.8), expected.clamp(-0.8, 0.8))


def test_the_moments_take_in_the_batch_before_it_is_normalised():
    moments = RunningMoments()
    shape_scores(SCORES, moments, "norm", None)
    # With (8, 9) on top: mean 4.5, squared deviations 53.5, std sqrt(10.7).
    shaped = shape_scores(torch.tensor([8.0, 9.0]), moments, "norm", None)
    torch.testing.assert_close(shaped, torch.tensor([3.5, 4.5]) / 10.7**0.5)
    assert moments.count == 6


@pytest.mark.parametrize("mode", ["norm", "scale", "none"])
def test_the_moments_are_updated_in_every_mode(mode):
    moments = RunningMoments()
    shape_scores(SCORES, moments, mode, None)
    assert (moments.count, moments.mean) == (4, 2.5)


def test_a_first_single_score_is_neither_nan_nor_infinite():
    assert shape_scores(torch.tensor([3.0]), RunningMoments(), "norm", None).tolist() == [0.0]
    assert shape_scores(torch.tensor([3.0]), RunningMoments(), "scale", None).tolist() == [3.0]


@pytest.mark.parametrize("value", [0.0, 0.1, -1e4 / 3])
def test_equal_scores_are_not_blown_up(value):
    scores = torch.full((7,), value)
    assert shape_scores(scores, RunningMoments(), "norm", None).abs().max() < 1e-6
    assert torch.equal(shape_scores(scores, RunningMoments(), "scale", None), scores)


def test_shaped_scores_keep_their_dtype_and_carry_no_gradient():
    shaped = shape_scores(SCORES.bfloat16().requires_grad_(), RunningMoments(), "norm", 0.8)
    assert shaped.dtype == torch.bfloat16
    assert not shaped.requires_grad


@pytest.mark.parametrize("clip", [0.0, -0.8, NAN, INF])
def test_a_clip_that_is_not_positive_is_an_error_not_a_zero_reward(clip):
    with pytest.raises(ValueError, match="clip must be positive"):
        shape_scores(SCORES, RunningMoments(), "norm", clip)


def test_shape_scores_errors_come_before_the_moments_change():
    moments = RunningMoments()
    with pytest.raises(ValueError, match=r"'mean'; choose one of norm, scale, none"):
        shape_scores(SCORES, moments, "mean", None)
    with pytest.raises(ValueError, match=r"shape \(2, 2\)"):
        shape_scores(SCORES.view(2, 2), moments, "norm", None)
    with pytest.raises(ValueError, match="int64"):
        shape_scores(SCORES.long(), moments, "norm", None)
    with pytest.raises(ValueError, match="index 1"):
        shape_scores(torch.tensor([1.0, NAN]), moments, "norm", None)
    assert moments.count == 0


def test_token_rewards_by_hand():
    kl = torch.tensor([[0.2, -0.1, 0.4], [1.0, NAN, INF], [NAN, NAN, NAN]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]])
    # The score comes on top of the last token's penalty; a row without tokens, and its score, contribute nothing.
    rewards = token_rewards(torch.tensor([0.8, -0.5, NAN]), kl, mask, coef=0.5)
    expected = torch.tensor([[-0.1, 0.05, 0.8 - 0.2], [-0.5 - 0.5, 0.0, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(rewards, expected)


def test_the_rewards_of_a_response_sum_to_its_score_minus_the_penalty():
    generator = torch.Generator().manual_seed(0)
    kl, scores = torch.randn(5, 8, generator=generator), torch.randn(5, generator=generator)
    mask = torch.arange(8) < torch.tensor([8, 7, 3, 1, 2]).unsqueeze(1)
    rewards = token_rewards(scores, kl, mask, coef=0.05)
    torch.testing.assert_close(rewards.sum(1), scores - 0.05 * (kl * mask).sum(1))
    # Without a penalty, nothing but the score, on the last token: not one past it.
    rewards = token_rewards(scores, kl, mask, coef=0.0)
    assert rewards.abs().nonzero().tolist() == [[0, 7], [1, 6], [2, 2], [3, 0], [4, 1]]


def test_token_rewards_errors():
    with pytest.raises(ValueError, match=r"kl \(2, 3\), mask \(2, 2\)"):
        token_rewards(torch.zeros(2), torch.zeros(2, 3), torch.ones(2, 2), 0.05)
    with pytest.raises(ValueError, match=r"scores \(3,\), kl \(2, 3\)"):
        token_rewards(torch.zeros(3), torch.zeros(2, 3), torch.ones(2, 3), 0.05)


# ---------------------------------------------------------------------- scores in parts


def test_rewards_on_tokens_that_sum_to_a_terminal_one_give_the_same_returns():
    """At lambda 1 and gamma 1 the return of the whole response does not know where its parts are paid."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(6) < torch.tensor([[6], [4], [1], [3]])
    values, kl, parts = (torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(3))
    parts = torch.where(mask, parts, 0)
    terminal = token_rewards(parts.sum(1), kl, mask, 0.1)
    placed = token_rewards(parts.sum(1), kl, mask, 0.1, parts)
    assert not torch.allclose(terminal, placed)
    torch.testing.assert_close(terminal.sum(1), placed.sum(1))
    (_, returns), (_, in_parts) = (gae(rewards, values, mask, 1.0, 1.0) for rewards in (terminal, placed))
    torch.testing.assert_close(returns[:, 0], in_parts[:, 0])
    # and of a later token what has been paid before it is missing
    torch.testing.assert_close(in_parts[:, 2], torch.where(mask[:, 2], returns[:, 2] - parts[:, :2].sum(1), 0))


def test_parts_by_hand_and_what_is_left_goes_to_the_last_token():
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    placed = torch.tensor([[0.5, 0.0, 0.0], [0.0, 2.0, NAN]])
    rewards = token_rewards(torch.tensor([2.0, -1.0]), torch.ones(2, 3), mask, 0.1, placed)
    torch.testing.assert_close(rewards, torch.tensor([[0.4, -0.1, 1.4], [-0.1, -1.1, 0.0]]))


@pytest.mark.parametrize("mode", ["norm", "scale", "none"])
@pytest.mark.parametrize("clip", [None, 0.8])
def test_parts_are_on_the_scale_of_the_score_and_shortened_with_it(mode, clip):
    """Of each row: parts / raw score without its mean = parts / shaped score without its mean, before the clip."""
    moments = RunningMoments()
    shaped = shape_scores(SCORES, moments, mode, clip)
    placed = torch.tensor([[0.25, 0.5], [2.0, -1.0], [3.0, 1.0], [0.0, 0.0]])
    parts = shape_placed(placed, SCORES, moments, mode, clip)
    std, mean = (STD if mode != "none" else 1.0), (2.5 if mode == "norm" else 0.0)
    for row in range(4):
        whole = (float(SCORES[row]) - mean) / std
        shorter = 1.0 if clip is None or abs(whole) <= clip else clip / abs(whole)
        assert float(shaped[row]) == pytest.approx(whole * shorter)
        assert parts[row].tolist() == pytest.approx([p / std * shorter for p in placed[row].tolist()])


def test_scores_that_do_not_vary_leave_their_parts_as_they_are():
    moments = RunningMoments()
    scores = torch.tensor([1.0, 1.0])
    shape_scores(scores, moments, "norm", None)
    placed = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert shape_placed(placed, scores, moments, "norm", None).tolist() == placed.tolist()


def test_parts_that_are_no_numbers_are_refused():
    moments = RunningMoments()
    with pytest.raises(ValueError, match=r"rows \[1\] not finite"):
        shape_placed(torch.tensor([[1.0], [NAN]]), torch.ones(2), moments, "none", None)
    with pytest.raises(ValueError, match=r"placed must be \(B, T\)"):
        shape_placed(torch.ones(2), torch.ones(2), moments, "none", None)


def test_sigmoid_around_reference_scores_by_hand():
    """sigmoid(0) = 1/2; the mean of sigmoid(log 3) = 3/4 and sigmoid(-log 3) = 1/4 is 1/2."""
    scores = torch.tensor([2.0, 1.0, 5.0])
    shaped = sigmoid_scores(scores, [[2.0], [1 - math.log(3), 1 + math.log(3)], [5 - math.log(3)]])
    torch.testing.assert_close(shaped, torch.tensor([0.5, 0.5, 0.75]))
    with pytest.raises(ValueError, match="reference scores"):
        sigmoid_scores(scores, [[2.0], [], [1.0]])


def test_best_answers_count_by_their_tokens():
    """Of 3 + 5 tokens of the best: the two micro-batches of the trainer would get 8 / 2."""
    weights = best_answer_weights(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([3, 4, 5]), 1.0, lambda n: n / 2)
    assert weights.tolist() == [0.25, 0.0, 0.25]
    none = best_answer_weights(torch.zeros(3), torch.tensor([3, 4, 5]), 1.0, lambda n: n.clamp(min=1))
    assert none.tolist() == [0.0, 0.0, 0.0]
