"""Fixtures: a home with fake services, and a victim process that must not be harmed."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.embedded.platform import down
from tests.pipelines.embedded.fakes import FakeHome


@pytest.fixture
def fake_home(tmp_path: Path) -> Iterator[FakeHome]:
    """A home; whatever a failed test leaves running there is stopped."""
    home = FakeHome(tmp_path / "home")
    yield home
    down(home.layout.home)


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    """A process that belongs to no platform."""
    process = subprocess.Popen(["sleep", "600"], start_new_session=True)
    yield process
    process.kill()
    process.wait()
