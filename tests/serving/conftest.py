"""Fixtures of the serving tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.serving.tiny import write_target


@pytest.fixture(scope="session")
def tiny_target_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny target in Hugging Face layout."""
    return write_target(tmp_path_factory.mktemp("tiny-target"))
