"""Live figures: which, to which run, and what an MLflow that does not answer costs."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from components.live_metrics import live_metrics
from components.live_metrics_process import TAG_LIVE, Figure, Follower, LiveRun, figures_of
from components.registry import connect
from draftline.errors import RegistryError
from draftline.jobs import EVENTS_ENV
from draftline.progress import EventFile, JsonlProgress, ProgressEvent
from tests.registry.conftest import migrated_database, mlflow_uri  # noqa: F401 (fixtures)


def event(step: int, loss: float = 2.0, **values: float) -> ProgressEvent:
    return ProgressEvent("draft", "running", step, 10, "steps", "", {"loss": loss, **values}, 100.0 + step)


def test_a_running_steps_finite_numbers_are_its_figures() -> None:
    found = figures_of(event(3, accepted_length=1.5, confidence=float("nan")), "draft")
    assert found == [Figure("train/loss", 2.0, 3, 103000), Figure("train/accepted_length", 1.5, 3, 103000)]
    assert figures_of(event(3), "evaluation") == []
    assert figures_of(ProgressEvent("draft", "finished", values={"train_loss": 1.0}), "draft") == []


def test_an_event_is_read_once_and_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    assert EventFile(path).new() == []
    JsonlProgress(path).emit(event(1))
    file = EventFile(path, path.stat().st_size)
    line = json.dumps(asdict(event(2))) + "\n"
    with open(path, "a") as handle:
        handle.write(line[:20])
        handle.flush()
        assert file.new() == []
        handle.write(line[20:] + "damaged\n" + '{"unknown": 1}\n')
    JsonlProgress(path).emit(event(3))
    assert [found.done for found in file.new()] == [2, 3]
    assert file.new() == []


class FakeRun:
    """Takes figures, or fails."""

    def __init__(self) -> None:
        self.logged: list[Figure] = []
        self.status = ""
        self.is_down = False

    def log(self, figures: Sequence[Figure]) -> None:
        if self.is_down:
            raise RegistryError("no answer")
        self.logged += figures

    def end(self, status: str) -> None:
        self.status = status


def figure(step: int) -> Figure:
    return Figure("train/loss", 1.0, step, step)


def test_figures_wait_while_the_server_is_away_and_one_line_says_so() -> None:
    run, now, warnings = FakeRun(), [0.0], list[str]()
    follower = Follower(lambda: run, lambda: now[0], warnings.append)  # type: ignore[arg-type,return-value]
    run.is_down = True
    attempts = 0
    for second in range(100):
        now[0] = float(second)
        follower.add([figure(second)])
        before = len(run.logged)
        follower.flush()
        attempts += len(run.logged) > before
    assert len(warnings) == 1 and "training goes on" in warnings[0] and "\n" not in warnings[0]
    run.is_down = False
    now[0] = 1000.0
    follower.flush()
    assert [one.step for one in run.logged] == list(range(100))
    follower.end("FINISHED")
    assert run.status == "FINISHED"


def test_a_server_that_stays_away_is_asked_ever_less_often_and_memory_is_bounded() -> None:
    now, asked = [0.0], list[float]()

    def refuse() -> LiveRun:
        asked.append(now[0])
        raise RegistryError("no answer")

    follower = Follower(refuse, lambda: now[0], lambda line: None)
    for second in range(600):
        now[0] = float(second)
        follower.add([figure(second)] * 100)
        follower.flush()
    gaps = [after - before for before, after in itertools.pairwise(asked)]
    assert gaps == sorted(gaps) and gaps[-1] == 60
    assert len(follower._pending) == 20_000


def open_run(key: str = "k" * 20) -> LiveRun:
    return LiveRun(connect(), "support-desk", "draft", key)


def points(uri: str) -> dict[str, list[tuple[int, float]]]:
    """Everything in the only live run."""
    client = connect({"MLFLOW_TRACKING_URI": uri})
    experiment = client.get_experiment_by_name("support-desk")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.tags[TAG_LIVE] == "k" * 20
    names = run.data.metrics
    return {
        name: [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]
        for name in names
    }


@pytest.mark.slow
def test_a_restart_takes_up_the_same_run_and_repeats_no_point(mlflow_uri: str) -> None:  # noqa: F811
    first = open_run()
    first.log([found for step in range(1, 6) for found in figures_of(event(step, loss=step), "draft")])
    again = open_run()
    again.log([found for step in range(3, 9) for found in figures_of(event(step, loss=step, tv=0.5), "draft")])
    again.end("FINISHED")
    found = points(mlflow_uri)
    assert found["train/loss"] == [(step, float(step)) for step in range(1, 9)]
    assert found["train/tv"] == [(step, 0.5) for step in range(6, 9)]


def follow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str | None, station: str = "draft") -> float:
    """A step of three events under :func:`live_metrics`; how long it took."""
    events = tmp_path / "events.jsonl"
    JsonlProgress(events).emit(event(99))
    environ: dict[str, Any] = {EVENTS_ENV: str(events)}
    if uri is not None:
        environ["MLFLOW_TRACKING_URI"] = uri
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    started = time.monotonic()
    with live_metrics(station, lambda: "k" * 20, "support-desk", {**dict(os.environ), **environ}):
        for step in (1, 2, 3):
            JsonlProgress(events).emit(event(step))
        time.sleep(1.0)
    return time.monotonic() - started


def test_without_a_server_named_nothing_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: pytest.fail("a process was started"))
    assert follow(tmp_path, monkeypatch, None) < 2
    assert follow(tmp_path, monkeypatch, "http://127.0.0.1:9", station="tokens") < 2


@pytest.mark.slow
def test_a_server_that_does_not_answer_costs_a_line_and_a_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert follow(tmp_path, monkeypatch, "http://127.0.0.1:9") < 30
    lines = [line for line in capfd.readouterr().err.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("warning: live figures do not reach MLflow")


@pytest.mark.slow
def test_a_failed_step_ends_its_run_as_failed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mlflow_uri: str,  # noqa: F811
) -> None:
    with pytest.raises(RuntimeError, match="the step"):
        with live_metrics("draft", lambda: "k" * 20, "support-desk"):
            events = Path(os.environ[EVENTS_ENV])
            JsonlProgress(events).emit(event(1))
            time.sleep(2.0)
            raise RuntimeError("the step")
    assert EVENTS_ENV not in os.environ
    assert points(mlflow_uri)["train/loss"] == [(1, 2.0)]
    (run,) = connect().search_runs([connect().get_experiment_by_name("support-desk").experiment_id])  # type: ignore[union-attr]
    assert run.info.status == "FAILED"
