"""Watches the draft in use: live acceptance into the metrics, drift into the log and the registry."""

from __future__ import annotations

import logging
import threading
from collections import deque

from draftline.engine.requests import DraftedBlocks
from draftline.spec import DriftSpec
from serving.drift import AcceptanceMonitor, DriftEvent, evaluated_survival
from serving.metrics import ServingMetrics
from serving.registry import DraftFiles

logger = logging.getLogger(__name__)

_BLOCKS_PER_SHOW = 100
_MAX_EVENTS = 16


class DraftWatch:
    """Follows the drafts of one replica.

    Args:
        metrics: Where figures are shown.
        spec: When acceptance counts as drifted.
    """

    def __init__(self, metrics: ServingMetrics, spec: DriftSpec) -> None:
        self._metrics = metrics
        self._spec = spec
        self._lock = threading.Lock()
        self._events: deque[DriftEvent] = deque(maxlen=_MAX_EVENTS)
        self._num_unshown = 0
        self._names = (metrics.model_name, "")
        self._evaluated_B: tuple[float, ...] | None = None
        self._monitor = AcceptanceMonitor(spec, 0, None)
        metrics.show("draftline:whole_block_length", lambda: self._monitor.live_length)
        metrics.show("draftline:evaluated_length", lambda: self._monitor.evaluated_length)
        metrics.show("draftline:acceptance_drift", lambda: self._monitor.drop)
        metrics.show("draftline:is_drifted", lambda: float(self._monitor.is_drifted))

    def use(self, draft: DraftFiles | None) -> None:
        """Begin anew with another draft, or with none; call between two steps."""
        self._evaluated_B = evaluated_survival(draft.metrics_file) if draft and draft.metrics_file else None
        self._names = (self._metrics.model_name, draft.name if draft else "")
        self._renew(len(self._evaluated_B or ()))
        self._metrics.show_draft(draft.name if draft else None, self._evaluated_B)

    def _renew(self, block_size: int) -> None:
        self._monitor = AcceptanceMonitor(self._spec, block_size, self._evaluated_B, self._names)

    def record(self, blocks: DraftedBlocks) -> None:
        """Take the blocks of a step in; called by the engine thread."""
        if blocks.block_size != self._monitor.block_size:
            # Evaluated at another size, or not at all: live figures are shown, nothing is compared.
            self._renew(blocks.block_size)
        event = self._monitor.record(blocks)
        self._num_unshown += len(blocks.request_ids)
        if self._num_unshown >= _BLOCKS_PER_SHOW and (survival_B := self._monitor.survival_B) is not None:
            self._num_unshown = 0
            self._metrics.show_acceptance([float(share) for share in survival_B])
        if event is None:
            return
        self._metrics.record_drift()
        logger.warning("%s", event.to_json())
        with self._lock:
            self._events.append(event)

    def take_events(self) -> list[DriftEvent]:
        """Events that were not taken yet, oldest first; for whoever publishes them."""
        with self._lock:
            events = list(self._events)
            self._events.clear()
        return events
