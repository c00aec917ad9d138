"""A thread that redacts requests and writes them in batches.

What is put here waits in memory, unredacted, up to a bound; redacted lines
gather in one batch; a batch becomes one object, whose name no other writer
uses. A store that fails is tried again with growing pauses. Meanwhile the
queue fills up, and then requests are left out and counted, oldest kept.
"""

from __future__ import annotations

import logging
import random
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from draftline.errors import ObjectExists, StorageError
from draftline.storage import ObjectStore
from draftline.traffic.records import Asked, to_line
from draftline.traffic.redaction import Redactor
from serving.metrics import ServingMetrics

logger = logging.getLogger(__name__)

DROP_REASONS = ("too_large", "queue_full", "hour_full", "storage", "failed")
"""Why a chat may be left out."""

_ITEM_OVERHEAD_BYTES = 256
"""Counted for each request beside its text, so that a flood of tiny ones is bounded, too."""


@dataclass(frozen=True)
class WriterLimits:
    """Bounds of a writer.

    Attributes:
        max_queue_bytes: Requests that wait for redaction.
        max_record_bytes: A redacted line that is longer is left out.
        max_batch_bytes: Size from which a batch is written.
        max_hour_bytes: Written per clock hour.
        flush_s: Age of its oldest record at which a batch is written.
        max_attempts: For one batch; then it is dropped.
        first_pause_s: After the first failure; doubles with each further one.
        longest_pause_s: Bound of the pauses.
        closing_s: How long :meth:`BatchWriter.close` waits.
    """

    max_queue_bytes: int
    max_record_bytes: int
    max_batch_bytes: int
    max_hour_bytes: int
    flush_s: float
    max_attempts: int = 8
    first_pause_s: float = 1.0
    longest_pause_s: float = 60.0
    closing_s: float = 10.0


@dataclass
class _Batch:
    lines: list[bytes] = field(default_factory=list)
    num_bytes: int = 0
    began_s: float = 0.0


