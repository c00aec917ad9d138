"""Read cached samples in a deterministic, shuffled order, with bounded memory.

Who reads what is a pure function of integers: :func:`sample_order`. Shards are
shuffled, taken in windows that fit in memory together, and samples are
shuffled within a window; so a reader opens each shard once per epoch and can
start at any position.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from draftline.cache.hidden import HiddenIndex
from draftline.cache.manifest import Manifest, ShardInfo
from draftline.cache.sample import CachedSample as CachedSample
from draftline.cache.shards import check_bytes
from draftline.errors import InputError
from draftline.storage.base import ObjectStore

WINDOW_SHARDS = 16


def sample_order(
    samples_per_shard: Sequence[int], epoch: int, seed: int, window_shards: int = WINDOW_SHARDS
) -> list[tuple[int, int]]:
    """All ``(shard, sample)`` pairs once, in the order of one epoch."""
    random = np.random.default_rng([seed, epoch])
    shards = random.permutation(len(samples_per_shard))
    order: list[tuple[int, int]] = []
    for start in range(0, len(shards), window_shards):
        window = [(int(s), i) for s in shards[start : start + window_shards] for i in range(samples_per_shard[s])]
        order.extend(window[i] for i in random.permutation(len(window)))
    return order


class CacheReader:
    """Samples of one split by their place in an endless, shuffled stream.

    Args:
        store: The workspace.
        prefix: Folder of the hidden-states step.
        manifest: Its manifest.
        split: Which split.
        seed: Of the shuffle.
        window_shards: Shards held in memory.
    """

    def __init__(
        self,
        store: ObjectStore,
        prefix: str,
        manifest: Manifest,
        split: str,
        seed: int,
        window_shards: int = WINDOW_SHARDS,
    ) -> None:
        self._store = store
        self._prefix = prefix
        self._seed = seed
        self._window_shards = window_shards
        self.shards: tuple[ShardInfo, ...] = manifest.of_split(split)
        self.num_samples = sum(s.num_samples for s in self.shards)
        if self.num_samples == 0:
            raise InputError(
                f"the cache has no {split!r} samples",
                remedy="Give more prompts, or raise the split's fraction in the spec",
            )
        self.wait_s = 0.0
        self._open: OrderedDict[int, tuple[HiddenIndex, memoryview]] = OrderedDict()
        self._order: tuple[int, list[tuple[int, int]]] = (-1, [])

    def at(self, position: int) -> CachedSample:
        """The sample at a position of the stream; epoch = position // num_samples.

        Raises:
            FormatError: its shard is damaged.
            StorageError: its shard cannot be read.
        """
        epoch, index = divmod(position, self.num_samples)
        if self._order[0] != epoch:
            counts = [s.num_samples for s in self.shards]
            self._order = (epoch, sample_order(counts, epoch, self._seed, self._window_shards))
        shard, sample = self._order[1][index]
        started = time.perf_counter()
        found = self.sample(shard, sample)
        self.wait_s += time.perf_counter() - started
        return found

    def announce(self, positions: Sequence[int]) -> None:
        """See :class:`draftline.cache.source.SampleSource`; nothing is read ahead."""

    def close(self) -> None:
        """Forget the open shards."""
        self._open.clear()

    def sample(self, shard_index: int, index: int) -> CachedSample:
        """One sample by shard and place; errors as :meth:`at`."""
        head, data = self._shard(shard_index)
        records = {}
        for segment in head.segments(index):
            start, size = head.record_range(segment)
            records[segment] = data[start : start + size]
        return head.sample(index, records)

    def _shard(self, index: int) -> tuple[HiddenIndex, memoryview]:
        if index in self._open:
            self._open.move_to_end(index)
            return self._open[index]
        info = self.shards[index]
        key = f"{self._prefix}/{info.name}"
        data = self._store.get(key)
        check_bytes(data, info.size_bytes, info.sha256, key)
        self._open[index] = (HiddenIndex.of(data, origin=key), memoryview(data))
        while len(self._open) > self._window_shards:
            self._open.popitem(last=False)
        return self._open[index]
