"""An engine whose tensors are elsewhere: nothing is mixed with the host's, and a step reads little back."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def outcome() -> dict[str, Any]:
    """What :mod:`tests.engine.elsewhere` found; tensors of both devices in one operation end it with an error."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.elsewhere"], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("kind", ["none", "dspark", "rnn", "eagle3", "lookup"])
def test_an_engine_elsewhere_says_the_same(outcome: dict[str, Any], kind: str) -> None:
    """Greedy and sampled requests side by side, whole blocks and ragged ones."""
    assert outcome[kind]["there"] == outcome[kind]["here"]


@pytest.mark.parametrize(("kind", "reads"), [("none", 1), ("dspark", 3), ("rnn", 3), ("eagle3", 2), ("lookup", 4)])
def test_a_step_reads_back_a_fixed_number_of_times(outcome: dict[str, Any], kind: str, reads: int) -> None:
    """However many requests there are, and whatever their laws: the draft's blocks and confidences, and the verdict.

    Prompt lookup learns its texts on the host.
    """
    assert outcome[kind]["reads"] == [reads]
