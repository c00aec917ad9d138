"""Progress sinks."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from draftline.progress import JsonlProgress, LineProgress, ListProgress, NullProgress, ProgressEvent


def event(done: float, state: str = "running", time_s: float = 0.0, step: str = "draft") -> ProgressEvent:
    return ProgressEvent(step, state, done, 10, "steps", "loss 1.0", {"loss": 1.0}, time_s)


def test_list_and_null() -> None:
    sink = ListProgress()
    sink.emit(event(1))
    NullProgress().emit(event(1))
    assert sink.events == [event(1)]


def test_jsonl_appends_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    for sink in (JsonlProgress(path), JsonlProgress(path)):
        sink.emit(event(1))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [ProgressEvent(**line) for line in lines] == [event(1), event(1)]


def test_jsonl_swallows_a_full_disk(tmp_path: Path) -> None:
    JsonlProgress(tmp_path / "no" / "such" / "folder").emit(event(1))
    assert not (tmp_path / "no").exists()


def test_lines_are_spaced_but_ends_always_show() -> None:
    stream = io.StringIO()
    sink = LineProgress(stream, min_interval_s=5)
    for done, state, time_s in (
        (1, "running", 100.0),
        (2, "running", 102.0),
        (3, "running", 106.0),
        (10, "finished", 106.5),
    ):
        sink.emit(event(done, state, time_s))
    sink.emit(event(4, "running", 106.5, step="evaluation:humaneval"))
    assert stream.getvalue().splitlines() == [
        "[draft] running  10.0 % 1/10 steps  loss 1.0",
        "[draft] running  30.0 % 3/10 steps  loss 1.0",
        "[draft] finished 100.0 % 10/10 steps  loss 1.0",
        "[evaluation:humaneval] running  40.0 % 4/10 steps  loss 1.0",
    ]


def test_lines_go_to_standard_error_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    LineProgress().emit(ProgressEvent("draft", "started"))
    assert capsys.readouterr().err == "[draft] started\n"
