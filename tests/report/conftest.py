"""The tiny world, built once."""

import pytest

from tests.ppo import tiny


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Folder with base/, policy/, reward/ and classifier/: see `tiny.build`."""
    return tiny.build(tmp_path_factory.mktemp("world"))
