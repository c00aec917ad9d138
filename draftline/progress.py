"""How long work tells the outside how far it is.

Core functions take a :class:`Progress` and call it; what happens then is the
edge's business: the command line draws bars, a cluster pod prints lines, a
test collects. Events are small and idempotent (a later ``done`` replaces an
earlier one), so a resumed step simply starts at its finished share.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol, TextIO


@dataclass(frozen=True)
class ProgressEvent:
    """One report.

    Attributes:
        step: Station name, for example ``"draft"``; a fan-out branch appends
            its item: ``"evaluation:humaneval"``.
        state: ``"started"``, ``"running"``, ``"skipped"``, ``"finished"`` or ``"failed"``.
        done: Finished units (monotone within one attempt).
        total: All units, or 0 when unknown.
        unit: What is counted, for example ``"tokens"`` or ``"seconds"``.
        note: A short human remark, for example ``"loss 1.93"``.
        values: Numbers worth showing or plotting.
        time_s: Unix time.
    """

    step: str
    state: str = "running"
    done: float = 0.0
    total: float = 0.0
    unit: str = ""
    note: str = ""
    values: Mapping[str, float] = field(default_factory=dict)
    time_s: float = field(default_factory=time.time)


class Progress(Protocol):
    """Anything that accepts progress events."""

    def emit(self, event: ProgressEvent) -> None:
        """Take one event; must not raise and must not block for long."""
        ...


class NullProgress:
    """Drops every event."""

    def emit(self, event: ProgressEvent) -> None:
        """See :class:`Progress`."""


class ListProgress:
    """Keeps every event; the in-memory twin for tests."""

    def __init__(self) -> None:
        self.events: list[ProgressEvent] = []

    def emit(self, event: ProgressEvent) -> None:
        """See :class:`Progress`."""
        self.events.append(event)


class JsonlProgress:
    """Appends events to a file that another process may follow.

    One ``write`` per line in append mode, so several processes on one
    machine can share the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def emit(self, event: ProgressEvent) -> None:
        """See :class:`Progress`."""
        line = json.dumps(asdict(event), separators=(",", ":")) + "\n"
        try:
            with open(self._path, "a", encoding="utf-8") as handle:
                handle.write(line)
        except OSError:
            # Progress is a courtesy: a full disk must fail in the step that writes data, not here.
            pass


class EventFile:
    """Reads what :class:`JsonlProgress` appends, from another process and while it is written.

    Args:
        path: The file; it may not exist yet.
        offset: Bytes to pass over: what an earlier run left.
    """

    def __init__(self, path: Path, offset: int = 0) -> None:
        self._path = path
        self._offset = offset

    def new(self) -> list[ProgressEvent]:
        """Whole events since the last call; damaged lines are passed over."""
        try:
            with open(self._path, "rb") as handle:
                handle.seek(self._offset)
                data = handle.read()
        except OSError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        events = []
        for line in whole.splitlines():
            with contextlib.suppress(ValueError, TypeError):
                events.append(ProgressEvent(**json.loads(line)))
        return events


class LineProgress:
    """Prints a line at most every ``min_interval_s`` seconds; for pod logs."""

    def __init__(self, stream: TextIO | None = None, min_interval_s: float = 5.0) -> None:
        # None means the standard error of whichever process emits: a stream cannot travel to a Ray worker.
        self._stream = stream
        self._min_interval_s = min_interval_s
        self._last: dict[str, float] = {}

    def emit(self, event: ProgressEvent) -> None:
        """See :class:`Progress`."""
        now = event.time_s
        if event.state == "running" and now - self._last.get(event.step, 0.0) < self._min_interval_s:
            return
        self._last[event.step] = now
        share = f" {100 * event.done / event.total:5.1f} %" if event.total else ""
        count = f" {event.done:g}/{event.total:g} {event.unit}" if event.total else ""
        note = f"  {event.note}" if event.note else ""
        print(f"[{event.step}] {event.state}{share}{count}{note}", file=self._stream or sys.stderr, flush=True)


EVENT_TAG = "draftline-event "
"""Begins a log line that holds an event."""


class TaggedProgress:
    """Prints every event as one tagged JSON line on standard error, for whoever follows the log."""

    def emit(self, event: ProgressEvent) -> None:
        """See :class:`Progress`."""
        print(EVENT_TAG + json.dumps(asdict(event), separators=(",", ":")), file=sys.stderr, flush=True)


def parse_tagged(line: str) -> ProgressEvent | None:
    """The event in a line of :class:`TaggedProgress`, whatever stands before the tag; ``None`` for other lines."""
    _, tag, document = line.partition(EVENT_TAG)
    if tag:
        with contextlib.suppress(ValueError, TypeError):
            return ProgressEvent(**json.loads(document))
    return None
