"""kfp.local does with fan-out, collection and conditions what the training DAG relies on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def run_small(root: Path, verdict: str) -> dict[str, Path]:
    """Run the small pipeline in a process of its own; the ``result`` files by task."""
    scratch = root / "scratch"
    scratch.mkdir()
    completed = subprocess.run(
        [sys.executable, "-m", "tests.pipelines.small_pipeline", str(root), verdict],
        # kfp leaves a temporary directory per step.
        capture_output=True, text=True, timeout=60, check=False, env={**os.environ, "TMPDIR": str(scratch)},
    )  # fmt: skip
    assert completed.returncode == 0, completed.stdout[-3000:] + completed.stderr[-3000:]
    return {path.parent.name: path for path in sorted(root.rglob("result"))}


def test_suites_run_one_at_a_time_and_arrive_in_order(tmp_path: Path) -> None:
    found = run_small(tmp_path, "passes")
    measured = json.loads(found["collect"].read_text())
    assert [entry["suite"] for entry in measured] == ["a", "b", "c"]
    assert {(entry["text"], entry["plan"]) for entry in measured} == {("words", "words")}
    assert all(earlier["end"] <= later["begin"] for earlier, later in pairwise(measured))
    assert found["act"].read_text().startswith("judged[")


def test_the_branch_is_skipped_when_the_verdict_is_no(tmp_path: Path) -> None:
    assert set(run_small(tmp_path, "fails")) == {"plan", "measure", "collect", "judge"}
