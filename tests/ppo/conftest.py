"""The tiny world, built once."""

import pytest
import torch

from tests.ppo import tiny

# On models this small a second thread only waits for the first; beside other work it makes a step 100 times slower.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Folder with base/, policy/, reward/ and classifier/: see `tiny.build`."""
    return tiny.build(tmp_path_factory.mktemp("world"))
