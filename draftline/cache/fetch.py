"""Checked bytes of shards: whole, or the head and single records by range requests."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from threading import Lock
from typing import Generic, TypeVar

from draftline.cache.disk import DiskCache
from draftline.cache.hidden import HiddenIndex
from draftline.cache.manifest import ShardInfo
from draftline.cache.sample import CachedSample
from draftline.cache.shards import check_bytes, check_size
from draftline.errors import FormatError
from draftline.storage.base import ObjectStore

REQUEST_BYTES = 1 << 20
"""What a request costs besides its bytes: about 10 ms of a connection that carries 100 MB/s."""

_MAX_GAP_BYTES = 64 << 10
"""Records that lie closer than this travel in one request."""

Value = TypeVar("Value")


class ByteBudget(Generic[Value]):
    """Values by key, of a bounded size together; the least recently used go first. Safe for threads.

    Args:
        limit_bytes: A single larger value is still kept, alone.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._values: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()
        self._held_bytes = 0
        self._lock = Lock()

    @property
    def held_bytes(self) -> int:
        """Size of all values."""
        return self._held_bytes

    def get(self, key: Hashable) -> Value | None:
        """The value, now the most recently used."""
        with self._lock:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key][0]

    def put(self, key: Hashable, value: Value, size_bytes: int) -> None:
        """Add a value and let go of the oldest ones beyond the bound."""
        with self._lock:
            if key in self._values:
                self._held_bytes -= self._values.pop(key)[1]
            self._values[key] = (value, size_bytes)
            self._held_bytes += size_bytes
            while self._held_bytes > self._limit_bytes and len(self._values) > 1:
                _, (_, freed) = self._values.popitem(last=False)
                self._held_bytes -= freed

    def clear(self) -> None:
        """Let go of everything."""
        with self._lock:
            self._values.clear()
            self._held_bytes = 0


class ShardFetcher:
    """Reads a cache's shards from its store, by way of a disk cache if there is one. Safe for threads.

    Args:
        store: The workspace.
        prefix: Folder of the hidden-states step.
        disk: Where parts that were read are kept.
    """

    def __init__(self, store: ObjectStore, prefix: str, disk: DiskCache | None = None) -> None:
        self._store = store
        self._prefix = prefix
        self._disk = disk

    def whole(self, info: ShardInfo) -> tuple[HiddenIndex, bytes]:
        """A shard, its head compared with the manifest and its records with the head.

        That costs a fraction of a sha256 over all of it, which ``draftline cache verify`` computes.

        Raises:
            FormatError: it is damaged.
            StorageError: it cannot be read.
        """

        def checked(data: bytes, origin: str) -> tuple[HiddenIndex, bytes]:
            check_size(data, info.size_bytes, origin)
            check_bytes(memoryview(data)[: info.head_bytes], info.head_bytes, info.head_sha256, origin)
            index = HiddenIndex.of(data, origin=origin)
            index.check_all(data)
            return index, data

        return self._fetched(info, info.sha256, lambda key: self._store.get(key), checked)

    def head(self, info: ShardInfo) -> HiddenIndex:
        """A shard's head; errors as :meth:`whole`."""

        def checked(data: bytes, origin: str) -> HiddenIndex:
            check_bytes(data, info.head_bytes, info.head_sha256, origin)
            return HiddenIndex.of(data, origin=origin)

        return self._fetched(
            info, f"{info.sha256}-head", lambda key: self._store.get_range(key, 0, info.head_bytes), checked
        )

    def records(self, info: ShardInfo, index: HiddenIndex, segments: Sequence[int]) -> dict[int, bytes]:
        """Some records of a shard, neighbours in one request; errors as :meth:`whole`."""
        found: dict[int, bytes] = {}
        missing = []
        for segment in segments:
            cached = self._from_disk(info, index, segment)
            if cached is None:
                missing.append(segment)
            else:
                found[segment] = cached
        for group in _neighbours(index, sorted(missing)):
            first, (last, last_size) = index.record_range(group[0])[0], index.record_range(group[-1])
            data = self._store.get_range(self.key(info), first, last + last_size - first)
            for segment in group:
                start, size = index.record_range(segment)
                record = data[start - first : start - first + size]
                index.check_record(segment, record)
                found[segment] = record
                if self._disk is not None:
                    self._disk.put(f"{info.sha256}-{segment}", record)
        return found

    def key(self, info: ShardInfo) -> str:
        """Of the shard in the store."""
        return f"{self._prefix}/{info.name}"

    def _fetched(
        self, info: ShardInfo, name: str, read: Callable[[str], bytes], checked: Callable[[bytes, str], Value]
    ) -> Value:
        """What ``checked`` makes of the bytes on disk, or of those that ``read`` brings from the store."""
        cached = self._disk.get(name) if self._disk is not None else None
        if self._disk is not None and cached is not None:
            try:
                return checked(cached, name)
            except FormatError:
                self._disk.discard(name)
        key = self.key(info)
        data = read(key)
        value = checked(data, key)
        if self._disk is not None:
            self._disk.put(name, data)
        return value

    def _from_disk(self, info: ShardInfo, index: HiddenIndex, segment: int) -> bytes | None:
        if self._disk is None:
            return None
        name = f"{info.sha256}-{segment}"
        record = self._disk.get(name)
        if record is not None:
            try:
                index.check_record(segment, record)
            except FormatError:
                self._disk.discard(name)
                return None
        return record


class OpenShard:
    """A shard that samples can be taken from.

    Args:
        info: Its entry.
        index: Its head.
        whole: All of it, or ``None`` to fetch records when they are asked for.
        fetcher: Fetches those.
        shared: Keeps the records that several samples read.
    """

    def __init__(
        self,
        info: ShardInfo,
        index: HiddenIndex,
        whole: bytes | None,
        fetcher: ShardFetcher,
        shared: ByteBudget[bytes],
    ) -> None:
        self._info = info
        self._index = index
        self._whole = memoryview(whole) if whole is not None else None
        self._fetcher = fetcher
        self._shared = shared

    @property
    def size_bytes(self) -> int:
        """What it holds in memory, about."""
        return self._info.head_bytes if self._whole is None else self._info.size_bytes

    def sample(self, place: int) -> CachedSample:
        """The sample at a place of the shard; errors as :meth:`ShardFetcher.whole`."""
        segments = self._index.segments(place)
        if self._whole is not None:
            ranges = {segment: self._index.record_range(segment) for segment in segments}
            views = {segment: self._whole[start : start + size] for segment, (start, size) in ranges.items()}
            return self._index.sample(place, views)
        records: dict[int, bytes | memoryview] = {}
        for segment in segments:
            held = self._shared.get((self._info.name, segment))
            if held is not None:
                records[segment] = held
        fetched = self._fetcher.records(self._info, self._index, [s for s in segments if s not in records])
        for segment, record in fetched.items():
            if self._index.is_shared[segment]:
                self._shared.put((self._info.name, segment), record, len(record))
        records.update(fetched)
        return self._index.sample(place, records)


def _neighbours(index: HiddenIndex, segments: Sequence[int]) -> list[list[int]]:
    """Ascending segments in groups that one request brings."""
    groups: list[list[int]] = []
    end = -_MAX_GAP_BYTES - 1
    for segment in segments:
        start, size = index.record_range(segment)
        if groups and start - end <= _MAX_GAP_BYTES:
            groups[-1].append(segment)
        else:
            groups.append([segment])
        end = start + size
    return groups
