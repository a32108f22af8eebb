"""The collective functions on two real processes (gloo)."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.processes import run_script


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What tests/ops/two_processes.py found out on each of two processes."""
    folder = tmp_path_factory.mktemp("two_processes")
    done = run_script(Path(__file__).parent / "two_processes.py", folder, processes=2)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_running_moments_are_those_of_all_values_on_both_ranks(ranks):
    everything = [1, 2, 4, 3], [1, 2, 4, 3, 10, -2], [1, 2, 4, 3, 10, -2, 0.5, 1.5, 3, 3, 5, -20]
    for rank in ranks:
        for (count, mean, std), values in zip(rank["seen"], everything, strict=True):
            assert count == len(values)
            assert mean == pytest.approx(np.mean(values), rel=1e-12)
            assert std == pytest.approx(np.std(values, ddof=1), rel=1e-12)
    assert ranks[0]["seen"] == ranks[1]["seen"]  # to the last bit


def test_a_bad_value_on_one_rank_stops_both_and_adds_nothing(ranks):
    assert "index 0" in ranks[0]["errors"][0]
    assert "other processes" in ranks[1]["errors"][0]
    assert all("no values" in rank["errors"][1] for rank in ranks)
    for rank in ranks:
        assert rank["after_errors"]["count"] == 12
        assert rank["after_errors"]["mean"] == rank["seen"][-1][1]


def test_whitening_uses_the_statistics_of_both_ranks(ranks):
    # Over (1, 2, 6, 7, -3): mean 2.6, squared deviations 2.56 + 0.36 + 11.56 + 19.36 + 31.36 = 65.2, variance 13.04.
    expected = (np.array([1, 2, 6, 7, -3]) - 2.6) / 13.04**0.5
    assert ranks[0]["whitened"][0] == pytest.approx([*expected[:2], 0.0], abs=1e-6)
    assert ranks[1]["whitened"][0] == pytest.approx(expected[2:], abs=1e-6)


def test_whitening_where_one_rank_has_no_tokens(ranks):
    # Over (6, 7, -3): mean 10/3, squared deviations 64/9 + 121/9 + 361/9 = 182/3, variance 182/9.
    expected = (np.array([6, 7, -3]) - 10 / 3) / (182 / 9) ** 0.5
    assert ranks[0]["nothing_on_rank_0"] == [[0.0, 0.0, 0.0]]
    assert ranks[1]["nothing_on_rank_0"][0] == pytest.approx(expected, abs=1e-6)
