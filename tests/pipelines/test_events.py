"""Progress bookkeeping and its display."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from draftline.progress import JsonlProgress, ProgressEvent
from draftline.steps import STATIONS
from pipelines.events import STATION_WEIGHTS, EventFollower, RunProgress, StationProgress, run_labels
from pipelines.progress_view import LineView, LiveView, describe, describe_run, format_duration, open_view, render


def event(step: str, state: str, time_s: float, done: float = 0, total: float = 0, note: str = "") -> ProgressEvent:
    return ProgressEvent(step, state, done=done, total=total, unit="steps" if total else "", note=note, time_s=time_s)


def after(*events: ProgressEvent) -> StationProgress:
    line = StationProgress(events[0].step)
    for item in events:
        line.apply(item)
    return line


def test_speed_is_that_of_this_attempt() -> None:
    """600 of 1000 were there at the start; 100 more took 10 s; the 300 left take 30 s, not 4."""
    line = after(
        event("draft", "started", 100.0),
        event("draft", "running", 104.0, 600, 1000),
        event("draft", "running", 114.0, 700, 1000, "loss 1.93"),
    )
    assert line.eta_s(114.0) == pytest.approx(30.0)
    assert line.eta_s(120.0) == pytest.approx(24.0)
    assert line.eta_s(200.0) == 0.0
    assert describe(line, 114.0) == "700/1,000 steps  0:14  0:30 left  loss 1.93"


def test_no_estimate_before_there_is_a_speed() -> None:
    line = after(event("draft", "started", 100.0), event("draft", "running", 101.0, 600, 1000))
    assert line.eta_s(150.0) is None
    assert describe(line, 101.0) == "600/1,000 steps  0:01  estimating"
    line.apply(event("draft", "running", 102.0, 601, 1000))
    assert line.eta_s(102.0) is None, "one second is too short to measure a speed"


def test_a_new_phase_starts_a_new_speed() -> None:
    line = after(
        event("evaluation:held-out", "started", 0.0),
        event("evaluation:held-out", "running", 0.0, 0, 10),
        event("evaluation:held-out", "running", 10.0, 10, 10),
        event("evaluation:held-out", "running", 11.0, 0, 50),
    )
    assert line.eta_s(12.0) is None
    line.apply(event("evaluation:held-out", "running", 21.0, 25, 50))
    assert line.eta_s(21.0) == pytest.approx(10.0)


def test_states_in_words() -> None:
    assert describe(StationProgress("gate"), 5.0) == "waiting"
    assert describe(after(event("tokens", "skipped", 5.0)), 9.0) == "already done"
    finished = after(event("tokens", "started", 5.0), event("tokens", "finished", 67.0))
    assert describe(finished, 900.0) == "finished in 1:02"
    failed = after(event("tokens", "started", 5.0), event("tokens", "failed", 8.0, note="no space"))
    assert describe(failed, 900.0) == "failed after 0:03"
    uncounted = after(event("prompts", "started", 0.0), ProgressEvent("prompts", done=12, unit="prompts", time_s=1.0))
    assert describe(uncounted, 2.0) == "12 prompts  0:02"


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (760, "12:40"), (3723, "1:02:03")])
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_run_labels_fan_out_and_are_all_weighed() -> None:
    labels = run_labels(("held-out", "humaneval"), STATIONS)
    assert labels[6:8] == ["evaluation:held-out", "evaluation:humaneval"] and len(labels) == len(STATIONS) + 1
    assert set(STATION_WEIGHTS) == set(STATIONS)


def test_the_whole_runs_estimate_scales_with_this_machine() -> None:
    """Responses took twice its weight in seconds, so the pending stations are taken to do so too."""
    run = RunProgress.for_run(["responses", "tokens", "draft"], 0.0)
    assert run.eta_s(0.0) is None
    assert "not known yet" in describe_run(run, 3.0)
    run.apply(event("responses", "started", 0.0))
    run.apply(event("responses", "finished", 2 * STATION_WEIGHTS["responses"]))
    pending = STATION_WEIGHTS["tokens"] + STATION_WEIGHTS["draft"]
    assert run.eta_s(50.0) == pytest.approx(2 * pending)
    run.apply(event("tokens", "skipped", 51.0))
    assert run.eta_s(51.0) == pytest.approx(2 * STATION_WEIGHTS["draft"])
    run.apply(event("draft", "started", 60.0))
    run.apply(event("draft", "running", 60.0, 0, 100))
    run.apply(event("draft", "running", 80.0, 50, 100))
    assert run.eta_s(80.0) == pytest.approx(20.0)
    assert describe_run(run, 80.0) == "2 of 3 steps done, 1:20 so far, less than a minute left"
    run.apply(event("draft", "failed", 90.0))
    assert describe_run(run, 90.0) == "2 of 3 steps done, 1:30 so far"


def test_what_a_finished_run_did_not_want_is_said_so() -> None:
    run = RunProgress.for_run(["gate", "deploy"], 0.0)
    run.apply(event("gate", "started", 0.0))
    run.apply(event("gate", "finished", 2.0))
    run.settle()
    assert describe(run.stations["deploy"], 2.0) == "not run, the gate refused the draft"
    assert run.stations["gate"].state == "finished"
    assert describe_run(run, 2.0) == "1 of 2 steps done, 0:02 so far"


def test_follower_waits_for_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    follower = EventFollower(path)
    assert list(follower.poll()) == []
    JsonlProgress(path).emit(event("prompts", "started", 1.0))
    JsonlProgress(path).emit(event("prompts", "running", 1.5))
    second = json.dumps({"step": "prompts", "state": "finished", "time_s": 2.0})
    with open(path, "a") as handle:
        handle.write(second[:20])
    assert [item.state for item in follower.poll()] == ["started", "running"]
    with open(path, "a") as handle:
        handle.write(second[20:] + '\nnot json\n{"step": 1, "colour": 2}\n')
    assert [item.state for item in follower.poll()] == ["finished"]
    assert list(follower.poll()) == []


def shown(run: RunProgress, now_s: float) -> list[str]:
    console = Console(file=io.StringIO(), width=100, force_terminal=False)
    console.print(render(run, now_s))
    output = console.file
    assert isinstance(output, io.StringIO)
    return output.getvalue().splitlines()


def test_live_table() -> None:
    run = RunProgress.for_run(["prompts", "responses", "draft", "gate"], 0.0)
    run.apply(event("prompts", "skipped", 0.0))
    run.apply(event("responses", "started", 1.0))
    run.apply(event("responses", "finished", 61.0))
    run.apply(event("draft", "started", 70.0))
    run.apply(event("draft", "running", 70.0, 60, 120))
    run.apply(event("draft", "running", 80.0, 90, 120, note="loss 1.93"))
    lines = shown(run, 80.0)
    assert "✔ prompts" in lines[0] and lines[0].rstrip().endswith("already done")
    assert lines[1].rstrip().endswith("finished in 1:00")
    assert "▶ draft" in lines[2] and "75 %" in lines[2] and "90/120 steps  0:10  0:10 left  loss 1.93" in lines[2]
    assert "· gate" in lines[3] and lines[3].rstrip().endswith("waiting")
    assert lines[4].startswith("2 of 4 steps done, 1:20 so far, ")


def test_plain_lines_when_not_a_terminal() -> None:
    output = io.StringIO()
    run = RunProgress.for_run(["prompts", "draft"], 0.0)
    view = open_view(Console(file=output, width=60), run)
    assert isinstance(view, LineView)
    with view:
        run.apply(event("prompts", "skipped", 1.0))
        view.update(1.0)
        run.apply(event("draft", "started", 2.0))
        run.apply(event("draft", "running", 2.0, 0, 100))
        view.update(2.0)
        run.apply(event("draft", "running", 4.0, 10, 100))
        view.update(4.0)
        run.apply(event("draft", "running", 7.0, 25, 100))
        view.update(7.0)
    assert output.getvalue().splitlines() == [
        "[prompts] already done",
        "1 of 2 steps done, 0:01 so far, time left not known yet",
        "[draft] 0 %  0/100 steps  0:00  estimating",
        "[draft] 25 %  25/100 steps  0:05  0:15 left",
    ]


def test_a_terminal_gets_the_table_in_place() -> None:
    output = io.StringIO()
    run = RunProgress.for_run(["prompts", "draft"], 0.0)
    view = open_view(Console(file=output, width=90, force_terminal=True), run)
    assert isinstance(view, LiveView)
    with view:
        run.apply(event("draft", "started", 0.0))
        run.apply(event("draft", "running", 1.0, 0, 100))
        view.update(1.0)
        run.apply(event("draft", "running", 11.0, 50, 100))
        view.update(11.0)
    text = output.getvalue()
    assert "\x1b[1A" in text, "the second drawing must go up to the first"
    assert "50/100 steps  0:11  0:10 left" in text.rsplit("\x1b[1A", 1)[-1]
