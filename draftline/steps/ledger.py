"""Committed results: one small JSON object per finished step, written last and once.

``<workspace>/<station>/<key>/result.json`` appears by create-if-absent after
everything it names is stored. A reader that sees it may rely on all of it; a
step killed a moment earlier left none and runs again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from draftline.digests import digest_of, require_digest
from draftline.errors import FormatError, ObjectExists, ObjectNotFound
from draftline.storage.base import ObjectStore

RESULT_VERSION = 1

JsonValue = Any
"""Whatever ``json`` can carry; typed loosely because JSON is."""


STANDS_FOR = "stands_for"
"""Output that names the key of a result that gives the same; see :attr:`draftline.steps.stations.Station.neutral`."""


@dataclass(frozen=True)
class StepResult:
    """What a finished step says of itself.

    Attributes:
        station: Station name.
        key: Content key.
        item: Fan-out item, empty outside a fan-out.
        inputs: Keys of the inputs that were read, named as in :func:`draftline.steps.content_key`.
        outputs: Small facts for later steps (object keys relative to
            :attr:`prefix`, counts, names).
        metrics: Numbers for trackers and people.
    """

    station: str
    key: str
    item: str = ""
    inputs: Mapping[str, str] = field(default_factory=dict)
    outputs: Mapping[str, JsonValue] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def identity(self) -> str:
        """Key by which later steps know what this gives: :attr:`key`, unless that says only how it is kept."""
        return str(self.outputs.get(STANDS_FOR, self.key))

    @property
    def prefix(self) -> str:
        """Folder of this step's objects in the workspace."""
        return step_prefix(self.station, self.key)

    def to_json(self) -> str:
        """Stable JSON text."""
        return json.dumps({"version": RESULT_VERSION, **asdict(self)}, sort_keys=True, indent=1)

    @classmethod
    def from_json(cls, text: str | bytes, *, origin: str = "a step result") -> StepResult:
        """Parse :meth:`to_json`.

        Raises:
            FormatError: not such a document, or one of a newer version.
        """
        try:
            document = json.loads(text)
            version = document.pop("version")
            if version != RESULT_VERSION:
                raise FormatError(
                    f"{origin} has an unknown version",
                    got=version,
                    expected=str(RESULT_VERSION),
                    remedy="Upgrade Draftline, or use a fresh workspace",
                )
            return cls(**document)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FormatError(
                f"{origin} is damaged ({type(error).__name__}: {error})",
                remedy="Delete the object; its step runs again",
            ) from None


SCRATCH = "scratch"
"""Folder within a step's folder that is emptied once its result is committed."""


def step_prefix(station: str, key: str) -> str:
    """Folder of a step's objects, relative to the workspace."""
    return f"{station}/{key}"


def verify_bytes(data: bytes, expected: str, *, origin: str) -> None:
    """Check an object of a step against the digest that its step recorded.

    Raises:
        FormatError: it differs.
    """
    remedy = "Delete that step's folder in the workspace and run again"
    require_digest(digest_of(data), expected, f"{origin} is not what its step wrote", remedy)


class Ledger:
    """Reads and commits results in one workspace."""

    def __init__(self, store: ObjectStore) -> None:
        self.store = store

    def find(self, station: str, key: str) -> StepResult | None:
        """The committed result, or ``None``.

        Raises:
            FormatError: the stored document is damaged or newer.
        """
        path = f"{step_prefix(station, key)}/result.json"
        try:
            data = self.store.get(path)
        except ObjectNotFound:
            return None
        return StepResult.from_json(data, origin=path)

    def commit(self, result: StepResult) -> StepResult:
        """Store the result if none is there; returns the one that counts.

        Two runs of one step may race (a retry while the first still lives):
        whoever commits first wins and the other takes the winner's result.
        """
        path = f"{result.prefix}/result.json"
        try:
            self.store.put_if_absent(path, result.to_json().encode())
        except ObjectExists:
            return StepResult.from_json(self.store.get(path), origin=path)
        return result
