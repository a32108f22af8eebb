"""The evaluation of a reward model: hand numbers, identities, ties, and errors that name what is wrong."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from datasets import Dataset

from trl_ext.reward.metrics import (
    LengthBias,
    PreferenceAccuracy,
    PreferenceCalibration,
    RewardAgreement,
    ScoreDistribution,
    evaluate_pairs,
    result_rows,
)
from trl_ext.reward.pair_statistics import (
    length_bias,
    pearson,
    preference_accuracy,
    preference_calibration,
    reward_agreement,
    score_distribution,
    spearman,
)

LN3, LN9 = math.log(3), math.log(9)  # sigmoid: 0.75 and 0.9
CHOSEN, REJECTED = [1.0, 2.0, 0.5, 3.0, 0.0], [0.0, 1.0, 1.5, 3.0, -1.0]  # right, right, wrong, tie, right
LENGTHS = [10, 5, 7, 8, 6], [5, 10, 7, 4, 3]  # chosen is longer, shorter, as long, longer, longer


@pytest.fixture
def scores():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(500, generator=generator) + 0.5, torch.randn(500, generator=generator)


# Accuracy


def test_accuracy_by_hand():
    # o = 1, 1, 0, 1/2, 1: mean 0.7; squares of o - 0.7: 3 * 0.09 + 0.49 + 0.04 = 0.8; sqrt(0.8 / 5 / 5).
    results = preference_accuracy(CHOSEN, REJECTED)
    assert results == pytest.approx(
        {"accuracy": 0.7, "accuracy_standard_error": math.sqrt(0.032), "count": 5, "ties": 0.2}
    )


def test_without_ties_the_standard_error_is_the_binomial_one():
    results = preference_accuracy([1.0] * 30 + [0.0] * 10, [0.5] * 40)
    assert results["accuracy_standard_error"] == pytest.approx(math.sqrt(0.75 * 0.25 / 40))


def test_the_standard_error_is_the_spread_over_samples():
    rng = np.random.default_rng(0)
    draws = [preference_accuracy(rng.integers(0, 3, 200), rng.integers(0, 3, 200)) for _ in range(1000)]
    spread = np.std([draw["accuracy"] for draw in draws])
    assert np.mean([draw["accuracy_standard_error"] for draw in draws]) == pytest.approx(spread, rel=0.1)


def test_swapping_the_answers_turns_accuracy_around(scores):
    chosen, rejected = scores
    chosen[:50] = rejected[:50]
    there, back = preference_accuracy(chosen, rejected), preference_accuracy(rejected, chosen)
    assert back["accuracy"] == pytest.approx(1 - there["accuracy"])
    assert back["accuracy_standard_error"] == pytest.approx(there["accuracy_standard_error"])


def test_deciles_by_hand():
    # Strengths 0 to 99 in mixed order; right from 50 on. Bin k holds 10 k to 10 k + 9.
    strength = np.random.default_rng(0).permutation(100)
    bins = preference_accuracy((strength >= 50).astype(float), np.full(100, 0.5), strength)["by_strength"]
    assert [row["count"] for row in bins] == [10] * 10
    assert [row["strength"] for row in bins] == [10 * k + 4.5 for k in range(10)]
    assert [(row["lower"], row["upper"]) for row in bins] == [(10 * k, 10 * k + 9) for k in range(10)]
    assert [row["accuracy"] for row in bins] == [0.0] * 5 + [1.0] * 5


@pytest.mark.parametrize("count", [1, 7, 10, 11, 99, 1000, 1234])
def test_deciles_of_distinct_strengths_differ_by_at_most_one_pair(count):
    bins = preference_accuracy(np.ones(count), np.zeros(count), np.arange(count) / 3)["by_strength"]
    sizes = [row["count"] for row in bins]
    assert len(sizes) == min(count, 10)
    assert sum(sizes) == count
    assert max(sizes) - min(sizes) <= 1


def test_few_distinct_strengths_get_a_bin_each():
    bins = preference_accuracy([1.0, 1, 0, 1], [0.0, 0, 1, 1], [3, 1, 3, 1])["by_strength"]
    # Strength 1: right and a tie, 0.75 with sqrt(1/16 / 2); strength 3: right and wrong, 0.5 with sqrt(1/4 / 2).
    assert [row["strength"] for row in bins] == [1, 3]
    assert [row["accuracy"] for row in bins] == [0.75, 0.5]
    assert [row["accuracy_standard_error"] for row in bins] == pytest.approx([math.sqrt(1 / 32), math.sqrt(1 / 8)])
    assert [row["count"] for row in bins] == [2, 2]


def test_a_rare_strength_among_few_keeps_its_bin():
    bins = preference_accuracy(np.ones(100), np.zeros(100), [0] * 97 + [1] + [2] * 2)["by_strength"]
    assert [row["count"] for row in bins] == [97, 1, 2]


def test_equal_strengths_are_never_torn_apart():
    strength = [0.0] * 55 + list(range(1, 46))  # deciles 1 to 5 end at a 0, and so does the bin that they merge to
    bins = preference_accuracy(np.ones(100), np.zeros(100), strength)["by_strength"]
    assert [row["count"] for row in bins] == [55, 5, 10, 10, 10, 10]
    assert all(before["upper"] < after["lower"] for before, after in pairwise(bins))


# Calibration


def test_calibration_by_hand():
    # p = 0.75, 0.75, 0.25, 0.9: bin (0.75, 0.8] or (0.7, 0.75] holds three with accuracy 2/3, (0.85, 0.9] one, right.
    # Differences of 0.01 keep the confidences off the edges.
    d = [LN3 + 0.01, LN3 + 0.01, -LN3 - 0.01, LN9 - 0.01]
    low, high = 1 / (1 + math.exp(-d[0])), 1 / (1 + math.exp(-d[3]))
    results = preference_calibration(d, [0.0] * 4)
    first, second = results["calibration_bins"]
    assert (first["lower"], first["upper"], second["lower"], second["upper"]) == pytest.approx((0.75, 0.8, 0.85, 0.9))
    assert (first["confidence"], first["accuracy"], first["count"]) == pytest.approx((low, 2 / 3, 3))
    assert (second["confidence"], second["accuracy"], second["count"]) == pytest.approx((high, 1, 1))
    assert first["accuracy_standard_error"] == pytest.approx(math.sqrt(2 / 27))
    error = 3 / 4 * (low - 2 / 3) + 1 / 4 * (1 - high)
    assert results["expected_calibration_error"] == pytest.approx(error)
    losses = [-math.log(low), -math.log(low), -math.log(1 - low), -math.log(high)]
    assert results["log_loss"] == pytest.approx(sum(losses) / 4)
    assert results["log_loss_standard_error"] == pytest.approx(np.std(losses) / 2)


def test_a_perfect_model_is_off_by_what_it_does_not_dare_to_claim():
    results = preference_calibration([LN9] * 20, [0.0] * 20)
    assert results["expected_calibration_error"] == pytest.approx(0.1)
    assert preference_calibration([800.0] * 20, [0.0] * 20)["expected_calibration_error"] == pytest.approx(0)


def test_a_surely_wrong_model_is_off_by_its_confidence_and_stays_finite():
    results = preference_calibration([0.0] * 4, [800.0] * 4)
    assert results["expected_calibration_error"] == pytest.approx(1)
    assert results["log_loss"] == pytest.approx(800)


def test_right_three_times_in_four_at_three_quarters_is_calibrated():
    results = preference_calibration([LN3, LN3, LN3, 0.0], [0.0, 0.0, 0.0, LN3])
    assert results["expected_calibration_error"] == pytest.approx(0)


def test_a_model_that_cannot_tell_is_calibrated_at_a_half():
    results = preference_calibration([1.0, 2.0], [1.0, 2.0])
    assert results["expected_calibration_error"] == 0
    assert results["log_loss"] == pytest.approx(math.log(2))
    assert results["calibration_bins"][0]["confidence"] == 0.5


def test_one_bin_compares_means(scores):
    chosen, rejected = scores
    d = (chosen.double() - rejected.double()).numpy()
    confidence = 1 / (1 + np.exp(-np.abs(d)))
    results = preference_calibration(chosen, rejected, bins=1)
    assert results["expected_calibration_error"] == pytest.approx(abs((d > 0).mean() - confidence.mean()))


# Length


def test_length_bias_by_hand():
    results = length_bias(CHOSEN, REJECTED, *LENGTHS)
    # Chosen longer in pairs 1 (right), 4 (tie), 5 (right): 5/6 with sqrt((2/36 + 4/36) / 3 / 3); rejected longer in 2.
    assert results["accuracy_longer_chosen"] == pytest.approx(5 / 6)
    assert results["accuracy_longer_chosen_standard_error"] == pytest.approx(math.sqrt(1 / 54))
    assert (results["accuracy_longer_rejected"], results["accuracy_equal_length"]) == (1, 0)
    counts = [results[f"count_{name}"] for name in ("longer_chosen", "longer_rejected", "equal_length")]
    assert counts == [3, 1, 1]
    # 3 longer, 1 equal for a half, of 5; squares around 0.7 as in the accuracy by hand.
    assert results["longer_is_chosen"] == pytest.approx(0.7)
    assert results["longer_is_chosen_standard_error"] == pytest.approx(math.sqrt(0.032))
    # Signs of scores + + - 0 +, of lengths + - 0 + +: products 1 - 1 + 0 + 0 + 1 = 1, over sqrt(4 * 4).
    assert results["length_within_pair"] == pytest.approx(1 / 4)


def test_a_model_of_length_shows_as_one():
    lengths = [torch.arange(1, 501), torch.arange(500, 0, -1) * 2]
    results = length_bias(lengths[0].log(), lengths[1].log(), *lengths)
    assert results["length_spearman"] == pytest.approx(1)
    assert results["length_within_pair"] == 1
    assert (results["accuracy_longer_chosen"], results["accuracy_longer_rejected"]) == (1, 0)
    accuracy = preference_accuracy(lengths[0].log(), lengths[1].log())["accuracy"]
    assert results["longer_is_chosen"] == pytest.approx(accuracy)
    assert length_bias(-lengths[0], -lengths[1], *lengths)["length_within_pair"] == -1


def test_spearman_by_hand_with_ties():
    # Ranks of x: 1, 2.5, 2.5, 4; of y: 1, 2, 3, 4. Sum of products around 2.5: 2.25 + 0 + 0 + 2.25 = 4.5, sums of
    # squares 4.5 and 5: 4.5 / sqrt(22.5).
    assert spearman(np.array([1.0, 7, 7, 9]), np.array([2.0, 3, 5, 80])) == pytest.approx(4.5 / math.sqrt(22.5))


def test_spearman_sees_only_order():
    x = np.random.default_rng(0).normal(size=100)
    assert spearman(x, np.exp(x)) == pytest.approx(1)
    assert spearman(x, -(x**3)) == pytest.approx(-1)
    assert pearson(x, np.exp(x)) < 0.95
    assert pearson(x, 3 - 2 * x) == pytest.approx(-1)


def test_pearson_by_hand():
    # Around the means: (-1, 0, 1) and (-2, 1, 1): products 3, squares 2 and 6.
    assert pearson(np.array([1.0, 2, 3]), np.array([0.0, 3, 3])) == pytest.approx(3 / math.sqrt(12))


def test_what_is_not_defined_is_nan():
    results = length_bias([0.1, 0.1], [0.1, 0.1], [4, 4], [4, 4])
    for name in ("length_spearman", "length_within_pair", "accuracy_longer_chosen", "accuracy_longer_rejected"):
        assert math.isnan(results[name])
    assert results["accuracy_equal_length"] == 0.5
    assert math.isnan(pearson(np.array([0.1] * 3), np.array([1.0, 2, 3])))
    assert math.isnan(score_distribution([1.0], [0.0])["chosen_std"])


# Distribution and agreement


def test_distribution_by_hand():
    results = score_distribution(list(range(101)), [0.0, 1.0] * 50 + [2.0])
    # Variance of 0 to 100 over N - 1: (101^2 - 1) / 12 * 101 / 100 = 858.5.
    assert results["chosen_mean"] == 50
    assert results["chosen_std"] == pytest.approx(math.sqrt(858.5))
    assert results["chosen_mean_standard_error"] == pytest.approx(math.sqrt(850 / 101))
    assert (results["chosen_min"], results["chosen_max"]) == (0, 100)
    quantiles = [results[f"chosen_{q}"] for q in ("q05", "q25", "q50", "q75", "q95")]
    assert quantiles == pytest.approx([5, 25, 50, 75, 95])
    assert results["rejected_mean"] == pytest.approx(52 / 101)
    assert results["difference_mean"] == pytest.approx(50 - 52 / 101)
    assert results["difference_max"] == 98


def test_agreement_by_hand():
    # Signs + + - 0 and + - - 0: all agree but the second. By chance 2/4 * 1/4 + 1/4 * 2/4 + 1/4 * 1/4 = 5/16.
    results = reward_agreement([1.0, 2.0, -1.0, 0.0], [2.0, -1.0, -3.0, 0.0])
    assert results["agreement"] == 0.75
    assert results["agreement_standard_error"] == pytest.approx(math.sqrt(3 / 64))
    assert results["kappa"] == pytest.approx((3 / 4 - 5 / 16) / (11 / 16))
    # Around the means 0.5 and -0.5: (0.5, 1.5, -1.5, -0.5) and (2.5, -0.5, -2.5, 0.5): products 4, squares 5 and 13.
    assert results["pearson"] == pytest.approx(4 / math.sqrt(65))
    # Ranks 3 4 1 2 and 4 2 1 3: 1 - 6 * (1 + 4 + 0 + 1) / (4 * 15).
    assert results["spearman"] == pytest.approx(0.4)
    assert results["count"] == 4


def test_agreement_with_itself_and_with_its_negation(scores):
    difference = scores[0] - scores[1]
    same, opposite = reward_agreement(difference, 3 * difference), reward_agreement(difference, -difference)
    for name in ("agreement", "kappa", "pearson", "spearman"):
        assert same[name] == pytest.approx(1)
    assert opposite["agreement"] == 0
    assert opposite["kappa"] < 0
    assert opposite["pearson"] == opposite["spearman"] == pytest.approx(-1)


def test_independent_models_agree_only_by_chance():
    rng = np.random.default_rng(0)
    results = reward_agreement(rng.normal(1, 1, 20000), rng.normal(1, 1, 20000))  # both right in 84 % of the pairs
    assert results["agreement"] > 0.7
    assert results["kappa"] == pytest.approx(0, abs=0.03)


# All together


def test_evaluate_pairs_is_everything_that_applies(scores):
    lengths = torch.arange(500), torch.arange(500) * 3 % 500
    few, all_of_it = evaluate_pairs(*scores), evaluate_pairs(*scores, *lengths, strength=lengths[0])
    parts = [preference_calibration(*scores), score_distribution(*scores)]
    assert few == preference_accuracy(*scores) | parts[0] | parts[1]
    assert all_of_it == preference_accuracy(*scores, lengths[0]) | parts[0] | parts[1] | length_bias(*scores, *lengths)
    nested = {key for key, value in all_of_it.items() if not isinstance(value, int | float)}
    assert nested == {"by_strength", "calibration_bins"}
    assert json.loads(json.dumps(all_of_it)) == all_of_it


def test_no_result_hides_another(scores):
    parts = [preference_accuracy(*scores), preference_calibration(*scores), score_distribution(*scores)]
    parts.append(length_bias(*scores, scores[0].abs(), scores[1].abs()))
    assert len(set().union(*parts)) == sum(map(len, parts))


def test_rows_of_the_table():
    rows = dict(result_rows(evaluate_pairs(CHOSEN, REJECTED, *LENGTHS, strength=[1, 1, 1, 2, 2])))
    assert rows["pairs"] == "5"
    assert rows["accuracy"] == "0.700 ± 0.179"
    assert rows["accuracy where the chosen answer is longer (3 pairs)"] == "0.833 ± 0.136"
    assert rows["rank correlation of reward and length within pairs"] == "0.250"
    assert rows["accuracy at strength 2 (bin 2 of 2, 2 pairs)"] == "0.750 ± 0.177"
    assert not [value for value in rows.values() if "nan" in value]
    assert dict(result_rows(reward_agreement([1.0, -1.0], [1.0, -2.0])))["agreement of the two models"].startswith("1")


def test_what_is_nan_has_no_row():
    rows = dict(result_rows(evaluate_pairs([1.0, 2.0], [0.0, 0.0], [4, 4], [3, 3])))
    assert not [label for label in rows if "rejected answer is longer" in label]
    assert [label for label in rows if "chosen answer is longer" in label]


# What is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": [1.0, math.nan, 0.0]}, r"chosen\[1\] is nan, and 1 of 3"),
        ({"rejected": torch.tensor([0.0, 1.0, -math.inf])}, r"rejected\[2\] is -inf"),
        ({"chosen": [1.0, 2.0]}, r"chosen 2, rejected 3"),
        ({"chosen": [], "rejected": []}, r"chosen is empty"),
        ({"chosen": torch.zeros(3, 1)}, r"chosen .* got shape \(3, 1\): flatten it"),
        ({"chosen": 1.0}, r"chosen .* got shape \(\)"),
        ({"strength": ["weak", "strong", "weak"]}, r"strength must be numbers, got 'weak'"),
        ({"strength": [1.0, None, 2.0]}, r"strength must be numbers, got None"),
        ({"strength": [True, False, True]}, r"strength must be numbers, got True"),
        ({"strength": [1.0, 2.0]}, r"strength 2"),
        ({"strength": [1.0, 2.0, math.inf]}, r"strength\[2\] is inf"),
        ({"chosen_lengths": [1, 2, 3]}, r"rejected_lengths is None"),
        ({"rejected_lengths": [1, 2, 3]}, r"chosen_lengths is None"),
        ({"chosen_lengths": [1, 2, 3], "rejected_lengths": [1, -2, 3]}, r"rejected_lengths\[1\] is -2"),
        ({"chosen_lengths": [1, 2, 3, 4], "rejected_lengths": [1, 2, 3]}, r"chosen_lengths 4"),
    ],
)
def test_errors_name_the_column_and_the_value(change, message):
    with pytest.raises(ValueError, match=message):
        evaluate_pairs(**({"chosen": [1.0, 2.0, 3.0], "rejected": [0.0, 1.0, 2.0]} | change))


@pytest.mark.parametrize("function", [preference_accuracy, preference_calibration])
def test_bins_are_at_least_one(function):
    with pytest.raises(ValueError, match="bins must be at least 1, got 0"):
        function([1.0], [0.0], bins=0)


def test_columns_of_any_kind_are_the_same(scores):
    expected = evaluate_pairs(*scores)
    rows = Dataset.from_dict({"chosen": scores[0].tolist(), "rejected": scores[1].tolist()})
    assert evaluate_pairs(scores[0].numpy(), scores[1].requires_grad_()) == expected
    assert evaluate_pairs(scores[0].tolist(), list(scores[1].detach())) == expected
    assert evaluate_pairs(rows["chosen"], rows["rejected"]) == expected
    half = [score.detach().bfloat16() for score in scores]
    assert evaluate_pairs(*half) == evaluate_pairs(*(score.float() for score in half))


# As evaluate.Metric


def test_metrics_compute_what_the_functions_do(scores):
    chosen, rejected = scores
    lengths = {"chosen_lengths": torch.arange(500), "rejected_lengths": torch.arange(500).flip(0)}
    pairs = {"chosen": chosen, "rejected": rejected}
    strength = lengths["chosen_lengths"]
    assert PreferenceAccuracy().compute(**pairs) == preference_accuracy(*scores)
    assert PreferenceAccuracy().compute(**pairs, strength=strength) == preference_accuracy(*scores, strength)
    assert PreferenceCalibration().compute(**pairs, bins=5) == preference_calibration(*scores, bins=5)
    assert LengthBias().compute(**pairs, **lengths) == length_bias(*scores, *lengths.values())
    assert ScoreDistribution().compute(**pairs) == score_distribution(*scores)
    assert RewardAgreement().compute(first=chosen, second=rejected) == reward_agreement(*scores)


def test_metrics_of_one_kind_at_once_keep_their_batches_apart(scores):
    metrics = [PreferenceAccuracy() for _ in range(5)]
    for start in range(0, 500, 100):
        for i, metric in enumerate(metrics):
            part = slice(start, start + 10 * (i + 1))
            metric.add_batch(chosen=scores[0][part], rejected=scores[1][part])
    metrics[0].add(chosen=1.0, rejected=0.0)
    assert [metric.compute()["count"] for metric in metrics] == [51, 100, 150, 200, 250]
    # The next evaluation starts from nothing.
    assert metrics[0].compute(chosen=[0.0], rejected=[1.0])["count"] == 1


def test_metrics_leave_no_files_and_no_random_state_behind(tmp_path):
    cache = tmp_path / "cache"
    before = np.random.get_state()[1].copy()
    metric = PreferenceAccuracy(cache_dir=str(cache))
    metric.add_batch(chosen=CHOSEN, rejected=REJECTED)
    assert metric.compute()["accuracy"] == pytest.approx(0.7)
    assert not cache.exists()
    assert (np.random.get_state()[1] == before).all()


def test_metrics_on_disk_give_the_same(tmp_path):
    metrics = [PreferenceAccuracy(keep_in_memory=False, cache_dir=str(tmp_path)) for _ in range(2)]
    for metric in metrics:
        metric.add_batch(chosen=CHOSEN, rejected=REJECTED)
    assert [metric.compute()["accuracy"] for metric in metrics] == pytest.approx([0.7, 0.7])


def test_metrics_refuse_what_is_missing_or_unknown():
    metric = PreferenceAccuracy()
    with pytest.raises(ValueError, match="no pairs: pass chosen, rejected"):
        metric.compute()
    with pytest.raises(ValueError, match="takes the columns chosen, rejected, got chosen"):
        metric.compute(chosen=[1.0])
    with pytest.raises(ValueError, match="got chosen, rejected, reference"):
        metric.add_batch(chosen=[1.0], rejected=[0.0], reference=[1.0])
    with pytest.raises(ValueError, match=r"rejected\[0\] is nan"):
        metric.compute(chosen=[1.0], rejected=[math.nan])
    with pytest.raises(ValueError, match="chosen 2, rejected 1"):
        metric.add_batch(chosen=[1.0, 2.0], rejected=[0.0])
    with pytest.raises(TypeError, match="strenght"):
        metric.compute(chosen=[1.0], rejected=[0.0], strenght=[1.0])
    assert metric.compute(chosen=[1.0], rejected=[0.0])["count"] == 1
