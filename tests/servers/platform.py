"""Fixture: one real platform (MLflow and Ray) for the whole test session. A pytest plugin.

It starts when the first test asks for it (about 10 s) and must leave nothing
behind at the end, which is checked here and fails the last test that used it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.embedded.fleet import members
from pipelines.embedded.platform import Platform, down, up
from pipelines.embedded.processes import is_alive
from pipelines.embedded.state import Layout, load_state

WORKER_ENV = {"DRAFTLINE_TEST_WORKER_ENV": "inherited", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1"}
"""What every Ray worker of the test platform has in its environment."""

# Logical: more than a small machine has, so that actors of several libraries never starve one another.
NUM_CPUS = 8


@pytest.fixture(scope="session")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """A running platform that all tests of the session share."""
    home = tmp_path_factory.mktemp("platform")
    started = up(home, num_cpus=NUM_CPUS, worker_env=WORKER_ENV, owner_pid=os.getpid(), on_event=print)
    layout = Layout(started.home)
    state = load_state(layout)
    assert state is not None and state.temp_dir is not None
    try:
        yield started
    finally:
        processes = members(layout, state)
        stopped = down(home)
    assert stopped == [f"{name} (pid {started.pids[name]})" for name in ("ray", "mlflow")]
    assert len(processes) > len(started.pids)
    assert [process for process in processes if is_alive(process)] == []
    assert members(layout, None) == []
    assert not Path(state.temp_dir).exists()
