"""Samples whose hidden states are captured while training runs, and kept nowhere.

The order of samples, and every number in them, are those of a cache: the same
shards are captured by the same code with the same codec, and arrive as the
same bytes. Only where those bytes come from differs: a :class:`ShardFeed`.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

from draftline.cache.hidden import HiddenIndex
from draftline.cache.manifest import ShardInfo
from draftline.cache.order import WINDOW_SHARDS, Window, windows
from draftline.cache.sample import CachedSample
from draftline.errors import InputError

_NUM_EPOCHS = 2
"""Orders kept: of an epoch and of the one that is captured ahead."""


class ShardFeed(Protocol):
    """Where captured shards come from."""

    def fetch(self, window: int, shard: int) -> memoryview:
        """The bytes of a hidden-state shard; waits until it is captured.

        Args:
            window: The window that the reader is in; all earlier ones are over for it.
            shard: Its place in the split.

        Raises:
            DraftlineError: why it cannot be captured.
        """
        ...

    def leave(self) -> None:
        """The reader needs nothing until it fetches again."""
        ...


class StreamOrder:
    """Who reads what, from integers alone: the order of the cache's reader, by window.

    Args:
        samples_per_shard: Of the split's shards.
        seed: Of the shuffle.
        window_shards: Shards that are shuffled together.
    """

    def __init__(self, samples_per_shard: Sequence[int], seed: int, window_shards: int = WINDOW_SHARDS) -> None:
        self._counts = list(samples_per_shard)
        self._seed = seed
        self._size = window_shards
        self.num_samples = sum(self._counts)
        self.num_windows = -(-len(self._counts) // window_shards)
        self._epochs: OrderedDict[int, list[Window]] = OrderedDict()

    def place(self, position: int) -> tuple[int, int, int]:
        """Window, shard, and sample within the shard, of a position in the endless stream."""
        epoch, index = divmod(position, self.num_samples)
        found = self._epoch(epoch)
        inner = bisect_right(found, index, key=lambda window: window.start + len(window.samples))
        window = found[inner]
        return epoch * self.num_windows + inner, *window.samples[index - window.start]

    def shards(self, window: int) -> tuple[int, ...]:
        """The shards of a window, in the order in which its samples first need them; none without samples."""
        epoch, inner = divmod(window, self.num_windows)
        return tuple(dict.fromkeys(shard for shard, _ in self._epoch(epoch)[inner].samples))

    def _epoch(self, epoch: int) -> list[Window]:
        if epoch not in self._epochs:
            self._epochs[epoch] = windows(self._counts, epoch, self._seed, self._size)
            while len(self._epochs) > _NUM_EPOCHS:
                self._epochs.popitem(last=False)
        self._epochs.move_to_end(epoch)
        return self._epochs[epoch]


class StreamSource:
    """Samples of one split out of a feed. Implements :class:`draftline.cache.source.SampleSource`.

    Args:
        feed: Where the shards come from.
        shards: Of the split, in the manifest's order.
        seed: Of the shuffle.
        keep_samples: Keep this many samples decoded, the latest read: for a split of which the same few are read again
            and again. Once they are all known, their shards are let go.
        window_shards: Shards that are shuffled together.

    Raises:
        InputError: the shards hold no samples.
    """

    def __init__(
        self,
        feed: ShardFeed,
        shards: Sequence[ShardInfo],
        seed: int,
        *,
        keep_samples: int = 0,
        window_shards: int = WINDOW_SHARDS,
    ) -> None:
        self._feed = feed
        self._shards = shards
        self._order = StreamOrder([s.num_samples for s in shards], seed, window_shards)
        self.num_samples = self._order.num_samples
        if self.num_samples == 0:
            raise InputError(
                "there are no samples to capture", remedy="Give more prompts, or raise the split's fraction in the spec"
            )
        self.wait_s = 0.0
        self._keep_samples = keep_samples
        self._kept: OrderedDict[int, CachedSample] = OrderedDict()
        self._window = -1
        self._open: dict[int, tuple[HiddenIndex, memoryview]] = {}

    def at(self, position: int) -> CachedSample:
        """The sample at a position of the stream; epoch = position // num_samples.

        Raises:
            FormatError: what it is captured from is damaged.
            StorageError: that cannot be read.
            DraftlineError: the capture failed.
        """
        if position in self._kept:
            self._let_go()
            self._kept.move_to_end(position)
            return self._kept[position]
        window, shard, sample = self._order.place(position)
        started = time.perf_counter()
        index, data = self._shard(window, shard)
        self.wait_s += time.perf_counter() - started
        ranges = {segment: index.record_range(segment) for segment in index.segments(sample)}
        found = index.sample(sample, {segment: data[at : at + size] for segment, (at, size) in ranges.items()})
        if self._keep_samples:
            self._kept[position] = found
            while len(self._kept) > self._keep_samples:
                self._kept.popitem(last=False)
        return found

    def announce(self, positions: Sequence[int]) -> None:
        """See :class:`draftline.cache.source.SampleSource`; the feed captures ahead by itself, in the same order."""

    def close(self) -> None:
        """Let go of everything."""
        self._kept.clear()
        self._let_go()

    def _let_go(self) -> None:
        if self._window >= 0:
            self._open.clear()
            self._window = -1
            self._feed.leave()

    def _shard(self, window: int, shard: int) -> tuple[HiddenIndex, memoryview]:
        if window != self._window:
            needed = set(self._order.shards(window))
            self._open = {number: held for number, held in self._open.items() if number in needed}
            self._window = window
        if shard not in self._open:
            data = self._feed.fetch(window, shard)
            self._open[shard] = (HiddenIndex.of(data, origin=f"the captured {self._shards[shard].name}"), data)
        return self._open[shard]
