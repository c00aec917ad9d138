"""A job's log in the step's own log, and its progress events to the step's progress."""

from __future__ import annotations

import contextlib
import re
import sys
import threading
from typing import TextIO

from components.cluster.api import Cluster
from draftline.errors import DraftlineError
from draftline.progress import Progress, parse_tagged

SUBMITTER_SELECTOR = "job-name={name}"
"""KubeRay's submitter is a Kubernetes Job of the RayJob's name, and Kubernetes labels its pods with it."""

_LOOK_EVERY_S = 1.0
_STAMP = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?Z? ?")


class LogFollower:
    """Follows the log of the pod that submitted a job; a context manager around the wait for the job.

    A log that broke off is read again from the start and passed over up to
    where it broke, by its timestamps. Nothing here can fail the step.

    Args:
        cluster: Where the job is.
        name: Of the job.
        progress: Receives the job's events.
        stream: Takes its other lines; ``None`` means standard output.
    """

    def __init__(self, cluster: Cluster, name: str, progress: Progress, stream: TextIO | None = None) -> None:
        self._cluster = cluster
        self._selector = SUBMITTER_SELECTOR.format(name=name)
        self._progress = progress
        self._stream = stream
        self._over = threading.Event()
        self._last: dict[str, tuple[str, str]] = {}
        self._read_to_the_end: set[str] = set()
        self._thread = threading.Thread(target=self._follow, name=f"log of {name}", daemon=True)

    def __enter__(self) -> LogFollower:
        """Begin to follow."""
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Print what is left, for a bounded time."""
        self._over.set()
        self._thread.join(10.0 if exception[0] is None else 0.0)

    def _follow(self) -> None:
        while True:
            # Looked at before reading: what a job printed at its very end is read in the round that follows its end.
            is_last_round = self._over.is_set()
            self._read_all()
            if is_last_round:
                return
            self._over.wait(_LOOK_EVERY_S)

    def _read_all(self) -> None:
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        with contextlib.suppress(DraftlineError):
            for pod in self._cluster.pods(self._selector):
                name = pod.metadata.name
                if pod.status.phase == "Pending" or name in self._read_to_the_end:
                    continue
                with contextlib.suppress(ApiException, HTTPError):
                    resume_at = self._last.get(name, ("", ""))
                    for line in self._cluster.log(name):
                        self._take(name, line, resume_at)
                    if pod.status.phase in ("Succeeded", "Failed"):
                        self._read_to_the_end.add(name)

    def _take(self, pod: str, line: str, resume_at: tuple[str, str]) -> None:
        stamp = _STAMP.match(line)
        if stamp is not None:
            # Kubernetes leaves trailing zeros of the fraction away.
            at = (stamp[1], (stamp[2] or "").ljust(9, "0"))
            if at <= resume_at:
                return
            self._last[pod] = at
            line = line[stamp.end() :]
        event = parse_tagged(line)
        if event is not None:
            self._progress.emit(event)
            return
        print(line, file=self._stream or sys.stdout, flush=True)
