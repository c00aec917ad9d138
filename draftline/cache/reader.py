"""Read cached samples in a deterministic, shuffled order, ahead of time and with bounded memory."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from draftline.cache.disk import DiskCache
from draftline.cache.fetch import REQUEST_BYTES, ByteBudget, OpenShard, ShardFetcher
from draftline.cache.manifest import Manifest, ShardInfo
from draftline.cache.order import WINDOW_SHARDS, Window, windows
from draftline.cache.order import sample_order as sample_order
from draftline.cache.sample import CachedSample as CachedSample
from draftline.cache_dir import default_cache_dir
from draftline.errors import InputError, StorageError
from draftline.spec import CacheSpec
from draftline.storage.base import ObjectStore


@dataclass(frozen=True)
class ReadOptions:
    """How a reader reads.

    Attributes:
        spec: Threads, memory and disk; changes no sample and no order.
        share: About which part of the stream this reader will be asked for: 1 / number of workers. Changes no sample
            and no order.
        window_shards: Shards whose samples are mixed; part of the order.
    """

    spec: CacheSpec = field(default_factory=CacheSpec)
    share: float = 1.0
    window_shards: int = WINDOW_SHARDS


@dataclass
class _Ahead:
    """A sample on its way.

    Attributes:
        future: The sample.
        generation: The last announcement that listed it.
    """

    future: Future[CachedSample]
    generation: int


class CacheReader:
    """Samples of one split by their place in an endless, shuffled stream. A ``SampleSource``.

    A shard is taken whole, once an epoch, where that costs less than the
    ranges of the samples that are wanted of it and two windows of whole shards
    fit in the memory allowed; else sample by sample. Either way every byte is
    compared with its digest before it is used.

    Memory: at most ``cache.reader_memory_bytes`` of encoded shards (or one, if
    a single one is larger), what ``cache.prefetch_threads`` are fetching, and
    ``cache.prefetch_samples`` decoded samples.

    Not safe for threads: one caller at a time.

    Args:
        store: The workspace.
        prefix: Folder of the hidden-states step.
        manifest: Its manifest.
        split: Which split.
        seed: Of the shuffle.
        options: How to read.

    Raises:
        InputError: the split is empty.
    """

    def __init__(
        self,
        store: ObjectStore,
        prefix: str,
        manifest: Manifest,
        split: str,
        seed: int,
        options: ReadOptions = ReadOptions(),
    ) -> None:
        self.shards: tuple[ShardInfo, ...] = manifest.of_split(split)
        self.num_samples = sum(s.num_samples for s in self.shards)
        if self.num_samples == 0:
            raise InputError(
                f"the cache has no {split!r} samples",
                remedy="Give more prompts, or raise the split's fraction in the spec",
            )
        self.wait_s = 0.0
        self._seed = seed
        self._options = options
        spec = options.spec
        self._fetcher = ShardFetcher(store, prefix, _disk_cache(spec))
        self._open: ByteBudget[OpenShard] = ByteBudget(spec.reader_memory_bytes - spec.reader_memory_bytes // 4)
        self._records: ByteBudget[bytes] = ByteBudget(spec.reader_memory_bytes // 4)
        self._fits = _two_windows_bytes(self.shards, options.window_shards) <= spec.reader_memory_bytes * 3 // 4
        self._windows: dict[int, list[Window]] = {}
        self._lock = Lock()
        self._opening: dict[int, Future[OpenShard]] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: OrderedDict[int, _Ahead] = OrderedDict()
        self._queue: OrderedDict[int, int] = OrderedDict()
        self._generation = 0

    @property
    def held_bytes(self) -> int:
        """Encoded bytes in memory."""
        return self._open.held_bytes + self._records.held_bytes

    def at(self, position: int) -> CachedSample:
        """The sample at a position of the stream; epoch = position // num_samples.

        Raises:
            FormatError: its shard is damaged.
            StorageError: its shard cannot be read.
        """
        started = time.perf_counter()
        self._queue.pop(position, None)
        ahead = self._ahead.pop(position, None)
        sample = None
        if ahead is not None:
            # The store may have recovered since: what failed ahead of time is tried once more.
            with suppress(StorageError):
                sample = ahead.future.result()
        if sample is None:
            sample = self.sample(*self._locate(position))
        self._fill()
        self.wait_s += time.perf_counter() - started
        return sample

    def announce(self, positions: Sequence[int]) -> None:
        """Start reading what comes next; see ``SampleSource``.

        Call it with everything that is to come soon, in order. A place that
        the two announcements after it do not list is forgotten.
        """
        if self._options.spec.prefetch_samples == 0 or not positions:
            return
        self._generation += 1
        for position in positions:
            if position in self._ahead:
                self._ahead[position].generation = self._generation
            else:
                self._queue[position] = self._generation
        oldest = self._generation - 1
        for position in [p for p, ahead in self._ahead.items() if ahead.generation < oldest]:
            self._ahead.pop(position).future.cancel()
        for position in [p for p, generation in self._queue.items() if generation < oldest]:
            del self._queue[position]
        self._fill()
        self._open_next_window(positions[-1])

    def sample(self, shard_index: int, place: int) -> CachedSample:
        """One sample by shard and place; errors as :meth:`at`."""
        return self._shard(shard_index).sample(place)

    def close(self) -> None:
        """Stop reading ahead and let go of what is held; the reader may be used again."""
        self._queue.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
        self._ahead.clear()
        self._open.clear()
        self._records.clear()

    # -- order --------------------------------------------------------------------------------------------------

    def _locate(self, position: int) -> tuple[int, int]:
        window, place = self._window(position)
        return window.samples[place]

    def _window(self, position: int) -> tuple[Window, int]:
        """The window that a position lies in, and its place there."""
        epoch, index = divmod(position, self.num_samples)
        for window in self._epoch(epoch):
            if index < window.start + len(window.samples):
                return window, index - window.start
        raise AssertionError("windows cover the epoch")

    def _epoch(self, epoch: int) -> list[Window]:
        if epoch not in self._windows:
            counts = [s.num_samples for s in self.shards]
            # Two epochs at most are in use: a step or an announcement may span a boundary.
            self._windows = {e: w for e, w in self._windows.items() if abs(e - epoch) <= 1}
            self._windows[epoch] = windows(counts, epoch, self._seed, self._options.window_shards)
        return self._windows[epoch]

    # -- reading ahead ------------------------------------------------------------------------------------------

    def _fill(self) -> None:
        """Submit what is queued, as far as there is room for decoded samples."""
        while self._queue and len(self._ahead) < self._options.spec.prefetch_samples:
            position, generation = self._queue.popitem(last=False)
            future = self._threads().submit(self.sample, *self._locate(position))
            self._ahead[position] = _Ahead(future, generation)

    def _open_next_window(self, position: int) -> None:
        """Open the next window's shards while this one is used up, so that its start brings no crowd of requests."""
        if not self._fits:
            return
        window, place = self._window(position)
        following, _ = self._window(position - place + len(window.samples))
        num_wanted = math.ceil(len(following.shards) * (place + 1) / len(window.samples))
        for shard in following.shards[:num_wanted]:
            if self._reads_whole(shard) and self._open.get(shard) is None and shard not in self._opening:
                self._threads().submit(self._shard, shard)

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._options.spec.prefetch_threads, "draftline-reader")
        return self._pool

    # -- shards -------------------------------------------------------------------------------------------------

    def _shard(self, index: int) -> OpenShard:
        """An open shard; of several threads that ask at once one fetches and the others wait for it."""
        with self._lock:
            held = self._open.get(index)
            if held is not None:
                return held
            waiting = self._opening.get(index)
            if waiting is None:
                mine: Future[OpenShard] = Future()
                self._opening[index] = mine
        if waiting is not None:
            return waiting.result()
        try:
            opened = self._fetch(index)
        except BaseException as error:
            with self._lock:
                del self._opening[index]
            mine.set_exception(error)
            raise
        with self._lock:
            self._open.put(index, opened, opened.size_bytes)
            del self._opening[index]
        mine.set_result(opened)
        return opened

    def _fetch(self, index: int) -> OpenShard:
        info = self.shards[index]
        if self._fits and self._reads_whole(index):
            head, whole = self._fetcher.whole(info)
            return OpenShard(info, head, whole, self._fetcher, self._records)
        return OpenShard(info, self._fetcher.head(info), None, self._fetcher, self._records)

    def _reads_whole(self, index: int) -> bool:
        """Whether one request for everything costs less than the head and the wanted samples one by one."""
        info, share = self.shards[index], self._options.share
        ranges_bytes = info.head_bytes + share * (info.size_bytes - info.head_bytes)
        num_ranges = 1 + share * info.num_samples
        return info.size_bytes + REQUEST_BYTES <= ranges_bytes + num_ranges * REQUEST_BYTES


def _two_windows_bytes(shards: Sequence[ShardInfo], window_shards: int) -> int:
    """Most that two windows can hold: while one is read, the next is opened."""
    return sum(sorted((s.size_bytes for s in shards), reverse=True)[: 2 * window_shards])


def _disk_cache(spec: CacheSpec) -> DiskCache | None:
    if spec.local_cache_bytes == 0:
        return None
    folder = Path(spec.local_cache_dir).expanduser() if spec.local_cache_dir else default_cache_dir() / "shards"
    return DiskCache(folder, spec.local_cache_bytes)
