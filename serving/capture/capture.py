"""Choose requests, and hand them to the writer; nothing here waits, and nothing here raises."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal

from draftline.spec import CaptureSpec
from draftline.storage import open_store
from draftline.traffic.records import Asked
from draftline.traffic.redaction import Redactor
from draftline.traffic.sampling import is_sampled
from serving.capture.writer import DROP_REASONS, BatchWriter, WriterLimits
from serving.metrics import ServingMetrics

logger = logging.getLogger(__name__)

QUEUED_BATCHES = 4
"""Batches' worth of requests that may wait while the store does not answer."""


class TrafficCapture:
    """Keeps a sample of the requests of one replica.

    Args:
        consent: Whose consent counts; see :class:`draftline.spec.CaptureSpec`.
        sample_rate: Share of requests.
        max_record_bytes: Longer requests are left out.
        writer: Redacts and writes; closed with the capture.
        metrics: Counts what is left out.
    """

    def __init__(
        self,
        consent: Literal["request", "deployment"],
        sample_rate: float,
        max_record_bytes: int,
        writer: BatchWriter,
        metrics: ServingMetrics,
    ) -> None:
        self._needs_wish = consent == "request"
        self._sample_rate = sample_rate
        self._max_record_bytes = max_record_bytes
        self._writer = writer
        self._metrics = metrics

    def offer(self, request_id: str, messages: Sequence[tuple[str, str]], *, store: bool | None) -> None:
        """Keep a request that was admitted, if it is in the sample and may be kept.

        Args:
            request_id: Decides on the sample.
            messages: (role, text) pairs.
            store: What the request itself says, ``None`` if nothing.
        """
        may_keep = store is True if self._needs_wish else store is not False
        if not may_keep or not is_sampled(request_id, self._sample_rate):
            return
        try:
            if (asked := Asked.of(messages)) is None:
                return
            if asked.num_bytes > self._max_record_bytes:
                self._metrics.record_capture_dropped("too_large")
            else:
                self._writer.put(asked)
        except Exception as error:  # the request goes on, whatever is wrong with its capture
            # Only the type: the text may hold what the user wrote.
            logger.error("a request could not be captured (%s)", type(error).__name__)
            self._metrics.record_capture_dropped("failed")

    def close(self) -> None:
        """Write what waits, as far as that goes quickly."""
        self._writer.close()


def start_capture(spec: CaptureSpec, metrics: ServingMetrics) -> TrafficCapture | None:
    """What a spec asks for, running; ``None`` if it asks for nothing.

    The store is not asked whether it can be written: a bucket that is gone
    must not keep a server from starting. Failures are counted and logged.

    Args:
        spec: Of the run.
        metrics: Of the replica.

    Raises:
        SpecError: the URI cannot be understood.
        StorageError: boto3 is misconfigured.
    """
    if not spec.enabled or spec.uri is None:
        return None
    limits = WriterLimits(
        max_queue_bytes=QUEUED_BATCHES * spec.max_batch_bytes,
        max_record_bytes=spec.max_record_bytes,
        max_batch_bytes=spec.max_batch_bytes,
        max_hour_bytes=spec.max_hour_bytes,
        flush_s=spec.flush_s,
    )
    writer = BatchWriter(open_store(spec.uri), Redactor(spec.redact), spec.domain, limits, metrics)
    metrics.show("draftline:capture_pending_bytes", lambda: float(writer.pending_bytes))
    for reason in DROP_REASONS:
        # Shown as 0 from the start: an alert on a rate needs the series before the first event.
        metrics.record_capture_dropped(reason, 0)
    writer.start()
    return TrafficCapture(spec.consent, spec.sample_rate, spec.max_record_bytes, writer, metrics)
