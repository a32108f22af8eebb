"""The collective functions on two real processes (gloo)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, repo_root):
    """What tests/ops/two_processes.py found out on each of two processes."""
    folder = tmp_path_factory.mktemp("two_processes")
    script = Path(__file__).parent / "two_processes.py"
    env = os.environ | {"PYTHONPATH": str(repo_root), "OMP_NUM_THREADS": "1"}
    results = [folder / f"{rank}.json" for rank in (0, 1)]
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(folder / "rendezvous"), str(result)],
            env=env,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, result in enumerate(results)
    ]
    try:
        for process in processes:
            _, stderr = process.communicate(timeout=120)
            assert process.returncode == 0, stderr
    finally:
        for process in processes:
            process.kill()
    return [json.loads(result.read_text()) for result in results]


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
