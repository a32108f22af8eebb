"""Agreement by published numbers, by hand, and by annotators who are off."""

import math

import numpy as np
import pytest

from trl_ext.feedback.agreement import (
    agreement_report,
    bootstrap,
    cohen_kappa,
    krippendorff_alpha,
    label_table,
    share_of_agreement,
    with_the_others,
)
from trl_ext.feedback.labels import VERDICTS, Label
from trl_ext.feedback.pairs import Pair

NAN = math.nan
WORD = {value: name for name, value in VERDICTS.items() if name != "both_bad"}


def labels_of(table, left="a"):
    names = ("anna", "ben", "cleo", "dan")
    return [
        Label(f"p{j}", names[i], WORD[int(value)], left, "2026-01-01T00:00:00+00:00")
        for i, row in enumerate(table)
        for j, value in enumerate(row)
        if not math.isnan(value)
    ]


def test_the_share_counts_couples_of_labels():
    table = np.array([[1, 2, -1, NAN], [2, -1, -1, 1], [NAN, 0, 1, NAN]], dtype=float)
    # pair 0: 1 of 1 (directions count); pair 1: 0 of 3; pair 2: 1 of 3; pair 3: none
    assert share_of_agreement(table) == pytest.approx(2 / 7)
    assert with_the_others(table, 2) == pytest.approx(0 / 4)
    assert with_the_others(table, 0) == pytest.approx(2 / 5)
    assert math.isnan(share_of_agreement(table[:1]))


def test_kappa_by_hand():
    # 50 pairs: both a 20, both b 15, a-b 5, b-a 10. p_o = 0.7, p_e = 0.5 * 0.6 + 0.5 * 0.4 = 0.5, kappa = 0.4
    one = np.array([1] * 20 + [-1] * 15 + [1] * 5 + [-1] * 10, dtype=float)
    other = np.array([1] * 20 + [-1] * 15 + [-1] * 5 + [1] * 10, dtype=float)
    assert cohen_kappa(one, other) == pytest.approx(0.4)
    assert cohen_kappa(one, one) == pytest.approx(1)
    assert math.isnan(cohen_kappa(np.ones(5), np.ones(5)))
    assert math.isnan(cohen_kappa(np.array([1, NAN]), np.array([NAN, 1])))


def test_alpha_by_hand():
    # Krippendorff 2011, section A (two observers, binary data, ten units): alpha = 0.095
    one = [0, 1, 0, 0, 0, 0, 0, 0, 1, 0]
    other = [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    table = np.array([one, other], dtype=float) * 2 - 1
    assert krippendorff_alpha(table) == pytest.approx(0.095, abs=5e-4)
    assert math.isnan(krippendorff_alpha(np.ones((2, 5))))


def test_strengths_count_in_the_ordinal_alpha_only():
    rng = np.random.default_rng(0)
    one = rng.choice([-2.0, -1.0, 1.0, 2.0], 200)
    near = np.where(rng.random(200) < 0.5, one, np.sign(one) * (3 - abs(one)))  # same side, other strength
    table = np.stack([one, near])
    assert krippendorff_alpha(table) == pytest.approx(1)
    assert 0.6 < krippendorff_alpha(table, strengths=True) < 0.95


def made(seed=0, pairs=200, wrong=(0.05, 0.05, 0.45)):
    rng = np.random.default_rng(seed)
    truth = rng.choice([-1.0, 1.0], pairs)
    return np.stack([np.where(rng.random(pairs) < w, -truth, truth) for w in wrong])


def test_the_annotator_who_is_off_is_named_and_no_other():
    report = agreement_report(labels_of(made()), resamples=100)
    assert len(report.off) == 1
    assert report.off[0].startswith("annotator cleo agrees with the others on")
    assert report.share.low < report.share.value < report.share.high
    assert report.kappa["anna", "ben"].value > 0.7 > report.kappa["anna", "cleo"].value
    assert report.annotators["cleo"]["agreement"].count == 200
    fine = agreement_report(labels_of(made(wrong=(0.2, 0.2, 0.2))), resamples=100)
    assert fine.off == []


def test_the_topic_that_is_off_is_named():
    easy, hard = made(1, 150, (0.05, 0.05)), made(2, 150, (0.4, 0.4))
    labels = labels_of(np.concatenate([easy, hard], axis=1))
    pairs = [Pair(f"p{j}", "q", "a", "b", {"topic": "maths" if j < 150 else "poems"}) for j in range(300)]
    report = agreement_report(labels, pairs, "topic", resamples=100)
    assert [line.partition(":")[0] for line in report.off] == ["topic poems"]
    assert report.topics["maths"]["share"].value > 0.85 > report.topics["poems"]["share"].value
    with pytest.raises(ValueError, match="no pair has this column; there are topic"):
        agreement_report(labels, pairs, "subject", resamples=1)


def test_a_habit_of_the_left_side_is_seen():
    table = np.array([[1, 1, 1, -1], [NAN, NAN, NAN, 0]])
    habits = agreement_report(labels_of(table, left="a"), resamples=10).annotators
    assert habits["anna"]["left"] == 0.75
    assert habits["ben"]["ties"] == 1
    assert math.isnan(habits["ben"]["left"])


def test_one_annotator_has_no_agreement_and_no_error():
    report = agreement_report(labels_of(made(wrong=(0.1,))), resamples=10)
    assert (report.shared, report.pairs) == (0, 200)
    assert math.isnan(report.alpha.value)
    assert str(report.alpha) == "- (0)"


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    """Two annotators who are each wrong with probability w agree with probability w^2 + (1 - w)^2."""
    truth, inside = 0.2**2 + 0.8**2, 0
    for seed in range(60):
        table = made(seed, 60, (0.2, 0.2))
        share = bootstrap(share_of_agreement, table, 60, 100, np.random.default_rng(seed))
        inside += share.low <= truth <= share.high
    assert inside >= 50


def test_the_table_has_a_row_for_each_annotator():
    names, pairs, table = label_table(labels_of([[1, NAN], [NAN, -2]]))
    assert (names, pairs) == (["anna", "ben"], ["p0", "p1"])
    assert np.array_equal(table, [[1, NAN], [NAN, -2]], equal_nan=True)