class BatchWriter:
    """Writes JSON lines below a store's root, as ``date=YYYY-MM-DD/HHMMSS-REPLICA-NUMBER.jsonl`` (UTC).

    Args:
        store: Where to.
        redactor: Applied before anything is written.
        domain: Label of the records.
        limits: Bounds.
        metrics: Counts.
        now: Clock of the names and of the hours, in Unix seconds.
    """

    def __init__(
        self,
        store: ObjectStore,
        redactor: Redactor,
        domain: str,
        limits: WriterLimits,
        metrics: ServingMetrics,
        *,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._redactor = redactor
        self._domain = domain
        self._limits = limits
        self._metrics = metrics
        self._now = now
        self._writer_id = secrets.token_hex(6)
        self._num_batches = 0
        self._wake = threading.Condition()
        self._queue: deque[Asked] = deque()
        self._queue_bytes = 0
        self._is_closing = False
        self._batch = _Batch()
        self._hour, self._hour_bytes = 0, 0
        self._thread = threading.Thread(target=self._main, name="draftline-capture", daemon=True)

    @property
    def pending_bytes(self) -> int:
        """What waits, redacted or not."""
        return self._queue_bytes + self._batch.num_bytes

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def put(self, asked: Asked) -> None:
        """Take a request, or count it as left out; never waits for the store."""
        size = asked.num_bytes + _ITEM_OVERHEAD_BYTES
        with self._wake:
            if self._is_closing or self._queue_bytes + size > self._limits.max_queue_bytes:
                self._metrics.record_capture_dropped("queue_full")
                return
            self._queue.append(asked)
            self._queue_bytes += size
            self._wake.notify()

    def close(self) -> None:
        """Write what waits, once, and end the thread; what the store does not take is dropped and counted."""
        with self._wake:
            self._is_closing = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(self._limits.closing_s)
        if self._thread.is_alive():
            logger.warning("the captured requests of the last moments are not written yet; they may be lost")

    # The rest runs in the thread.

    def _main(self) -> None:
        while True:
            asked = self._next()
            if asked is None:
                self._flush()
                if self._is_closing and not self._queue:
                    return
                continue
            try:
                self._add(asked)
            except Exception as error:  # one odd request must not end the capture of all others
                logger.error("a captured request could not be redacted (%s); it is left out", type(error).__name__)
                self._metrics.record_capture_dropped("failed")
            if self._batch.num_bytes >= self._limits.max_batch_bytes:
                self._flush()

    def _next(self) -> Asked | None:
        """The next request, or ``None`` when the batch is due."""
        with self._wake:
            while True:
                due_s = self._batch.began_s + self._limits.flush_s - time.monotonic() if self._batch.lines else None
                # Asked first: a queue that is never empty must not keep the first record of a batch waiting.
                if due_s is not None and due_s <= 0:
                    return None
                if self._queue:
                    break
                if self._is_closing:
                    return None
                self._wake.wait(due_s)
            asked = self._queue.popleft()
            self._queue_bytes -= asked.num_bytes + _ITEM_OVERHEAD_BYTES
            return asked

    def _add(self, asked: Asked) -> None:
        line, counts = to_line(asked, self._domain, self._redactor)
        if len(line) > self._limits.max_record_bytes:
            self._metrics.record_capture_dropped("too_large")
            return
        hour = int(self._now() // 3600)
        if hour != self._hour:
            self._hour, self._hour_bytes = hour, 0
        if self._hour_bytes + len(line) > self._limits.max_hour_bytes:
            self._metrics.record_capture_dropped("hour_full")
            return
        self._hour_bytes += len(line)
        for rule, count in counts.items():
            self._metrics.record_redactions(rule, count)
        if not self._batch.lines:
            self._batch.began_s = time.monotonic()
        self._batch.lines.append(line)
        self._batch.num_bytes += len(line)

    def _flush(self) -> None:
        """Write the batch, or drop it after the last attempt."""
        if not self._batch.lines:
            return
        data, num_records = b"".join(self._batch.lines), len(self._batch.lines)
        self._batch.lines = []  # the joined bytes hold them, too
        if self._write_patiently(self._key(), data):
            self._metrics.record_captured(num_records, len(data))
        else:
            logger.error("%d captured requests are dropped: the store did not take them", num_records)
            self._metrics.record_capture_dropped("storage", num_records)
        self._batch = _Batch()

    def _write_patiently(self, key: str, data: bytes) -> bool:
        pause_s = self._limits.first_pause_s
        is_last = False
        for attempt in range(1, self._limits.max_attempts + 1):
            if self._write(key, data):
                return True
            if is_last or attempt == self._limits.max_attempts:
                return False
            # Replicas that failed together must not come back together.
            self._pause(pause_s * random.uniform(0.5, 1.5))
            pause_s = min(2 * pause_s, self._limits.longest_pause_s)
            # When the replica ends there is time for one more attempt.
            is_last = self._is_closing
        return False

    def _pause(self, seconds: float) -> None:
        """Wait so long, or until closing; new requests do not end it."""
        until_s = time.monotonic() + seconds
        with self._wake:
            while not self._is_closing and (left_s := until_s - time.monotonic()) > 0:
                self._wake.wait(left_s)

    def _write(self, key: str, data: bytes) -> bool:
        try:
            self._store.put_if_absent(key, data)
        except ObjectExists:
            # An attempt that seemed to fail did not: the name is ours alone.
            return True
        except StorageError as error:
            logger.warning("captured requests could not be written, trying again: %s", error)
            self._metrics.record_capture_failure()
            return False
        except Exception as error:  # a broken SDK must not end the thread; the batch is tried again, then dropped
            logger.warning("captured requests could not be written (%s), trying again", type(error).__name__)
            self._metrics.record_capture_failure()
            return False
        return True

    def _key(self) -> str:
        at = datetime.fromtimestamp(self._now(), UTC)
        self._num_batches += 1
        return f"date={at:%Y-%m-%d}/{at:%H%M%S}-{self._writer_id}-{self._num_batches:06d}.jsonl"
