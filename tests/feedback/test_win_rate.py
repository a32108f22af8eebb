"""Win rates by hand: order, length, people."""

import math

import numpy as np
import pytest

from trl_ext.feedback.judge import Judged
from trl_ext.feedback.labels import Label
from trl_ext.feedback.pairs import Pair
from trl_ext.feedback.win_rate import agreement_with_people, length_controlled, win_rate


def judged(verdict, i=0, a="x" * 10, b="y" * 10, consistent=True):
    return Judged(Pair(f"p{i}", "q", a, b), verdict, consistent, (verdict, verdict))


def test_counts_and_rate_by_hand():
    records = [judged(v) for v in ("a", "a", "a", "tie", "b", "failed")] + [judged("tie", consistent=False)]
    result = win_rate(records, resamples=200)
    assert (result.judged, result.wins, result.ties, result.losses) == (6, 3, 2, 1)
    assert (result.inconsistent, result.failed) == (1, 1)
    assert result.rate == pytest.approx(4 / 6)
    assert result.interval[0] < result.rate < result.interval[1]


def test_with_equal_lengths_the_controlled_rate_is_the_plain_one():
    y = np.array([1, 1, 0.5, 0, 1])
    assert length_controlled(y, np.zeros(5)) == (pytest.approx(0.7), 0)
    assert length_controlled(np.ones(5), np.arange(5.0)) == (1, 0)


def test_newton_finds_the_maximum():
    """Worked: y = 1, 1, 0, 0, d = 1, -1, 1, -1 (std 1): no effect of length, so theta = 0 and phi = 0."""
    rate, effect = length_controlled(np.array([1.0, 1, 0, 0]), np.array([1.0, -1, 1, -1]))
    assert (rate, effect) == (pytest.approx(0.5), pytest.approx(0, abs=1e-9))
    # y = 1 where longer: theta = 0 by symmetry, and phi solves phi = N t sigmoid(-phi t), t = tanh(1), N = 4
    rate, effect = length_controlled(np.array([1.0, 0, 1, 0]), np.array([1.0, -1, 1, -1]))
    t = math.tanh(1)
    assert rate == pytest.approx(0.5)
    assert effect == pytest.approx(4 * t / (1 + math.exp(effect * t)))
    # A quarter of the wins are not explained: against a fine grid
    y, d = np.array([1.0, 1, 1, 0, 0.5, 0, 1]), np.array([3.0, 1, -2, -4, 2, 2, 5])
    rate, effect = length_controlled(y, d)
    theta, phi = np.meshgrid(np.linspace(-2, 2, 401), np.linspace(-2, 3, 501), indexing="ij")
    logits = theta[..., None] + phi[..., None] * np.tanh(d / d.std())
    value = (y * logits - np.logaddexp(0, logits)).sum(-1) - phi**2 / 2
    best = np.unravel_index(value.argmax(), value.shape)
    assert math.log(rate / (1 - rate)) == pytest.approx(theta[best], abs=0.011)
    assert effect == pytest.approx(phi[best], abs=0.011)


def test_a_preference_for_length_is_taken_out_and_quality_stays():
    rng = np.random.default_rng(0)
    d = rng.normal(1, 1, 2000)  # A writes more
    p = 1 / (1 + np.exp(-2 * np.tanh(d / d.std())))
    y = (rng.random(2000) < p).astype(float)
    assert y.mean() > 0.7
    assert length_controlled(y, d)[0] == pytest.approx(0.5, abs=0.05)
    y = (rng.random(2000) < 0.7).astype(float)  # better by itself, and longer
    assert length_controlled(y, d)[0] == pytest.approx(0.7, abs=0.06)


def test_nothing_judged_is_nan():
    result = win_rate([judged("failed")])
    assert (result.failed, result.judged) == (1, 0)
    assert math.isnan(result.rate)


def test_agreement_with_people_is_of_their_majority():
    def votes(i, *verdicts):
        return [Label(f"p{i}", f"n{k}", v, None, "2026-01-01T00:00:00+00:00") for k, v in enumerate(verdicts)]

    records = [judged(v, i) for i, v in enumerate(("a", "b", "tie", "a", "failed", "a"))]
    labels = [*votes(0, "a", "a_much", "b"), *votes(1, "a"), *votes(2, "tie"), *votes(3, "a", "b"), *votes(4, "a")]
    assert agreement_with_people(records, labels) == {
        "pairs": 4,
        "same": 0.5,
        "decided": 2,
        "same_where_decided": 0.5,
    }
