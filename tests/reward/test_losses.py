"""Reward-model losses on hand numbers: leads of log 3, where the sigmoid is 3/4 and 1/4."""

import math

import pytest
import torch

from trl_ext.reward.losses import centering_losses, imitation_loss, pair_losses, preference_loss

LEAD = math.log(3)
RIGHT, WRONG = 0.287682, 1.386294  # -log 3/4 and -log 1/4


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def digits(value):
    return pytest.approx(value, abs=6e-7)


@pytest.mark.parametrize(
    ("chosen", "rejected", "options", "expected"),
    [
        pytest.param([LEAD], [0.0], {}, RIGHT, id="right"),
        pytest.param([0.0], [LEAD], {}, WRONG, id="wrong"),
        pytest.param([5.0], [5.0], {}, 0.693147, id="a tie is a coin"),
        pytest.param([1 + LEAD, 1.0], [1.0, 1 + LEAD], {}, 0.836988, id="mean over pairs"),
        pytest.param([2 * LEAD], [0.0], {"margin": LEAD}, RIGHT, id="a margin takes off the lead"),
        pytest.param([LEAD, LEAD], [0.0, 0.0], {"margin": tensor(0, 2 * LEAD)}, 0.836988, id="a margin for each pair"),
        pytest.param([LEAD], [0.0], {"label_smoothing": 0.1}, 0.397543, id="0.9 right + 0.1 wrong"),
        pytest.param([0.0], [LEAD], {"label_smoothing": 0.1}, 1.276433, id="0.9 wrong + 0.1 right"),
        pytest.param(
            [LEAD, LEAD], [0.0, 0.0], {"label_smoothing": tensor(0, 0.2)}, 0.397543, id="smoothing of one pair"
        ),
        pytest.param([2 * LEAD], [0.0], {"margin": LEAD, "label_smoothing": 0.1}, 0.397543, id="margin and smoothing"),
        pytest.param([800.0], [0.0], {}, 0.0, id="no overflow"),
        pytest.param([0.0], [800.0], {}, 800.0, id="no log of zero"),
    ],
)
def test_preference_loss_by_hand(chosen, rejected, options, expected):
    assert preference_loss(tensor(*chosen), tensor(*rejected), **options).item() == digits(expected)


def test_without_margin_and_smoothing_it_is_the_plain_loss():
    chosen, rejected = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    plain = torch.log1p(torch.exp(rejected - chosen))
    torch.testing.assert_close(pair_losses(chosen, rejected), plain)
    zeros = torch.zeros(5)
    for margin, smoothing in ((0.0, 0.0), (None, zeros), (zeros, 0.0)):
        assert torch.equal(pair_losses(chosen, rejected, margin, smoothing), pair_losses(chosen, rejected))
    assert preference_loss(chosen, rejected) == pair_losses(chosen, rejected).mean()


def test_right_and_wrong_label_of_a_pair_differ_by_the_lead():
    chosen, rejected = tensor(1.2, -0.5), tensor(0.2, -1.0)
    torch.testing.assert_close(pair_losses(rejected, chosen) - pair_losses(chosen, rejected), chosen - rejected)
    # a label that is wrong with probability eps costs (1 - eps) of the one and eps of the other
    swapped = 0.7 * pair_losses(chosen, rejected) + 0.3 * pair_losses(rejected, chosen)
    torch.testing.assert_close(pair_losses(chosen, rejected, label_smoothing=0.3), swapped)


@pytest.mark.parametrize(
    ("options", "slope"),
    [({}, -0.25), ({"margin": LEAD}, -0.5), ({"label_smoothing": 0.1}, -0.15), ({"label_smoothing": 0.4}, 0.15)],
)
def test_the_gradient_is_sigmoid_of_the_lead_less_the_target(options, slope):
    """The chosen score must rise and the rejected fall, until the lead says what the smoothed label says."""
    chosen, rejected = tensor(LEAD).requires_grad_(), tensor(0).requires_grad_()
    preference_loss(chosen, rejected, **options).backward()
    assert chosen.grad.item() == digits(slope)
    assert rejected.grad.item() == digits(-slope)


@pytest.mark.parametrize(
    ("chosen", "rejected", "options", "match"),
    [
        (torch.zeros(2), torch.zeros(3), {}, r"chosen \(2,\) and rejected \(3,\)"),
        (torch.zeros(2, 1), torch.zeros(2, 1), {}, r"\(2, 1\).*must both be \(B,\)"),
        (torch.zeros(0), torch.zeros(0), {}, "with a pair"),
        (torch.zeros(2), torch.zeros(2), {"margin": torch.zeros(2, 1)}, r"margin has shape \(2, 1\)"),
        (torch.zeros(2), torch.zeros(2), {"label_smoothing": torch.zeros(3)}, r"label_smoothing has shape \(3,\)"),
    ],
)
def test_shapes_that_do_not_fit_are_named(chosen, rejected, options, match):
    with pytest.raises(ValueError, match=match):
        preference_loss(chosen, rejected, **options)


def test_imitation_is_the_token_mean_and_falls_as_the_tokens_become_likelier():
    logps = tensor(-0.7, -0.2, -1.0, -0.5, -0.3, -0.4).requires_grad_()
    loss = imitation_loss(logps)
    assert loss.item() == digits(0.516667)
    loss.backward()
    assert logps.grad.tolist() == [digits(-1 / 6)] * 6
    with pytest.raises(ValueError, match="no response token"):
        imitation_loss(torch.zeros(0))


def test_centering_is_the_square_of_the_sum():
    assert centering_losses(tensor(1.0, -2.0, 3.0), tensor(2.0, 2.0, -3.0)).tolist() == [9, 0, 0]
