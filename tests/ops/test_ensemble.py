"""One score from several reward models, by hand."""

import pytest
import torch

from trl_ext.ops.ensemble import combine_scores

MEMBERS = torch.tensor([[1.0, 3.0], [2.0, 2.0], [-1.0, 5.0]], dtype=torch.float64)  # deviations 1, 0, 3


@pytest.mark.parametrize(
    ("mode", "coef", "expected"),
    [
        ("mean", 0.5, [2.0, 2.0, 2.0]),
        ("min", 0.5, [1.0, 2.0, -1.0]),
        ("variance", 0.5, [1.5, 2.0, -2.5]),
        ("variance", 0.0, [2.0, 2.0, 2.0]),
    ],
)
def test_scores_and_disagreement_by_hand(mode, coef, expected):
    scores, uncertainty = combine_scores(MEMBERS, mode, coef)
    assert scores.tolist() == expected
    assert uncertainty.tolist() == [1.0, 0.0, 3.0]


@pytest.mark.parametrize("mode", ["mean", "min", "variance"])
def test_one_model_is_its_own_ensemble(mode):
    scores, uncertainty = combine_scores(MEMBERS[:, :1], mode)
    assert torch.equal(scores, MEMBERS[:, 0])
    assert uncertainty.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("mode", ["mean", "min", "variance"])
def test_identities(mode):
    members = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scores, uncertainty = combine_scores(members, mode)
    shifted, same = combine_scores(members + 7, mode)
    torch.testing.assert_close(shifted, scores + 7)
    torch.testing.assert_close(same, uncertainty)
    torch.testing.assert_close(combine_scores(members.flip(1), mode)[0], scores)
    assert bool((scores <= members.mean(1) + 1e-12).all()), "doubt never raises a score"


@pytest.mark.parametrize(
    ("members", "options", "match"),
    [
        (torch.zeros(3), {}, r"\(B, K\).*got \(3,\)"),
        (torch.zeros(3, 0), {}, "at least one reward model"),
        (MEMBERS, {"mode": "median"}, "unknown ensemble mode 'median'; choose one of mean, min, variance"),
        (MEMBERS, {"coef": -1.0}, "coef must be a number of at least 0"),
        (MEMBERS, {"coef": float("nan")}, "coef must be a number"),
    ],
)
def test_what_does_not_fit_is_named(members, options, match):
    with pytest.raises(ValueError, match=match):
        combine_scores(members, **options)


def test_weights_are_shares_of_the_mean_and_of_the_variance():
    scores, uncertainty = combine_scores(MEMBERS, "mean", weights=[3, 1])
    assert scores.tolist() == [1.5, 2.0, 0.5]
    assert uncertainty.tolist() == pytest.approx([0.75**0.5, 0.0, 6.75**0.5])  # of 1 and 3, three to one: 0.75
    assert combine_scores(MEMBERS, "variance", 1.0, [3, 1])[0].tolist() == pytest.approx([0.75, 2.0, -6.25])
    torch.testing.assert_close(combine_scores(MEMBERS, "variance", weights=[2, 2]), combine_scores(MEMBERS, "variance"))


@pytest.mark.parametrize(
    ("mode", "weights", "match"),
    [
        ("mean", [1.0], "1 ensemble weights for 2 reward models"),
        ("mean", [0.0, 0.0], "one of them above 0"),
        ("mean", [1.0, -1.0], "numbers of at least 0"),
        ("min", [1.0, 1.0], "has no weights"),
    ],
)
def test_weights_that_do_not_fit_are_named(mode, weights, match):
    with pytest.raises(ValueError, match=match):
        combine_scores(MEMBERS, mode, weights=weights)
