"""Masked statistics: hand numbers, and garbage outside the mask that must not show."""

import pytest
import torch

from trl_ext.ops.masking import check_same_shape, masked_mean, masked_mean_var, masked_whiten

NAN, INF = float("nan"), float("inf")
X = torch.tensor([[1.0, 2.0, NAN], [6.0, INF, -INF]])
MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])


def test_check_same_shape_names_every_tensor_and_shape():
    with pytest.raises(ValueError, match=r"left \(2, 3\), right \(3, 2\)"):
        check_same_shape(left=torch.zeros(2, 3), right=torch.zeros(3, 2))


def test_masked_mean_by_hand():
    assert masked_mean(X, MASK).item() == 3.0  # (1 + 2 + 6) / 3
    assert masked_mean(X, MASK, dim=1).tolist() == [1.5, 6.0]
    assert masked_mean(X, MASK, dim=0).tolist() == [3.5, 2.0, 0.0]  # the last column is empty
    assert masked_mean(X, MASK, dim=(0, 1)).item() == 3.0
    assert masked_mean(X, MASK.bool()).item() == 3.0


def test_masked_mean_of_nothing_is_zero():
    assert masked_mean(X, torch.zeros_like(MASK)).item() == 0.0
    assert masked_mean(torch.zeros(2, 0), torch.zeros(2, 0)).item() == 0.0


def test_masked_mean_gradient_is_one_over_n_and_ignores_garbage():
    x = X.clone().requires_grad_()
    masked_mean(x, MASK).backward()
    assert torch.equal(x.grad, MASK / 3)


def test_masked_mean_refuses_broadcasting():
    with pytest.raises(ValueError, match="same shape"):
        masked_mean(torch.zeros(2, 3), torch.ones(3))


def test_mean_and_biased_variance_by_hand():
    mean, var = masked_mean_var(X, MASK)
    assert mean.item() == 3.0
    assert var.item() == pytest.approx((4 + 1 + 9) / 3, abs=1e-12)
    assert [m.item() for m in masked_mean_var(X, torch.zeros_like(MASK))] == [0.0, 0.0]


def test_variance_survives_a_large_mean():
    # In float32 the one-pass formula E[x^2] - E[x]^2 gives 0 here.
    x = torch.tensor([10000.0, 10001.0, 10002.0])
    assert masked_mean_var(x, torch.ones(3))[1].item() == pytest.approx(2 / 3, abs=1e-12)


def test_whiten_by_hand():
    # Over (1, 2, 6): mean 3, variance 14/3, so (-2, -1, 3) / sqrt(14/3).
    root = (14 / 3 + 1e-8) ** 0.5
    expected = torch.tensor([[-2 / root, -1 / root, 0], [3 / root, 0, 0]])
    torch.testing.assert_close(masked_whiten(X, MASK), expected)
    shifted = torch.where(MASK.bool(), expected + 3, 0)
    torch.testing.assert_close(masked_whiten(X, MASK, shift_mean=False), shifted)


def test_whitened_has_mean_0_and_biased_variance_1_whatever_the_scale():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 11, generator=generator) * 3 + 5
    mask = torch.rand(7, 11, generator=generator) < 0.6
    mean, var = masked_mean_var(masked_whiten(x, mask), mask)
    assert mean.item() == pytest.approx(0, abs=1e-6)
    assert var.item() == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(masked_whiten(x * 4 - 100, mask), masked_whiten(x, mask), atol=1e-4, rtol=0)


def test_pads_that_are_not_zero_change_nothing():
    zeros = torch.where(MASK.bool(), X, 0)
    assert torch.equal(masked_whiten(X, MASK), masked_whiten(zeros, MASK))


@pytest.mark.parametrize("value", [0.1, 1e4 / 3])
def test_equal_values_whiten_to_zero_not_to_magnified_rounding(value):
    assert masked_whiten(torch.full((3, 7), value), torch.ones(3, 7)).abs().max() < 1e-6
    assert masked_whiten(torch.tensor([value]), torch.tensor([1])).tolist() == [0.0]


def test_whiten_of_nothing_is_zero():
    assert torch.equal(masked_whiten(X, torch.zeros_like(MASK)), torch.zeros(2, 3))


def test_whiten_keeps_the_dtype_and_refuses_integers():
    assert masked_whiten(X.bfloat16(), MASK).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="int64"):
        masked_whiten(torch.ones(2, 3, dtype=torch.int64), MASK)


def test_reduce_whitens_with_the_statistics_of_all_processes():
    # One process, whose `reduce` adds the sums of an imagined second one that holds the single value 7.
    # Together (1, 2, 6, 7): mean 4, squared deviations 9 + 4 + 4 + 9 = 26, variance 6.5.
    others = iter([torch.tensor([7.0, 1.0]), torch.tensor([9.0])])
    whitened = masked_whiten(X, MASK, reduce=lambda total: total + next(others))
    expected = torch.tensor([[-3.0, -2.0, 0.0], [2.0, 0.0, 0.0]]) / 6.5**0.5
    torch.testing.assert_close(whitened, expected)
