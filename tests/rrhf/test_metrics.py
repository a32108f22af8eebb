"""Ranking metrics by hand and by their definitions; ratios over batches and processes."""

import itertools
import math

import pytest
import torch

from trl_ext.rrhf.metrics import RunningMeans, ranking_metrics


def found(scores, rewards, group, logps=None):
    scores, rewards, group = torch.tensor(scores), torch.tensor(rewards), torch.tensor(group)
    logps = scores[:, None].clone() if logps is None else torch.tensor(logps)
    means = RunningMeans()
    means.add(ranking_metrics(scores, rewards, logps, logps < 0, group))
    return means.take(lambda x: x, torch.device("cpu"))


def test_a_perfect_a_reversed_and_a_mixed_order():
    perfect = found([-3.0, -2.0, -1.0], [0.0, 1.0, 2.0], [0, 0, 0])
    assert (perfect["ranking_accuracy"], perfect["kendall_tau"]) == (1, 1)
    reversed_ = found([-1.0, -2.0, -3.0], [0.0, 1.0, 2.0], [0, 0, 0])
    assert (reversed_["ranking_accuracy"], reversed_["kendall_tau"]) == (0, -1)
    mixed = found([-2.0, -3.0, -1.0], [0.0, 1.0, 2.0], [0, 0, 0])
    assert mixed["ranking_accuracy"] == pytest.approx(2 / 3)
    assert mixed["kendall_tau"] == pytest.approx(1 / 3)


def test_accuracy_is_of_all_pairs_and_tau_the_mean_over_prompts():
    both = found([-3.0, -2.0, -1.0, -1.0, -2.0], [0.0, 1.0, 2.0, 0.0, 1.0], [0, 0, 0, 1, 1])
    assert both["ranking_accuracy"] == pytest.approx(3 / 4)
    assert both["kendall_tau"] == 0
    assert both["pairs"] == 2


def tau_b(scores, rewards):
    """Kendall 1945: concordant less discordant pairs over the root of the pairs untied in each; None where one is 0."""
    signs = [
        ((a > b) - (a < b), (x > y) - (x < y))
        for (a, x), (b, y) in itertools.combinations(zip(scores, rewards, strict=True), 2)
    ]
    untied = sum(s != 0 for s, _ in signs) * sum(r != 0 for _, r in signs)
    return sum(s * r for s, r in signs) / math.sqrt(untied) if untied else None


def test_tau_is_kendalls_tau_b():
    generator = torch.Generator().manual_seed(3)
    seen = set()
    for _ in range(30):
        scores = (-torch.randint(1, 4, (4,), generator=generator).float()).tolist()
        rewards = torch.randint(0, 3, (4,), generator=generator).float().tolist()
        actual = found(scores, rewards, [3] * 4).get("kendall_tau")
        assert actual == (None if tau_b(scores, rewards) is None else pytest.approx(tau_b(scores, rewards), abs=1e-6))
        seen.add(actual)
    assert len(seen) > 6


def test_prompts_without_an_order_have_no_tau_and_no_accuracy():
    tied = found([-1.0, -2.0], [1.0, 1.0], [0, 0])
    assert "kendall_tau" not in tied
    assert "ranking_accuracy" not in tied
    assert tied["pairs"] == 0


def test_perplexity_is_by_token_of_the_best_responses():
    logps = [[-1.0, -2.0], [-9.0, 0.0], [-3.0, 0.0]]  # the third is the best of prompt 1, the first of prompt 0
    best = found([-1.5, -9.0, -3.0], [1.0, 0.0, 0.0], [0, 0, 1], logps)
    assert best["perplexity_best"] == pytest.approx(math.exp(6 / 3))
    assert best["score_best"] == pytest.approx((-1.5 - 3) / 2)


def test_ratios_add_over_batches_and_processes_and_start_again():
    means, device = RunningMeans(), torch.device("cpu")
    means.add({"a": (1.0, 4.0), "b": (torch.tensor(2), torch.tensor(1))})
    means.add({"a": (2.0, 2.0), "none": (0.0, 0.0)})
    assert means.take(lambda x: 2 * x, device) == {"a": 0.5, "b": 2.0}
    assert means.take(lambda x: x, device) == {}
