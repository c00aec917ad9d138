"""What a run's progress events add up to; pure bookkeeping without a clock of its own.

The honest estimate: a station's speed is what *this attempt* did since its
first report. A resumed step starts at the share that an earlier attempt
finished; that share is in the bar and not in the speed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from draftline.progress import ProgressEvent

MIN_OBSERVED_S = 3.0
"""Speeds measured over less time than this are not shown."""

MIN_OBSERVED_SHARE = 0.01
"""Nor over less of the work: the first unit also pays for loading and prefilling."""

STATION_WEIGHTS: Mapping[str, float] = {
    "prompts": 0.1,
    "responses": 31,
    "tokens": 0.2,
    "hidden-states": 14,
    "draft": 28,
    "calibration": 3,
    "evaluation": 10,
    "report": 0.5,
    "register": 0.5,
    "gate": 0.2,
    "deploy": 2,
}
"""Relative durations of the stations (a fan-out branch each), only to weigh those not yet seen against those seen."""

SETTLED = ("finished", "skipped", "failed", "omitted")


@dataclass
class StationProgress:
    """One line of the display.

    Attributes:
        label: Station, or ``station:item``.
        state: ``pending``, the state of the last event, or ``omitted`` when the run ended without this station.
        done: Finished units, those of earlier attempts included.
        total: All units, 0 when unknown.
        unit: What is counted.
        note: Last remark.
        started_s: When this attempt began (Unix time), ``None`` while pending.
        updated_s: When the last event came.
        base_done: ``done`` at the first report of this attempt and phase.
        base_s: When that report came.
    """

    label: str
    state: str = "pending"
    done: float = 0.0
    total: float = 0.0
    unit: str = ""
    note: str = ""
    started_s: float | None = None
    updated_s: float = 0.0
    base_done: float | None = None
    base_s: float = 0.0

    @property
    def station(self) -> str:
        """The station without the fan-out item."""
        return self.label.partition(":")[0]

    @property
    def is_settled(self) -> bool:
        """Nothing more will happen here."""
        return self.state in SETTLED

    @property
    def share(self) -> float | None:
        """Finished share in [0, 1], ``None`` when unknown."""
        if self.state in ("finished", "skipped"):
            return 1.0
        return min(self.done / self.total, 1.0) if self.total > 0 else None

    def elapsed_s(self, now_s: float) -> float:
        """Seconds that this attempt has taken so far, or took."""
        if self.started_s is None:
            return 0.0
        return max((self.updated_s if self.is_settled else now_s) - self.started_s, 0.0)

    def eta_s(self, now_s: float) -> float | None:
        """Seconds left at the speed of this attempt, ``None`` while unknown."""
        if self.state != "running" or self.base_done is None or self.total <= 0:
            return None
        # Up to the last report, not to now: between two reports the work goes on unseen.
        observed_s, advanced = self.updated_s - self.base_s, self.done - self.base_done
        if observed_s < MIN_OBSERVED_S or advanced <= 0 or advanced < MIN_OBSERVED_SHARE * self.total:
            return None
        left_s = (self.total - self.done) * observed_s / advanced
        return max(left_s - (now_s - self.updated_s), 0.0)

    def apply(self, event: ProgressEvent) -> None:
        """Take one event of this label."""
        if event.state == "started" or self.started_s is None:
            self.started_s = event.time_s
            self.done = self.total = 0.0
            self.base_done = None
        if event.state == "running":
            is_new_phase = event.unit != self.unit or event.total != self.total or event.done < self.done
            if self.base_done is None or is_new_phase:
                self.base_done, self.base_s = event.done, event.time_s
            self.done, self.total, self.unit = event.done, event.total, event.unit
        self.state = "running" if event.state == "started" else event.state
        self.note = event.note or (self.note if event.state == "running" else "")
        self.updated_s = event.time_s


@dataclass
class RunProgress:
    """All lines of one run, in the DAG's order."""

    started_s: float
    stations: dict[str, StationProgress] = field(default_factory=dict)

    @classmethod
    def for_run(cls, labels: Iterable[str], started_s: float) -> RunProgress:
        """A run in which nothing has happened yet."""
        return cls(started_s, {label: StationProgress(label) for label in labels})

    def apply(self, event: ProgressEvent) -> None:
        """Take one event; an unknown label gets a line of its own at the end."""
        self.stations.setdefault(event.step, StationProgress(event.step)).apply(event)

    def settle(self) -> None:
        """The run ended well: what is still pending was not wanted (a branch whose condition did not hold)."""
        for line in self.stations.values():
            if line.state == "pending":
                line.state = "omitted"

    def eta_s(self, now_s: float) -> float | None:
        """Seconds left for the whole run, ``None`` while nothing supports a number.

        Stations not begun are weighed against those seen in this run
        (:data:`STATION_WEIGHTS`), so the machine's real speed scales them.
        """
        seen_s = seen_weight = left_s = pending_weight = 0.0
        for line in self.stations.values():
            weight = STATION_WEIGHTS.get(line.station, 1.0)
            if line.state == "finished":
                seen_s, seen_weight = seen_s + line.elapsed_s(now_s), seen_weight + weight
            elif line.state == "pending":
                pending_weight += weight
            elif not line.is_settled:
                eta_s = line.eta_s(now_s)
                if eta_s is None:
                    pending_weight += weight
                    continue
                left_s += eta_s
                share_here = (line.total - (line.base_done or 0.0)) / line.total
                if share_here > 0:
                    seen_s += line.elapsed_s(now_s) + eta_s
                    seen_weight += weight * share_here
        if pending_weight == 0:
            return left_s
        if seen_weight < min(5.0, pending_weight):
            return None
        return left_s + seen_s / seen_weight * pending_weight


def run_labels(suites: Iterable[str], stations: Iterable[str]) -> list[str]:
    """The lines of a run: every station, the evaluation once a suite."""
    labels: list[str] = []
    for station in stations:
        labels += [f"evaluation:{suite}" for suite in suites] if station == "evaluation" else [station]
    return labels


class EventFollower:
    """Reads what was appended to an events file since the last look."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def poll(self) -> Iterator[ProgressEvent]:
        """New events, oldest first; half a line waits for its rest, an unreadable one is passed over."""
        try:
            with open(self._path, "rb") as handle:
                handle.seek(self._offset)
                data = handle.read()
        except FileNotFoundError:
            return
        complete = data[: data.rfind(b"\n") + 1]
        self._offset += len(complete)
        for line in complete.splitlines():
            try:
                yield ProgressEvent(**json.loads(line))
            except (ValueError, TypeError):
                # Progress is a courtesy: a torn line must not end a run.
                continue
