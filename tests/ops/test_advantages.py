"""Generalised advantage estimation: hand numbers, its two ends, and ragged rows."""

import math

import pytest
import torch

from trl_ext.ops.advantages import gae, gae_over_actions, length_adaptive_lambda

NAN, INF = float("nan"), float("inf")
REWARDS = torch.tensor([[1.0, 0.0, 2.0], [-1.0, NAN, INF]])
VALUES = torch.tensor([[0.5, 1.0, 1.5], [2.0, -INF, NAN]])
MASK = torch.tensor([[1, 1, 1], [1, 0, 0]])


def test_by_hand():
    # gamma 0.5, lam 0.5. Row 0, from the end: delta_2 = 2 + 0 - 1.5 = 0.5, delta_1 = 0 + 0.75 - 1 = -0.25,
    # delta_0 = 1 + 0.5 - 0.5 = 1. A_2 = 0.5, A_1 = -0.25 + 0.25 * 0.5 = -0.125, A_0 = 1 - 0.25 * 0.125 = 0.96875.
    # Row 1 ends after one token: A_0 = -1 - 2 = -3.
    advantages, returns = gae(REWARDS, VALUES, MASK, gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[0.96875, -0.125, 0.5], [-3.0, 0.0, 0.0]]
    assert returns.tolist() == [[1.46875, 0.875, 2.0], [-1.0, 0.0, 0.0]]


def test_lambda_one_is_monte_carlo_minus_value():
    # gamma 0.5: returns 1 + 0 + 0.25 * 2 = 1.5, 0.5 * 2 = 1, 2.
    advantages, returns = gae(REWARDS, VALUES, MASK, gamma=0.5, lam=1.0)
    assert returns.tolist() == [[1.5, 1.0, 2.0], [-1.0, 0.0, 0.0]]
    assert torch.equal(advantages[0], returns[0] - VALUES[0])


def test_lambda_zero_is_one_step_temporal_difference():
    # gamma 1: r + V' - V.
    advantages, _ = gae(REWARDS, VALUES, MASK, gamma=1.0, lam=0.0)
    assert advantages.tolist() == [[1.5, 0.5, 0.5], [-3.0, 0.0, 0.0]]


def test_a_perfect_critic_leaves_no_advantage():
    values = torch.tensor([[3.0, 2.0, 2.0], [-1.0, 0.0, 0.0]])  # the rewards still to come
    advantages, returns = gae(REWARDS, values, MASK, gamma=1.0, lam=0.95)
    assert advantages.abs().max() == 0
    assert torch.equal(returns, values)


def test_more_padding_and_other_rows_change_nothing():
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 4, 9, generator=generator)
    lengths = torch.tensor([9, 4, 1, 0])
    mask = torch.arange(9) < lengths.unsqueeze(1)
    advantages, returns = gae(rewards, values, mask, 0.99, 0.95)
    for row, length in enumerate(lengths.tolist()):
        one = slice(row, row + 1)
        alone = gae(rewards[one, :length], values[one, :length], mask[one, :length], 0.99, 0.95)
        torch.testing.assert_close(advantages[one, :length], alone[0])
        torch.testing.assert_close(returns[one, :length], alone[1])
        assert not advantages[row, length:].any()
        assert not returns[row, length:].any()


def test_results_are_targets_and_inputs_are_left_alone():
    rewards, values = REWARDS.clone(), VALUES.clone().requires_grad_()
    advantages, returns = gae(rewards, values, MASK, 1.0, 0.95)
    assert not advantages.requires_grad
    assert not returns.requires_grad
    torch.testing.assert_close(rewards, REWARDS, equal_nan=True, atol=0, rtol=0)


def test_errors():
    with pytest.raises(ValueError, match=r"rewards \(2, 3\), values \(2, 2\), mask \(2, 3\)"):
        gae(REWARDS, VALUES[:, :2], MASK, 1.0, 0.95)
    with pytest.raises(ValueError, match=r"\(B, T\)"):
        gae(REWARDS[0], VALUES[0], MASK[0], 1.0, 0.95)
    with pytest.raises(ValueError, match="gamma"):
        gae(REWARDS, VALUES, MASK, 1.1, 0.95)
    with pytest.raises(ValueError, match="lam"):
        gae(REWARDS, VALUES, MASK, 1.0, -0.1)
    with pytest.raises(ValueError, match="prefix"):
        gae(REWARDS, VALUES, torch.tensor([[1, 1, 1], [0, 1, 0]]), 1.0, 0.95)


def test_length_adaptive_lambda_by_hand_at_four_lengths():
    """1 - 1 / (0.05 l): 0.8 at 100, 0.9 at 200, 0.99 at 2,000; where it would be negative, 0."""
    found = length_adaptive_lambda(torch.tensor([100, 200, 2000, 10]), alpha=0.05)
    torch.testing.assert_close(found, torch.tensor([0.8, 0.9, 0.99, 0.0]))


def test_the_weights_of_the_differences_sum_to_a_share_of_the_response():
    """What the formula is made for: sum_k lambda^k = 1 / (1 - lambda) = alpha l."""
    lengths = torch.tensor([100, 400, 1000])
    torch.testing.assert_close(1 / (1 - length_adaptive_lambda(lengths, 0.1)), 0.1 * lengths, rtol=1e-3, atol=0)


def test_a_lambda_for_each_response_is_that_of_each_alone():
    generator = torch.Generator().manual_seed(3)
    rewards, values = torch.randn(2, 3, 6, generator=generator)
    mask = torch.arange(6) < torch.tensor([[6], [4], [1]])
    lams = torch.tensor([0.0, 0.5, 1.0])
    advantages, returns = gae(rewards, values, mask, 0.9, lams)
    for i, lam in enumerate(lams.tolist()):
        alone = gae(rewards[i : i + 1], values[i : i + 1], mask[i : i + 1], 0.9, lam)
        torch.testing.assert_close((advantages[i : i + 1], returns[i : i + 1]), alone)


@pytest.mark.parametrize("lam", [torch.tensor([0.5]), torch.tensor([0.5, 1.5]), torch.tensor([0.5, math.nan])])
def test_a_lambda_for_each_response_is_checked(lam):
    with pytest.raises(ValueError, match="lam must be"):
        gae(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 3), 1.0, lam)


def test_gaps_are_skipped_by_hand():
    """gamma 0.5, lam 0.5; actions at 0, 1 and 3, so that the first row is that of `test_by_hand` with a gap in it."""
    rewards = torch.tensor([[1.0, 0.0, 9.0, 2.0], [NAN, INF, -1.0, 7.0]])
    values = torch.tensor([[0.5, 1.0, NAN, 1.5], [3.0, 3.0, 2.0, INF]])
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 1, 0]])
    advantages, returns = gae_over_actions(rewards, values, mask, 0.5, 0.5)
    assert advantages.tolist() == [[0.96875, -0.125, 0.0, 0.5], [0.0, 0.0, -3.0, 0.0]]
    assert returns.tolist() == [[1.46875, 0.875, 0.0, 2.0], [0.0, 0.0, -1.0, 0.0]]


def test_without_gaps_it_is_gae():
    for found, expected in zip(
        gae_over_actions(REWARDS, VALUES, MASK, 0.5, 0.5), gae(REWARDS, VALUES, MASK, 0.5, 0.5), strict=True
    ):
        assert torch.equal(found, expected)
