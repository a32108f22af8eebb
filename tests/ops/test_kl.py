"""The KL estimators and the controllers of the coefficient."""

import math

import pytest
import torch

from trl_ext.ops.kl import PIKL, AdaptiveKL, FixedKL, KeptDiversity, PenaltyKL, kl_estimate

LOGPS = torch.tensor([-1.0, -0.5, -2.0])
REF_LOGPS = torch.tensor([-1.2, -0.4, -1.5])
EACH = [FixedKL, lambda c: AdaptiveKL(c, 6, 1000), lambda c: PenaltyKL(c, 6), lambda c: PIKL(c, 6, 0.1, 1.5)]


def test_estimators_by_hand():
    # d = (0.2, -0.1, -0.5)
    torch.testing.assert_close(kl_estimate(LOGPS, REF_LOGPS, "k1"), torch.tensor([0.2, -0.1, -0.5]))
    torch.testing.assert_close(kl_estimate(LOGPS, REF_LOGPS, "k2"), torch.tensor([0.02, 0.005, 0.125]))
    # exp(-0.2) - 1 + 0.2 = 0.8187308 - 0.8;  exp(0.1) - 1 - 0.1 = 1.1051709 - 1.1;  exp(0.5) - 1.5 = 1.6487213 - 1.5
    k3 = torch.tensor([0.0187308, 0.0051709, 0.1487213])
    torch.testing.assert_close(kl_estimate(LOGPS, REF_LOGPS, "k3"), k3, atol=1e-6, rtol=0)


def test_k1_and_k3_are_unbiased_and_k2_is_not():
    # Two tokens: the expectation over the policy is a sum of two terms, exact.
    # KL = 0.7 ln 1.75 + 0.3 ln 0.5 = 0.183787; the mean of k2 is 0.5 (0.7 (ln 1.75)^2 + 0.3 (ln 0.5)^2) = 0.181677.
    policy = torch.tensor([0.7, 0.3], dtype=torch.float64)
    reference = torch.tensor([0.4, 0.6], dtype=torch.float64)
    kl = (policy * (policy / reference).log()).sum()
    for estimator, error in (("k1", 0.0), ("k3", 0.0), ("k2", 0.00211)):
        mean = (policy * kl_estimate(policy.log(), reference.log(), estimator)).sum()
        assert abs(mean - kl).item() == pytest.approx(error, abs=1e-6 if error else 1e-12)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_equal_logps_have_kl_exactly_zero(estimator):
    assert torch.equal(kl_estimate(LOGPS, LOGPS.clone(), estimator), torch.zeros(3))


def test_k3_keeps_its_digits_near_zero():
    # k3 is about d^2 / 2 there; exp(-d) - 1 in float32 would leave none of them.
    d = torch.tensor([1e-3])
    assert kl_estimate(d, torch.zeros(1), "k3").item() == pytest.approx(4.998e-7, rel=1e-3)


def test_estimate_refuses_unknown_names_and_other_shapes():
    with pytest.raises(ValueError, match=r"'k4'; choose one of k1, k2, k3"):
        kl_estimate(LOGPS, REF_LOGPS, "k4")
    with pytest.raises(ValueError, match=r"logps \(3,\), ref_logps \(2,\)"):
        kl_estimate(LOGPS, REF_LOGPS[:2], "k1")


def test_fixed_stays():
    controller = FixedKL(0.05)
    assert controller.update(100.0, 64) == 0.05
    assert controller.coef == 0.05


def test_adaptive_by_hand():
    # n / horizon = 0.1, target 6.
    controller = AdaptiveKL(0.5, target=6, horizon=1000)
    assert controller.update(6.6, 100) == pytest.approx(0.5 * 1.01)  # 10 % above: e = 0.1
    assert controller.update(60.0, 100) == pytest.approx(0.505 * 1.02)  # far above: e = 0.2
    assert controller.update(-3.0, 100) == pytest.approx(0.5151 * 0.98)  # k1 may be negative: e = -0.2
    assert controller.update(6.0, 100) == controller.coef == pytest.approx(0.504798)  # on target


def test_adaptive_refuses_a_batch_that_would_turn_the_coefficient_negative():
    controller = AdaptiveKL(0.5, target=6, horizon=100)
    with pytest.raises(ValueError, match="horizon"):
        controller.update(0.0, 500)
    assert controller.update(0.0, 499) > 0


def test_pi_by_hand():
    # target 4; log coef moves by 0.1 e + 2 d
    controller = PIKL(1.0, target=4, integral=0.1, proportional=2.0)
    assert math.log(controller.update(1.0, 8)) == pytest.approx(0.1 * -0.75 + 2 * 0.25)  # from 0 up to 1
    before = controller.coef
    assert math.log(controller.update(5.0, 8) / before) == pytest.approx(0.1 * 0.25 + 2 * 1.0)
    before = controller.coef
    assert math.log(controller.update(4.0, 8) / before) == pytest.approx(2 * -0.25)  # on target and falling
    before = controller.coef
    assert controller.update(4.0, 8) == before  # on target and still
    assert math.log(controller.update(400.0, 8) / before) == pytest.approx(0.1 + 2)  # both are clipped at 1


