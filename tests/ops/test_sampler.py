"""Importance weights of an engine's samples, and the figures that say how far it is off: worked by hand."""

import math

import pytest
import torch

from trl_ext.ops.sampler import importance_weights, sampler_figures, sampler_sums

LOGPS = torch.tensor([[math.log(0.5), math.log(0.2), 7.0]])
SAMPLER = torch.tensor([[math.log(0.25), math.log(0.4), -math.inf]])
MASK = torch.tensor([[1, 1, 0]])


def test_weights_are_the_ratio_of_trainer_to_sampler_cut_above_and_one_on_padding():
    torch.testing.assert_close(importance_weights(LOGPS, SAMPLER, MASK, 10.0), torch.tensor([[2.0, 0.5, 1.0]]))
    torch.testing.assert_close(importance_weights(LOGPS, SAMPLER, MASK, 1.5), torch.tensor([[1.5, 0.5, 1.0]]))


def test_the_weights_take_the_bias_of_the_sampler_back():
    policy, sampler = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.5, 0.3, 0.2])
    values = torch.tensor([1.0, -2.0, 5.0])
    weights = importance_weights(policy.log()[None], sampler.log()[None], torch.ones(1, 3), 10.0)[0]
    torch.testing.assert_close((sampler * weights * values).sum(), (policy * values).sum())


def test_figures_by_hand():
    weights = importance_weights(LOGPS, SAMPLER, MASK, 1.5)
    figures = sampler_figures(*sampler_sums(LOGPS, SAMPLER, weights, MASK))
    assert figures == pytest.approx(
        {
            "sampling/sampling_logp_difference/mean": math.log(2),
            "sampling/sampling_logp_difference/max": math.log(2),
            "sampling/importance_sampling_ratio/mean": 1.25,
            "sampling/importance_sampling_ratio/max": 2.0,
            "sampling/importance_sampling_ratio/min": 0.5,
            "sampling/effective_sample_size": 2.0**2 / (2 * 2.5),
        }
    )


def test_a_sampler_that_is_the_trainer_costs_nothing():
    weights = importance_weights(LOGPS, LOGPS, MASK, 3.0)
    figures = sampler_figures(*sampler_sums(LOGPS, LOGPS, weights, MASK))
    assert figures["sampling/effective_sample_size"] == 1
    assert figures["sampling/sampling_logp_difference/max"] == 0


def test_no_tokens_have_no_figures():
    nothing = torch.zeros(1, 3)
    assert sampler_figures(*sampler_sums(LOGPS, LOGPS, nothing + 1, nothing)) == {}


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match="sampler_logps"):
        importance_weights(LOGPS, SAMPLER[:, :2], MASK, 1.0)
