"""Figures of a running training step in MLflow, while it runs.

A step's figures travel as progress events through a file
(:mod:`draftline.progress`). :func:`live_metrics` starts a child process that
follows the file and logs what arrives to one MLflow run per content key; it
is the child alone that imports mlflow and waits for the network. Nothing it
does can fail the step, and at the step's end it has a bounded time to finish.

Without ``MLFLOW_TRACKING_URI`` nothing is started.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from components.registry import TRACKING_URI_ENV
from draftline.jobs import EVENTS_ENV
from draftline.progress import EventFile, LineProgress

LIVE_STATIONS = frozenset({"draft"})
"""Stations whose progress events carry figures worth following."""

_MODULE = "components.live_metrics_process"
# A short step may be over before the child of a busy machine has imported mlflow.
_CLOSE_S = 45.0
_LOOK_EVERY_S = 1.0
# mlflow asks seven times and waits two minutes each; a figure that is late is worth less than that.
_HTTP_ENV = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}


@contextlib.contextmanager
def live_metrics(
    station: str, key: Callable[[], str], name: str, environ: Mapping[str, str] = os.environ
) -> Iterator[None]:
    """Follow a step's figures for as long as the body runs.

    Args:
        station: Its name; only :data:`LIVE_STATIONS` are followed.
        key: Gives its content key, which names the run; asked for only where figures are followed.
        name: Of the MLflow experiment.
        environ: Of this process.
    """
    if station not in LIVE_STATIONS or not environ.get(TRACKING_URI_ENV, "").strip():
        yield
        return
    with _events_file(environ) as events, _follower(events, station, key(), name, environ) as follower:
        status = "FAILED"
        try:
            yield
            status = "FINISHED"
        finally:
            _end(follower, status)


@contextlib.contextmanager
def _events_file(environ: Mapping[str, str]) -> Iterator[Path]:
    """The file that the step's progress goes to: the local runner's, or one for this step, echoed as log lines."""
    if given := environ.get(EVENTS_ENV):
        yield Path(given)
        return
    with tempfile.TemporaryDirectory(prefix="draftline-events-") as folder:
        path = Path(folder, "events.jsonl")
        path.touch()
        done = threading.Event()
        echo = threading.Thread(target=_echo, args=(path, done), daemon=True)
        os.environ[EVENTS_ENV] = str(path)
        echo.start()
        try:
            yield path
        finally:
            del os.environ[EVENTS_ENV]
            done.set()
            echo.join(2 * _LOOK_EVERY_S)


def _echo(path: Path, done: threading.Event) -> None:
    """Print the step's progress, which without this file its processes would have printed themselves."""
    events, lines = EventFile(path), LineProgress()
    while True:
        is_over = done.wait(_LOOK_EVERY_S)
        for event in events.new():
            lines.emit(event)
        if is_over:
            return


@contextlib.contextmanager
def _follower(
    events: Path, station: str, key: str, name: str, environ: Mapping[str, str]
) -> Iterator[subprocess.Popen[str] | None]:
    """The child; ``None`` where it cannot be started (no memory, say)."""
    start = events.stat().st_size if events.exists() else 0
    command = [sys.executable, "-m", _MODULE, str(events), str(start), station, key, name]
    try:
        process = subprocess.Popen(
            command, env={**_HTTP_ENV, **environ}, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
    except OSError as error:
        print(f"warning: no live figures in MLflow: {error}", file=sys.stderr, flush=True)
        yield None
        return
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.close()


def _end(process: subprocess.Popen[str] | None, status: str) -> None:
    """Say how the step ended, and give the child a moment to log the rest."""
    if process is None or process.stdin is None:
        return
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        process.stdin.write(f"{status}\n")
        process.stdin.close()
        process.wait(_CLOSE_S)
