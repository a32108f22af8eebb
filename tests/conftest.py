"""What every test needs. The environment is set before any import can read it: the suite never touches the network."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
# The models of the suite are tiny: a second thread mostly waits, and on a busy machine it slows the first.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest
import torch
from transformers import set_seed

REPO_ROOT = Path(__file__).resolve().parent.parent

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session", autouse=True)
def imported() -> None:
    """What the imports have made stays: every `train` collects garbage, which would go through all of it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state, alone or after any others: what it samples is what CI samples."""
    set_seed(0)


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The root of the repository."""
    return REPO_ROOT


@pytest.fixture(scope="session")
def shared_dir(repo_root: Path) -> Path:
    """The folder `shared` beside the repository, with worked numbers to compare with. Skips where there is none."""
    path = repo_root.parent / "shared"
    if not path.is_dir():
        pytest.skip(f"no folder {path.name}/ beside the repository")
    return path


# Files that take longest come first: of two processes neither is left with a whole one at the end.
LONGEST_FIRST = ("test_recipes.py", "test_reward_recipes.py", "test_two_processes.py", "test_plan_memory.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; the order within each stays."""
    items.sort(key=lambda item: LONGEST_FIRST.index(item.path.name) if item.path.name in LONGEST_FIRST else 99)
