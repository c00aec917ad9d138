"""What became of the requests that capture saw."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge

DropReason = Literal["too_large", "queue_full", "hour_full", "storage", "failed"]
DROP_REASONS: tuple[DropReason, ...] = ("too_large", "queue_full", "hour_full", "storage", "failed")


class CaptureMetrics:
    """Counters of one replica.

    Args:
        registry: Where ``/metrics`` reads.
        model_name: Value of the ``model_name`` label.
        pending_bytes: Reads what waits to be written.
    """

    def __init__(self, registry: CollectorRegistry, model_name: str, pending_bytes: Callable[[], int]) -> None:
        self._model = model_name
        labels = ["model_name"]
        self._records = Counter(
            "draftline:capture_records", "Requests written as prompts.", labels, registry=registry
        ).labels(model_name)
        self._bytes = Counter("draftline:capture_bytes", "Bytes of them, redacted.", labels, registry=registry).labels(
            model_name
        )
        self._failures = Counter(
            "draftline:capture_write_failures", "Attempts to write a batch that failed.", labels, registry=registry
        ).labels(model_name)
        self._dropped = Counter(
            "draftline:capture_dropped", "Sampled requests that were left out.", [*labels, "reason"], registry=registry
        )
        self._redactions = Counter(
            "draftline:capture_redactions", "Places redacted, by rule.", [*labels, "rule"], registry=registry
        )
        pending = Gauge("draftline:capture_pending_bytes", "Waiting to be written.", labels, registry=registry)
        pending.labels(model_name).set_function(pending_bytes)
        for reason in DROP_REASONS:
            self._dropped.labels(model_name, reason)

    def written(self, num_records: int, num_bytes: int) -> None:
        """A batch lies in the store."""
        self._records.inc(num_records)
        self._bytes.inc(num_bytes)

    def write_failed(self) -> None:
        """The store did not take a batch; it is tried again, or dropped."""
        self._failures.inc()

    def dropped(self, reason: DropReason, num_records: int = 1) -> None:
        """Requests were left out."""
        self._dropped.labels(self._model, reason).inc(num_records)

    def redacted(self, rule: str, count: int) -> None:
        """A rule was applied to a record."""
        self._redactions.labels(self._model, rule).inc(count)
