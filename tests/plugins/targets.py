"""Fixtures: the tiny target, on disk and loaded. A pytest plugin; torch is imported only where a test needs it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from draftline.target.load import Target


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> None:
    """Tiny products gain nothing from threads, and threads that wait for each other burn a shared machine."""
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the tiny target, made once a session (about two seconds)."""
    from tests.servers.tiny_target import make_tiny_target

    return make_tiny_target(tmp_path_factory.mktemp("tiny-target"))


@pytest.fixture(scope="session")
def loaded_target(tiny_target: Path) -> Target:
    """The tiny target, loaded in fp32; tests must not change it."""
    from draftline.spec import TargetSpec
    from draftline.target.load import load_target

    return load_target(TargetSpec(source=str(tiny_target)), dtype="fp32")
