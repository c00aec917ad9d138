"""Fixtures of the serving tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.servers.tiny_target import make_tiny_target


@pytest.fixture(scope="session")
def tiny_target_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target of random weights: serving does not care what it says, and nothing has to be trained."""
    return make_tiny_target(tmp_path_factory.mktemp("untrained-target"), steps=0)
