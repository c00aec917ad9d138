"""What is told of a pipeline that failed, however little it left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from draftline.errors import FormatError, NoSpace, StepError
from draftline.progress import ProgressEvent
from draftline.spec import RunSpec
from draftline.steps import STATIONS
from pipelines.events import RunProgress, run_labels
from pipelines.run_local import LocalRun, RunFailed, explain_failure
from tests.full_disk import full_disk

RECORD = json.dumps({"step": "tokens", "message": "it is damaged.", "exit_code": 6, "is_expected": True})


@pytest.fixture
def run(tmp_path: Path) -> LocalRun:
    return LocalRun(RunSpec(), "spec.yaml", "workspace", tmp_path, {})


@pytest.fixture
def progress() -> RunProgress:
    """Heard last: the tokens station had begun."""
    heard = RunProgress.for_run(run_labels(RunSpec().evaluation.suites, STATIONS), 0.0)
    heard.apply(ProgressEvent("tokens", "started", time_s=1.0))
    return heard


def test_the_steps_own_words_come_first(run: LocalRun, progress: RunProgress) -> None:
    run.failure.write_text(RECORD)
    error = explain_failure(run, progress, 1)
    assert isinstance(error, RunFailed) and error.exit_code == FormatError.exit_code
    assert str(error) == f"step tokens failed: it is damaged. The log is {run.log}."


@pytest.mark.parametrize("left", ["", RECORD[:-20], "[]", '{"step": "tokens"}', None])
def test_without_them_the_step_is_named(run: LocalRun, progress: RunProgress, left: str | None) -> None:
    if left is not None:
        run.failure.write_text(left)
    error = explain_failure(run, progress, -9)
    assert type(error) is StepError
    assert str(error).startswith(f"step tokens died; got by signal 9. The log is {run.log};")


def test_a_full_disk_is_named(run: LocalRun, progress: RunProgress) -> None:
    run.failure.write_text("")
    with full_disk():
        error = explain_failure(run, progress, 1)
    assert isinstance(error, NoSpace)
    assert str(error).startswith(f"step tokens died; got exit code 1 and a full disk at {run.folder}. Free some space")
    assert [path.name for path in run.folder.iterdir()] == ["failure.json"]
