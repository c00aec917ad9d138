"""The child process of :mod:`components.live_metrics`: follows a file of events, logs to MLflow.

``python -m components.live_metrics_process EVENTS OFFSET STATION KEY EXPERIMENT``.
Its standard input says how the step ended; closed without a word, the step
was killed. A server that does not answer costs one line of warning; figures
wait in bounded memory, and are logged if it answers again.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from components.registry import RUN_ID_ENV, connect, registry_errors
from draftline.errors import DraftlineError
from draftline.progress import EventFile, ProgressEvent

if TYPE_CHECKING:
    from mlflow import MlflowClient

TAG_LIVE = "draftline.training"
"""Tag of a live run; its value is the draft step's content key."""

LOOK_EVERY_S = 1.0
_MAX_PENDING = 20_000
_BATCH = 1000
_FIRST_WAIT_S, _LONGEST_WAIT_S = 2.0, 60.0
_PREFIX = "train/"
_LOSS = f"{_PREFIX}loss"


@dataclass(frozen=True)
class Figure:
    """One number of one step."""

    name: str
    value: float
    step: int
    time_ms: int


def figures_of(event: ProgressEvent, station: str) -> list[Figure]:
    """What an event has to log: the finite numbers of a running step."""
    if event.step != station or event.state != "running":
        return []
    return [
        Figure(_PREFIX + name, float(value), int(event.done), int(event.time_s * 1000))
        for name, value in event.values.items()
        if isinstance(value, int | float) and math.isfinite(value)
    ]


class LiveRun:
    """The MLflow run of one content key: made at the first figures, taken up again after a restart.

    Args:
        client: Connected.
        experiment: Its name; made if absent.
        station: The step's.
        key: The content key.
    """

    def __init__(self, client: MlflowClient, experiment: str, station: str, key: str) -> None:
        self._client = client
        with registry_errors("open the run of live figures"):
            found = client.get_experiment_by_name(experiment)
            experiment_id = found.experiment_id if found else client.create_experiment(experiment)
            runs = client.search_runs([experiment_id], f"tags.`{TAG_LIVE}` = '{key}'", max_results=1)
            if runs:
                self._run_id = runs[0].info.run_id
                client.update_run(self._run_id, status="RUNNING")
                history = client.get_metric_history(self._run_id, _LOSS)
                # A resumed training repeats the steps after its checkpoint; they are there already.
                self._logged = max((point.step for point in history), default=0)
            else:
                tags = {TAG_LIVE: key}
                if parent := os.environ.get(RUN_ID_ENV):
                    tags["mlflow.parentRunId"] = parent
                made = client.create_run(experiment_id, run_name=f"{station}-{key[:8]}", tags=tags)
                self._run_id, self._logged = made.info.run_id, 0

    def log(self, figures: Sequence[Figure]) -> None:
        """Log figures of steps that are not there yet."""
        from mlflow.entities import Metric

        new = [Metric(f.name, f.value, f.time_ms, f.step) for f in figures if f.step > self._logged]
        with registry_errors("log live figures"):
            for start in range(0, len(new), _BATCH):
                self._client.log_batch(self._run_id, metrics=new[start : start + _BATCH])
        self._logged = max((f.step for f in figures), default=self._logged)

    def end(self, status: str) -> None:
        """Close the run: ``FINISHED``, ``FAILED`` or ``KILLED``."""
        with registry_errors("close the run of live figures"):
            self._client.set_terminated(self._run_id, status)


class Follower:
    """Hands figures to MLflow whenever it can be reached.

    Args:
        open_run: Connects and opens the run; called again after a failure.
        clock: Seconds.
        warn: Takes one line.
    """

    def __init__(
        self,
        open_run: Callable[[], LiveRun],
        clock: Callable[[], float] = time.monotonic,
        warn: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
    ) -> None:
        self._open_run = open_run
        self._clock = clock
        self._warn = warn
        self._pending: deque[Figure] = deque(maxlen=_MAX_PENDING)
        self._run: LiveRun | None = None
        self._wait_s = _FIRST_WAIT_S
        self._not_before = -math.inf
        self._has_warned = False

    def add(self, figures: Sequence[Figure]) -> None:
        """Take figures; the oldest go when there are too many."""
        self._pending.extend(figures)

    def flush(self) -> None:
        """Log what waits, unless the server failed a moment ago."""
        if self._pending and self._clock() >= self._not_before:
            self._try(self._log)

    def end(self, status: str) -> None:
        """Log the rest and close the run, in one attempt."""
        if self._pending:
            self._try(self._log)
        if self._run is not None and not self._pending:
            self._try(lambda: self._run.end(status) if self._run else None)

    def _log(self) -> None:
        if self._run is None:
            self._run = self._open_run()
        whole = list(self._pending)
        self._run.log(whole)
        for _ in whole:
            self._pending.popleft()

    def _try(self, work: Callable[[], None]) -> None:
        try:
            work()
        except DraftlineError as error:
            if not self._has_warned:
                self._warn(f"warning: live figures do not reach MLflow, training goes on without: {error}")
            self._has_warned = True
            self._not_before = self._clock() + self._wait_s
            self._wait_s = min(2 * self._wait_s, _LONGEST_WAIT_S)
        else:
            self._wait_s = _FIRST_WAIT_S


def main(events: Path, offset: int, station: str, key: str, experiment: str) -> None:
    """Follow the file until standard input says that the step is over."""
    follower = Follower(lambda: LiveRun(connect(), experiment, station, key))
    status: list[str] = []
    over = threading.Event()

    def listen() -> None:
        status.append(sys.stdin.readline().strip() or "KILLED")
        over.set()

    threading.Thread(target=listen, daemon=True).start()
    file = EventFile(events, offset)
    is_over = False
    while not is_over:
        is_over = over.wait(LOOK_EVERY_S)
        follower.add([figure for event in file.new() for figure in figures_of(event, station)])
        if not is_over:
            follower.flush()
    follower.end(status[0])


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:6])
