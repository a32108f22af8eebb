"""What devices compute in, and that nothing asks for float64 where there is none."""

import importlib
import re
from pathlib import Path

import pytest
import torch

import trl_ext
from trl_ext.ops.masking import masked_whiten
from trl_ext.ops.moments import RunningMoments
from trl_ext.ops.precision import sum_dtype
from trl_ext.ppo.losses import explained_variance
from trl_ext.ppo.rewards import shape_scores
from trl_ext.rrhf.metrics import RunningMeans, ranking_metrics

USERS = ("ops.masking", "ops.moments", "ppo.losses", "ppo.rewards", "rrhf.metrics")


def test_sums_are_float64_where_there_is_float64():
    assert sum_dtype(torch.device("cpu")) == sum_dtype(torch.device("cuda", 1)) == torch.float64
    assert sum_dtype(torch.device("mps")) == torch.float32


@pytest.fixture
def without_float64(monkeypatch):
    """A device without float64: what would make a tensor of it fails."""

    def refuse(*args, **kwargs):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    monkeypatch.setattr(torch.Tensor, "double", refuse)
    for name in USERS:
        monkeypatch.setattr(importlib.import_module(f"trl_ext.{name}"), "sum_dtype", lambda device: torch.float32)


def results():
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    mask, group = torch.rand(4, 6, generator=torch.Generator().manual_seed(1)) > 0.3, torch.tensor([0, 0, 1, 1])
    found = {
        "whiten": masked_whiten(x, mask),
        "explained": explained_variance(x, x + 0.5 * x.flip(0), mask),
        "moments": torch.tensor(RunningMoments().update(x)),
        "scores": shape_scores(x[0], RunningMoments(), "norm", 0.8),
    }
    means = RunningMeans()
    means.add(ranking_metrics(x[:, 0], x[:, 1], x, mask, group))
    return found | {k: torch.tensor(v) for k, v in means.take(lambda t: t, x.device).items()}


def test_without_float64_the_numbers_are_the_same_in_float32(without_float64):
    found = results()
    assert all(value.dtype != torch.float64 for value in found.values())


def test_with_and_without_float64_agree(request):
    expected = results()
    request.getfixturevalue("without_float64")
    for name, value in results().items():
        torch.testing.assert_close(value.float(), expected[name].float(), rtol=1e-4, atol=1e-5)


def test_nothing_else_asks_for_float64_on_a_device():
    """Numpy columns and lists of Python numbers on the CPU may."""
    package = Path(trl_ext.__file__).parent
    allowed = {"reward/pair_statistics.py", "reward/metrics.py", "rrhf/data.py", "data/convert.py", "scoring.py",
               "sources.py", "ops/precision.py", "generation/vllm_ahead.py", "roles/probe.py"}  # fmt: skip
    found = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if path.parent.name != "feedback"  # which is numpy alone
        and re.search(r"\.double\(\)|float64", re.sub(r'""".*?"""', "", path.read_text(), flags=re.DOTALL))
    }
    assert found <= allowed
