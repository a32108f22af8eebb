"""Running moments equal the moments of everything seen, however it was split."""

import json

import numpy as np
import pytest
import torch

from trl_ext.ops.moments import RunningMoments


def test_two_batches_by_hand():
    moments = RunningMoments()
    # (1, 2, 4, 3): mean 2.5, squared deviations 2.25 + 0.25 + 2.25 + 0.25 = 5, std sqrt(5 / 3).
    assert moments.update(torch.tensor([1.0, 2.0, 4.0, 3.0])) == (2.5, pytest.approx((5 / 3) ** 0.5))
    # Then (8, 9): mean of all 27 / 6 = 4.5, their squared deviations sum to 53.5.
    mean, std = moments.update(torch.tensor([[8.0], [9.0]]))
    assert (moments.count, mean, std) == (6, pytest.approx(4.5), pytest.approx((53.5 / 5) ** 0.5))
    assert (moments.mean, moments.std) == (mean, std)


@pytest.mark.parametrize("sizes", [[60], [1] * 60, [1, 2, 57], [30, 30], [59, 1]])
@pytest.mark.parametrize("offset", [0.0, 1e8])
def test_any_split_gives_numpys_mean_and_std(sizes, offset):
    # With the offset, a sum of squares would have lost every digit of the variance.
    values = np.random.default_rng(0).normal(size=60) * 3 + offset
    moments = RunningMoments()
    for batch in torch.from_numpy(values).split(sizes):
        moments.update(batch)
    assert moments.count == 60
    assert moments.mean == pytest.approx(values.mean(), rel=1e-12, abs=1e-12)
    assert moments.std == pytest.approx(values.std(ddof=1), rel=1e-9 if offset == 0 else 1e-7)


def test_a_first_single_sample_has_std_1():
    moments = RunningMoments()
    assert (moments.mean, moments.std, moments.count) == (0.0, 1.0, 0)
    assert moments.update(torch.tensor([7.0])) == (7.0, 1.0)
    assert moments.update(torch.tensor([9.0])) == (8.0, pytest.approx(2**0.5))


def test_equal_values_have_std_0():
    assert RunningMoments().update(torch.full((8,), 0.5)) == (0.5, 0.0)


def test_state_goes_through_json_and_continues():
    moments = RunningMoments()
    moments.update(torch.tensor([1.0, 5.0, -2.0]))
    resumed = RunningMoments()
    resumed.load_state_dict(json.loads(json.dumps(moments.state_dict())))
    assert resumed.state_dict() == moments.state_dict()
    assert resumed.update(torch.tensor([4.0])) == moments.update(torch.tensor([4.0]))


def test_low_precision_and_gradients_are_no_matter():
    x = torch.tensor([1.0, 2.0, 4.0, 3.0], dtype=torch.bfloat16, requires_grad=True)
    assert RunningMoments().update(x) == (2.5, pytest.approx((5 / 3) ** 0.5))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_named_and_not_added(bad):
    moments = RunningMoments()
    moments.update(torch.tensor([1.0, 2.0]))
    before = moments.state_dict()
    with pytest.raises(ValueError, match=r"index 1, 3 are not finite"):
        moments.update(torch.tensor([0.0, bad, 1.0, bad]))
    assert moments.state_dict() == before


def test_an_empty_batch_is_an_error():
    with pytest.raises(ValueError, match="no values"):
        RunningMoments().update(torch.tensor([]))
