"""PPO's losses: hand numbers, identities, and gradients that survive garbage outside the mask."""

import math

import pytest
import torch

from trl_ext.ppo.losses import (
    best_answers_loss,
    dis_loss,
    explained_variance,
    kl_penalty_loss,
    policy_loss,
    value_loss,
)

NAN, INF = float("nan"), float("inf")
MASK = torch.tensor([[1, 1, 1], [1, 0, 0]])
GARBAGE = torch.tensor([[0, 0, 0], [0, NAN, INF]])  # added outside the mask
EMPTY = torch.zeros_like(MASK)


def log_ratio(*ratios):
    """logps whose ratios to old_logps of 0 are given, in the first row; 1 in the second."""
    return torch.tensor([list(map(math.log, ratios)), [0.0, 0.0, 0.0]])


# Tokens: ratio 1.5 with A = 2 (clipped above to 1.2), 0.5 with A = -1 (clipped below to 0.8), 0.5 with A = 1 (the clip
# would help the policy: not used), 1 with A = 3.
LOGPS = log_ratio(1.5, 0.5, 0.5)
OLD_LOGPS = torch.zeros(2, 3)
ADVANTAGES = torch.tensor([[2.0, -1.0, 1.0], [3.0, 0.0, 0.0]])


def test_policy_loss_by_hand():
    # -2 * 1.2 = -2.4;  +1 * 0.8 = 0.8;  -1 * 0.5 = -0.5;  -3: the sum is -5.1.
    loss, stats = policy_loss(LOGPS, OLD_LOGPS, ADVANTAGES, MASK, 0.2, 0.2)
    assert loss.item() == pytest.approx(-5.1 / 4)
    assert stats["ratio_mean"].item() == pytest.approx(3.5 / 4)
    assert stats["ratio_max"].item() == pytest.approx(1.5)
    assert stats["clip_fraction"].item() == 0.5
    # k3 of KL(old, new) = r - 1 - ln r: 0.5 - 0.4054651, and twice -0.5 + 0.6931472, and 0.
    assert stats["approx_kl"].item() == pytest.approx((0.0945349 + 2 * 0.1931472) / 4, abs=1e-6)


@pytest.mark.parametrize("garbage", [0, GARBAGE])
def test_the_terms_count_as_much_as_their_weights(garbage):
    weights = torch.tensor([[0.5, 2.0, 3.0], [1.0, 0.0, 0.0]]) + garbage
    logps = LOGPS.clone().requires_grad_()
    loss, _ = policy_loss(logps, OLD_LOGPS, ADVANTAGES, MASK, 0.2, 0.2, weights=weights)
    # 0.5 * -2.4 + 2 * 0.8 + 3 * -0.5 + 1 * -3
    assert loss.item() == pytest.approx(-4.1 / 4)
    loss.backward()
    # Of the terms that the clip leaves: -A r w / 4
    torch.testing.assert_close(logps.grad, torch.tensor([[0.0, 0.0, -3 * 0.5 / 4], [-3 / 4, 0.0, 0.0]]))
    loss, _ = kl_penalty_loss(LOGPS, OLD_LOGPS, ADVANTAGES, MASK, 0.1, weights=weights)
    terms = [1.5 * -2 + 0.1 * 0.0945349, 0.5 + 0.1 * 0.1931472, -0.5 + 0.1 * 0.1931472, -3.0]
    assert loss.item() == pytest.approx(sum(w * x for w, x in zip([0.5, 2, 3, 1], terms, strict=True)) / 4, abs=1e-6)
    with pytest.raises(ValueError, match="weights"):
        policy_loss(LOGPS, OLD_LOGPS, ADVANTAGES, MASK, 0.2, 0.2, weights=torch.ones(2, 2))


def test_policy_loss_clips_each_side_by_its_own_range():
    loss, _ = policy_loss(LOGPS, OLD_LOGPS, ADVANTAGES, MASK, clip_low=0.1, clip_high=0.3)
    assert loss.item() == pytest.approx((-2 * 1.3 + 0.9 - 0.5 - 3) / 4)


