"""How many logical CPUs a job reserves, and how it ends."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from draftline.errors import NoSpace
from draftline.steps import StepOutput
from ray_jobs import runtime
from ray_jobs.runtime import cpu_share
from tests.full_disk import full_disk


@pytest.mark.parametrize(
    ("threads", "free_cpus", "workers", "expected"),
    [
        (2, 8.0, 1, 2.0),
        (2, 2.0, 1, 2.0),
        # An endpoint holds one of two.
        (2, 1.0, 1, 1.0),
        (1, 1.0, 2, 0.5),
        (1, 1.0, 3, 0.33),
        # Above 1, Ray takes whole numbers only.
        (4, 3.0, 2, 1.0),
        (8, 7.5, 1, 7.0),
        (2, 0.0, 1, 0.0),
    ],
)
def test_a_worker_reserves_its_threads_or_its_share(
    threads: int, free_cpus: float, workers: int, expected: float
) -> None:
    share = cpu_share(threads, free_cpus, workers)
    assert share == expected
    assert share * workers <= free_cpus


def test_a_result_that_finds_no_room_is_told_by_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runtime, "ray_session", nullcontext)
    monkeypatch.setattr(runtime, "read_request", lambda path: path)
    monkeypatch.setattr(sys, "argv", ["job", str(tmp_path / "request.json"), str(tmp_path / "result.json")])
    with full_disk(10), pytest.raises(SystemExit) as ended:
        runtime.main(lambda context: StepOutput({"a": 1}))
    assert ended.value.code == NoSpace.exit_code
