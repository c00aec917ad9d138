"""What a station's function is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from draftline.progress import NullProgress, Progress, ProgressEvent
from draftline.spec import RunSpec
from draftline.steps.ledger import SCRATCH, JsonValue, StepResult, step_prefix
from draftline.storage.base import ObjectStore


@dataclass(frozen=True)
class StepOutput:
    """What a station's function returns; see :class:`StepResult`.

    Attributes:
        note: One line to show beside "finished"; not stored.
    """

    outputs: Mapping[str, JsonValue] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class StepContext:
    """Everything a station's function may use.

    Attributes:
        station: Its name.
        key: Its content key.
        item: Fan-out item (a suite), empty elsewhere.
        spec: The run spec.
        store: The workspace.
        inputs: Results of the input stations; fan-out branches appear as
            ``station:item``.
        progress: Where to report.
    """

    station: str
    key: str
    spec: RunSpec
    store: ObjectStore
    inputs: Mapping[str, StepResult]
    item: str = ""
    progress: Progress = field(default_factory=NullProgress)

    @property
    def prefix(self) -> str:
        """Folder for this step's objects in the workspace."""
        return step_prefix(self.station, self.key)

    @property
    def scratch(self) -> str:
        """Folder for objects that only an interrupted step needs; emptied once the result is committed."""
        return f"{self.prefix}/{SCRATCH}"

    @property
    def label(self) -> str:
        """Name in progress reports."""
        return f"{self.station}:{self.item}" if self.item else self.station

    def report(
        self, done: float, total: float, unit: str, note: str = "", values: Mapping[str, float] | None = None
    ) -> None:
        """Emit a ``running`` progress event."""
        self.progress.emit(
            ProgressEvent(self.label, "running", done=done, total=total, unit=unit, note=note, values=values or {})
        )