def test_policy_gradient_by_hand():
    # d(-A r)/dlogp = -A r where the clip is inactive, 0 where it is; every token weighs 1/4.
    logps = LOGPS.clone().requires_grad_()
    policy_loss(logps, OLD_LOGPS, ADVANTAGES, MASK, 0.2, 0.2)[0].backward()
    torch.testing.assert_close(logps.grad, torch.tensor([[0, 0, -0.5], [-3, 0, 0]]) / 4)


def test_at_ratio_one_the_loss_is_minus_the_mean_advantage_and_its_gradient_that_of_reinforce():
    logps = torch.tensor([[-1.0, -2.0, -0.5], [-3.0, 0.0, 0.0]], requires_grad=True)
    loss, stats = policy_loss(logps, logps.detach(), ADVANTAGES, MASK, 0.2, 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(-5 / 4)
    torch.testing.assert_close(logps.grad, -ADVANTAGES * MASK / 4)
    assert (stats["ratio_mean"], stats["ratio_max"], stats["clip_fraction"], stats["approx_kl"]) == (1, 1, 0, 0)


def test_kl_penalty_loss_by_hand():
    # -A r: -3, +0.5, -0.5, -3; r - 1 - ln r as above: 0.0945349, twice 0.1931472, 0
    loss, stats = kl_penalty_loss(LOGPS, OLD_LOGPS, ADVANTAGES, MASK, 2.0)
    kl = 0.0945349 + 2 * 0.1931472
    assert loss.item() == pytest.approx((-6 + 2 * kl) / 4, abs=1e-6)
    assert stats.keys() == {"ratio_mean", "ratio_max", "approx_kl"}
    assert stats["approx_kl"].item() == pytest.approx(kl / 4, abs=1e-6)
    assert kl_penalty_loss(LOGPS, OLD_LOGPS, ADVANTAGES, MASK, 2.0, num_tokens=8)[0].item() == pytest.approx(loss / 2)


def test_the_kl_in_the_loss_pulls_back_and_not_where_nothing_has_moved():
    # d(-A r + coef (r - 1 - ln r)) / dlogp = -A r + coef (r - 1)
    logps = LOGPS.clone().requires_grad_()
    kl_penalty_loss(logps, OLD_LOGPS, ADVANTAGES, MASK, 2.0)[0].backward()
    expected = torch.tensor([[-3.0 + 1.0, 0.5 - 1.0, -0.5 - 1.0], [-3.0, 0, 0]]) / 4
    torch.testing.assert_close(logps.grad, expected)
    logps = torch.randn(2, 3).requires_grad_()
    kl_penalty_loss(logps, logps.detach(), 0 * ADVANTAGES, MASK, 5.0)[0].backward()
    assert torch.equal(logps.grad, torch.zeros(2, 3))


def test_the_gradient_of_the_penalised_loss_is_that_of_finite_differences():
    logps = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    given = (OLD_LOGPS.double(), ADVANTAGES.double(), MASK, 0.7)
    assert torch.autograd.gradcheck(lambda x: kl_penalty_loss(x, *given)[0], logps)


def test_the_penalised_loss_ignores_garbage_and_refuses_a_negative_coefficient():
    logps = (LOGPS + GARBAGE).requires_grad_()
    loss, _ = kl_penalty_loss(logps, OLD_LOGPS - GARBAGE, ADVANTAGES + GARBAGE, MASK, 2.0)
    loss.backward()
    assert loss.item() == pytest.approx(kl_penalty_loss(LOGPS, OLD_LOGPS, ADVANTAGES, MASK, 2.0)[0].item())
    assert logps.grad.isfinite().all()
    assert kl_penalty_loss(LOGPS, OLD_LOGPS, ADVANTAGES, EMPTY, 2.0)[0].item() == 0
    for coef in (-1.0, NAN):
        with pytest.raises(ValueError, match="coef must be >= 0"):
            kl_penalty_loss(LOGPS, OLD_LOGPS, ADVANTAGES, MASK, coef)
    with pytest.raises(ValueError, match=r"advantages \(2, 2\)"):
        kl_penalty_loss(LOGPS, OLD_LOGPS, ADVANTAGES[:, :2], MASK, 1.0)


# Tokens of (V, V_old, R), c = 0.2: (1.0, 0.5, 1.0) the clip holds V' at 0.7, error 0.3 > 0; (0.1, 0.2, 0.0) inside the
# range; (2.0, 0.0, -1.0) V' = 0.2, error 1.2 < 3: the larger, unclipped one counts; (1.0, 1.0, 0.0) no move.
VALUES = torch.tensor([[1.0, 0.1, 2.0], [1.0, 0.0, 0.0]])
OLD_VALUES = torch.tensor([[0.5, 0.2, 0.0], [1.0, 0.0, 0.0]])
RETURNS = torch.tensor([[1.0, 0.0, -1.0], [0.0, 0.0, 0.0]])


def test_value_loss_by_hand():
    loss, stats = value_loss(VALUES, OLD_VALUES, RETURNS, MASK, 0.2)
    assert loss.item() == pytest.approx(0.5 * (0.09 + 0.01 + 9 + 1) / 4)
    assert stats["clip_fraction"].item() == 0.25
    assert stats["value_mean"].item() == pytest.approx(4.1 / 4)
    assert stats["return_mean"].item() == 0.0
    assert stats["mse"].item() == pytest.approx((0 + 0.01 + 9 + 1) / 4)


def test_value_loss_without_clip_is_half_the_mean_squared_error():
    loss, stats = value_loss(VALUES, OLD_VALUES, RETURNS, MASK, None)
    assert loss.item() == pytest.approx(0.5 * (0 + 0.01 + 9 + 1) / 4)
    assert loss.item() == pytest.approx(stats["mse"].item() / 2)
    assert stats["clip_fraction"].item() == 0.0


def test_value_gradient_by_hand():
    # (V - R) / 4 where the clip is inactive; the first token's gradient is clipped away.
    values = VALUES.clone().requires_grad_()
    value_loss(values, OLD_VALUES, RETURNS, MASK, 0.2)[0].backward()
    torch.testing.assert_close(values.grad, torch.tensor([[0, 0.1, 3], [1, 0, 0]]) / 4)


def losses(mask=MASK, garbage=0.0, num_tokens=None):
    """Both losses, with garbage added to every input, and the two leaves that have gradients."""
    logps = (LOGPS + garbage).requires_grad_()
    values = (VALUES + garbage).requires_grad_()
    inputs = (OLD_LOGPS + garbage, ADVANTAGES + garbage), (OLD_VALUES + garbage, RETURNS + garbage)
    policy = policy_loss(logps, *inputs[0], mask, 0.2, 0.2, num_tokens=num_tokens)
    value = value_loss(values, *inputs[1], mask, 0.2, num_tokens=num_tokens)
    return policy, value, logps, values


def test_garbage_outside_the_mask_changes_neither_value_nor_gradient():
    clean, dirty = losses(), losses(garbage=GARBAGE)
    for (loss, stats), (dirty_loss, dirty_stats) in zip(clean[:2], dirty[:2], strict=True):
        assert torch.equal(loss, dirty_loss)
        assert stats == dirty_stats
        (loss + dirty_loss).backward()
    for leaf, dirty_leaf in zip(clean[2:], dirty[2:], strict=True):
        assert torch.equal(leaf.grad, dirty_leaf.grad)
        assert torch.equal(dirty_leaf.grad[1, 1:], torch.zeros(2))


@pytest.mark.parametrize("num_tokens", [None, 0.0, 8.0, torch.tensor(8)])
def test_an_empty_mask_gives_zero_with_a_graph(num_tokens):
    policy, value, *leaves = losses(EMPTY, GARBAGE, num_tokens)
    for (loss, stats), leaf in zip((policy, value), leaves, strict=True):
        assert loss.item() == 0.0
        assert all(stat.item() == 0.0 for stat in stats.values())
        loss.backward()
        assert torch.equal(leaf.grad, torch.zeros(2, 3))


@pytest.mark.parametrize("num_tokens", [4.0, torch.tensor(4)])
def test_micro_batches_add_up_to_the_whole_batch(num_tokens):
    policy, value, logps, values = losses()
    (policy[0] + value[0]).backward()
    split_logps, split_values = LOGPS.clone().requires_grad_(), VALUES.clone().requires_grad_()
    total = 0.0
    for row in (slice(0, 1), slice(1, 2)):  # 3 tokens and 1: a mean of means would weigh them wrongly
        inputs = split_logps[row], OLD_LOGPS[row], ADVANTAGES[row], MASK[row]
        part, _ = policy_loss(*inputs, 0.2, 0.2, num_tokens=num_tokens)
        inputs = split_values[row], OLD_VALUES[row], RETURNS[row], MASK[row]
        part = part + value_loss(*inputs, 0.2, num_tokens=num_tokens)[0]
        part.backward()
        total += part.item()
    assert total == pytest.approx((policy[0] + value[0]).item(), abs=1e-6)
    torch.testing.assert_close(split_logps.grad, logps.grad)
    torch.testing.assert_close(split_values.grad, values.grad)


def test_only_the_new_policy_and_the_new_values_get_gradients():
    tensors = [torch.rand(2, 3, requires_grad=True) for _ in range(6)]
    (policy_loss(*tensors[:3], MASK, 0.2, 0.2)[0] + value_loss(*tensors[3:], MASK, 0.2)[0]).backward()
    assert [tensor.grad is not None for tensor in tensors] == [True, False, False, True, False, False]


def test_statistics_are_detached_scalars():
    policy, value, *_ = losses()
    for _, stats in (policy, value):
        for stat in stats.values():
            assert stat.shape == ()
            assert not stat.requires_grad


def test_explained_variance_by_hand():
    # Returns (1, 0, -1, 0): variance 0.5. Residuals R - V = (0.5, 0, -0.5, 0): variance 0.125. 1 - 0.25 = 0.75.
    values = RETURNS * 0.5 + GARBAGE
    assert explained_variance(values, RETURNS + GARBAGE, MASK).item() == pytest.approx(0.75)
    assert explained_variance(RETURNS, RETURNS, MASK).item() == 1.0
    assert explained_variance(torch.ones(2, 3), RETURNS, MASK).item() == 0.0  # a constant explains nothing
    assert explained_variance(RETURNS + 5, RETURNS, MASK).item() == pytest.approx(1.0)  # blind to a constant error
    assert explained_variance(-RETURNS, RETURNS, MASK).item() == pytest.approx(-3.0)  # worse than a constant


def test_explained_variance_of_constant_returns_is_zero():
    assert explained_variance(VALUES, torch.ones(2, 3), MASK).item() == 0.0
    assert explained_variance(VALUES, RETURNS, EMPTY).item() == 0.0


def test_explained_variance_over_processes():
    # A second process has R = (1, -1) and V = (0, 0). All residuals (0.5, 0, -0.5, 0, 1, -1), all returns
    # (1, 0, -1, 0, 1, -1), both of mean 0: 1 - 2.5 / 4.
    others = iter([[0.0, 2.0], [2.0], [0.0, 2.0], [2.0]])
    explained = explained_variance(RETURNS * 0.5, RETURNS, MASK, reduce=lambda x: x + torch.tensor(next(others)))
    assert explained.item() == pytest.approx(0.375)


def test_errors():
    with pytest.raises(ValueError, match=r"logps \(2, 3\), old_logps \(2, 3\), advantages \(2, 2\), mask \(2, 3\)"):
        policy_loss(LOGPS, OLD_LOGPS, ADVANTAGES[:, :2], MASK, 0.2, 0.2)
    with pytest.raises(ValueError, match=r"values \(2, 3\), old_values \(2, 3\), returns \(2, 3\), mask \(1, 3\)"):
        value_loss(VALUES, OLD_VALUES, RETURNS, MASK[:1], 0.2)
    with pytest.raises(ValueError, match="same shape"):
        explained_variance(VALUES, RETURNS[0], MASK)
    for low, high in ((-0.1, 0.2), (1.1, 0.2), (0.2, -0.1), (NAN, 0.2), (0.2, NAN)):
        with pytest.raises(ValueError, match="clip_low"):
            policy_loss(LOGPS, OLD_LOGPS, ADVANTAGES, MASK, low, high)
    with pytest.raises(ValueError, match="clip_range"):
        value_loss(VALUES, OLD_VALUES, RETURNS, MASK, -0.2)


# ---------------------------------------------------------------------- DIS, and the likelihood of the best


def test_dis_gradient_by_hand():
    """d loss / d logp = -A r / n inside [1 - 0.2, 1 + 0.5], 0 outside, whatever the sign of A; n = 4 tokens.

    Ratio 1.25, A = 2: -2.5 / 4. Ratio 0.5, A = 1: outside, where the clip would pull the token back up: 0. Ratio 2,
    A = -1: outside, where the clip would push it down: 0. Ratio 1, A = 3: -3 / 4.
    """
    logps = (log_ratio(1.25, 0.5, 2.0) + GARBAGE).requires_grad_()
    advantages = torch.tensor([[2.0, 1.0, -1.0], [3.0, NAN, INF]])
    loss, stats = dis_loss(logps, torch.zeros(2, 3), advantages, MASK, 0.2, 0.5)
    loss.backward()
    torch.testing.assert_close(logps.grad, torch.tensor([[-2.5, 0.0, 0.0], [-3.0, 0.0, 0.0]]) / 4)
    assert loss.item() == pytest.approx((-2.5 - 3.0) / 4)
    assert float(stats["clip_fraction"]) == 0.5
    assert float(stats["ratio_max"]) == 2.0

    clipped = logps.detach().clone().requires_grad_()
    policy_loss(clipped, torch.zeros(2, 3), advantages, MASK, 0.2, 0.5)[0].backward()
    torch.testing.assert_close(clipped.grad[0], torch.tensor([-2.5, -0.5, 2.0]) / 4)  # PPO keeps both


def test_dis_counts_its_bounds_and_survives_an_infinite_ratio():
    logps = torch.tensor([[math.log(0.75), math.log(1.5), 200.0], [0.0, 0.0, 0.0]], requires_grad=True)
    loss, stats = dis_loss(logps, torch.zeros(2, 3), torch.ones(2, 3), MASK, 0.25, 0.5)
    loss.backward()
    torch.testing.assert_close(logps.grad, torch.tensor([[-0.75, -1.5, 0.0], [-1.0, 0.0, 0.0]]) / 4)
    assert float(stats["clip_fraction"]) == 0.25


def test_dis_of_one_batch_is_the_sum_of_its_parts_and_nothing_of_an_empty_one():
    logps, advantages = log_ratio(1.1, 0.9, 3.0), torch.ones(2, 3)
    whole, _ = dis_loss(logps, torch.zeros(2, 3), advantages, MASK, 0.2, 0.2, num_tokens=4)
    parts = [
        dis_loss(logps[i : i + 1], torch.zeros(1, 3), advantages[:1], MASK[i : i + 1], 0.2, 0.2, num_tokens=4)[0]
        for i in range(2)
    ]
    torch.testing.assert_close(whole, sum(parts))
    assert float(dis_loss(logps, torch.zeros(2, 3), advantages, EMPTY, 0.2, 0.2)[0]) == 0.0
    with pytest.raises(ValueError, match="clip_low"):
        dis_loss(logps, logps, advantages, MASK, 1.5, 0.2)


def test_likelihood_of_the_best_answers_by_hand():
    """- (0.5 * (-1 - 2 - 3) + 0 * ...) = 3; the gradient of each token that counts is -0.5."""
    logps = (torch.tensor([[-1.0, -2.0, -3.0], [-4.0, 0.0, 0.0]]) + GARBAGE).requires_grad_()
    loss = best_answers_loss(logps, MASK, torch.tensor([0.5, 0.0]))
    loss.backward()
    assert loss.item() == 3.0
    assert logps.grad.tolist() == [[-0.5, -0.5, -0.5], [0.0, 0.0, 0.0]]
    with pytest.raises(ValueError, match=r"weights must be \(B,\)"):
        best_answers_loss(logps, MASK, torch.ones(3))