def course(controller, batches=300, disturbed=150):
    """The KL of a policy that the reward pulls away and the coefficient pulls back, from 0 on.

    A policy with the best reward at a given coefficient has a KL of about `pull` / coefficient^2; it goes there by a
    tenth of the way a batch. After a while something throws it far off.
    """
    kl, pull, seen = 0.0, 0.05, []
    for batch in range(batches):
        kl += 0.1 * (min(pull / controller.coef**2, 60.0) - kl)
        if batch == disturbed:
            kl *= 2.5
        seen.append(kl)
        controller.update(kl, 32)
    return seen


def test_pi_reaches_the_target_without_passing_it_by_a_third_and_comes_back_where_adaptive_overshoots():
    target = 6.0
    kl = course(PIKL(0.05, target, 0.1, 1.5))
    assert max(kl[:150]) <= 4 / 3 * target
    assert max(kl[:150]) >= 0.9 * target, "it gets there"
    assert kl[140:150] == pytest.approx([target] * 10, rel=0.1)
    assert kl[-10:] == pytest.approx([target] * 10, rel=0.1), "and back after a disturbance"
    assert max(course(AdaptiveKL(0.05, target, 640.0))[:150]) > 4 / 3 * target


@pytest.mark.parametrize(("integral", "proportional"), [(0.0, 1.0), (-0.1, 1.0), (0.1, -1.0), (math.nan, 1.0)])
def test_pi_refuses_bad_gains(integral, proportional):
    with pytest.raises(ValueError, match=r"integral|proportional"):
        PIKL(0.1, 6, integral, proportional)


def test_penalty_doubles_and_halves_beyond_a_factor_of_one_and_a_half():
    controller = PenaltyKL(1.0, target=6)
    assert [controller.update(kl, 1) for kl in (9.1, 9.0, 4.0, 3.9, 3.9)] == [2.0, 2.0, 2.0, 1.0, 0.5]


@pytest.mark.parametrize("make", EACH)
def test_state_survives_a_checkpoint(make):
    controller = make(0.05)
    controller.update(60.0, 100)
    resumed = make(0.9)
    resumed.load_state_dict(controller.state_dict())
    assert resumed.coef == controller.coef
    assert resumed.update(60.0, 100) == controller.update(60.0, 100)


@pytest.mark.parametrize("make", EACH)
def test_bad_observations_are_errors(make):
    for coef in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="coef"):
            make(coef)
    for kl in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="observed KL"):
            make(0.1).update(kl, 1)
    with pytest.raises(ValueError, match="n=0"):
        make(0.1).update(1.0, 0)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_bad_targets_and_horizons_are_errors(bad):
    for make in (lambda: AdaptiveKL(0.1, bad, 10), lambda: PenaltyKL(0.1, bad), lambda: PIKL(0.1, bad, 0.1, 1.5)):
        with pytest.raises(ValueError, match="target"):
            make()
    with pytest.raises(ValueError, match="horizon"):
        AdaptiveKL(0.1, 6, bad)


def seen(diversities, target=0.8, n=32):
    kept = KeptDiversity(target, 6.0)
    for diversity in diversities:
        kept.record(diversity, n, n)
    return kept


def test_what_is_further_gone_of_kl_and_diversity_is_held():
    assert seen([0.5] * 8).held(4.0) == 4.0
    assert seen([0.5] * 5 + [0.4] * 3).held(4.0) == pytest.approx(6.0)  # 0.8 of the start: all of it is spent
    assert seen([0.5] * 5 + [0.42] * 3).held(4.0) == pytest.approx(4.8)
    assert seen([0.5] * 5 + [0.42] * 3).held(5.5) == 5.5
    assert seen([0.5] * 5 + [0.1] * 3).held(3.0) == pytest.approx(5.7)  # 1.9 times at most
    assert seen([0.5] * 5 + [0.1] * 3).held(-0.1) == -0.1
    assert seen([0.5] * 5 + [0.1] * 3, target=0.0).held(3.0) == 3.0


def test_diversity_is_compared_once_there_is_a_start_and_over_enough_completions():
    assert seen([0.5, 0.5, 0.1, 0.1]).held(3.0) == 3.0
    assert seen([0.5] * 5 + [0.2, 0.5, 0.5, 0.5]).held(4.0) == 4.0  # forgotten after three
    few = seen([0.5] * 5 + [0.2, 0.5, 0.5, 0.5], n=4)  # of 8 batches, 0.925 of the start
    assert few.held(1.9) == pytest.approx(6 * (0.3 / 8 / 0.5) / 0.2)
    again = KeptDiversity(0.8, 6.0)
    again.load_state_dict(few.state_dict())
    assert again.held(1.9) == few.held(1.9)


def test_the_comparison_begins_anew_where_a_process_has_more_rows_and_without_what_was_undone():
    kept = seen([0.5] * 5 + [0.1] * 3)
    assert kept.held(3.0) > 3.0
    kept.forget_last()
    assert kept.held(3.0) == 3.0
    kept.record(0.4, 32, 32)
    assert kept.held(4.0) == pytest.approx(6.0)
    kept.record(0.3, 32, 8)  # on four processes
    assert (kept.first, kept.last, kept.held(3.0)) == ([0.3], [0.3], 3.0)
