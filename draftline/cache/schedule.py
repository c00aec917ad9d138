"""Which shard is captured next when nothing is kept: pure bookkeeping, without tensors and without Ray.

Trainers walk through the same endless sequence of *windows* (see
:mod:`draftline.cache.order`); a window is a handful of shards
whose samples are shuffled together. A shard that one of them asks for is
captured before all others. When none waits, the shards of the present window
and of the next are captured ahead, as long as no more than ``max_held`` are
held or under way: that bound is the back-pressure. A shard is captured once for
all trainers, and dropped when the slowest has left every window that needs it, or
when all have left altogether for a while.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence


class CaptureSchedule:
    """The state of one split's captures.

    Args:
        window_shards: The shards of a window by its number, in the order in which they are needed; pure.
        num_readers: How many trainers take part; nothing is dropped before all have shown up.
        max_held: Shards held and under way together, beyond which only what is asked for is captured; 0 captures
            nothing ahead.
    """

    def __init__(
        self,
        window_shards: Callable[[int], Sequence[int]],
        *,
        num_readers: int,
        max_held: int,
    ) -> None:
        self._window_shards = window_shards
        self._num_readers = num_readers
        self._max_held = max_held
        self._windows: dict[int, int | None] = {}
        self._wanted: deque[int] = deque()
        self._busy: set[int] = set()
        self._failed: set[int] = set()
        self._held: set[int] = set()

    @property
    def held(self) -> frozenset[int]:
        """Shards that are captured and not yet dropped."""
        return frozenset(self._held)

    @property
    def num_in_flight(self) -> int:
        """Shards held and under way."""
        return len(self._held) + len(self._busy)

    def ask(self, reader: int, window: int, shard: int) -> bool:
        """A reader needs a shard of a window now, and none of earlier windows; returns whether the shard is held.

        Asking again for one that failed tries it again.
        """
        self._windows[reader] = window
        if shard in self._held:
            return True
        self._failed.discard(shard)
        if shard not in self._busy and shard not in self._wanted:
            self._wanted.append(shard)
        return False

    def leave(self, reader: int) -> None:
        """A reader needs nothing until it asks again."""
        self._windows[reader] = None

    def next_capture(self) -> int | None:
        """A shard to capture now, which is from then on under way; ``None`` when there is nothing to do."""
        while self._wanted:
            shard = self._wanted.popleft()
            if shard not in self._held and shard not in self._busy:
                self._busy.add(shard)
                return shard
        if self.num_in_flight >= self._max_held:
            return None
        for window in self._span():
            for shard in self._window_shards(window):
                if shard not in self._held and shard not in self._busy and shard not in self._failed:
                    self._busy.add(shard)
                    return shard
        return None

    def captured(self, shard: int) -> None:
        """A capture ended well."""
        self._busy.remove(shard)
        self._held.add(shard)

    def failed(self, shard: int) -> None:
        """A capture failed; it is tried again only when somebody asks."""
        self._busy.remove(shard)
        self._failed.add(shard)

    def drop(self) -> list[int]:
        """Shards that nobody needs any more; they are held no longer."""
        if len(self._windows) < self._num_readers:
            return []
        needed = {shard for window in self._span() for shard in self._window_shards(window)}
        over = sorted(self._held - needed)
        self._held.difference_update(over)
        return over

    def _span(self) -> range:
        """From the window of the slowest reader to the one after the fastest's."""
        windows = [window for window in self._windows.values() if window is not None]
        return range(min(windows), max(windows) + 2) if windows else range(0)
