"""How fast training goes, for the live figures; nothing here enters a result."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from draftline.cache.source import SampleSource


class StepMeter:
    """Tokens per second and the share of time spent waiting for data, between one call and the next.

    Args:
        sources: Whose waiting counts.
        clock: Seconds.
    """

    def __init__(self, sources: Sequence[SampleSource], clock: Callable[[], float] = time.perf_counter) -> None:
        self._sources = sources
        self._clock = clock
        self._then, self._waited = clock(), self._wait_s()

    def figures(self, num_tokens: float) -> dict[str, float]:
        """Of the step that has just ended.

        Args:
            num_tokens: Of the step's samples, all workers'.
        """
        now, waited = self._clock(), self._wait_s()
        seconds = max(now - self._then, 1e-9)
        share = (waited - self._waited) / seconds
        self._then, self._waited = now, waited
        return {"tokens_per_s": num_tokens / seconds, "data_wait_share": min(max(share, 0.0), 1.0)}

    def _wait_s(self) -> float:
        return sum(source.wait_s for source in self._sources)
