"""Samples captured on the way are those of the cache, in the same order, for every number of readers."""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch

from draftline.cache.manifest import Manifest, ShardInfo, shard_name
from draftline.cache.order import sample_order
from draftline.cache.reader import CacheReader, ReadOptions
from draftline.cache.sample import CachedSample
from draftline.cache.schedule import CaptureSchedule
from draftline.cache.shards import decode_shard
from draftline.cache.stream import StreamOrder, StreamSource
from draftline.capture.capture import capture_shard
from draftline.errors import InputError, ObjectNotFound
from draftline.storage.local import LocalStore
from draftline.target.load import Target
from tests.cache.caches import TAPS, samples
from tests.servers.tiny_target import toy_target
from tests.training.cases import token_shard

SEED, WINDOW = 5, 2
COUNTS = (3, 1, 0, 2, 4)


class Captures:
    """Captures on demand and ahead, in this thread: a twin of the hub without Ray.

    Attributes:
        num_captures: Captures of each shard so far.
        most_in_flight: The most shards held together.
        broken: Shards whose capture fails.
    """

    def __init__(self, target: Target, codec: str, *, num_readers: int, max_held: int) -> None:
        self.tokens = [token_shard(samples(count, number), target.fingerprint) for number, count in enumerate(COUNTS)]
        self.target, self.codec = target, codec
        self.num_captures: Counter[int] = Counter()
        self.most_in_flight = 0
        self.broken: set[int] = set()
        self._order = StreamOrder(COUNTS, SEED, WINDOW)
        self._schedule = CaptureSchedule(self._order.shards, num_readers=num_readers, max_held=max_held)
        self._data: dict[int, bytes] = {}
        self._lock = threading.Lock()

    def fetch(self, reader: int, window: int, shard: int) -> memoryview:
        with self._lock:
            while not self._schedule.ask(reader, window, shard):
                self._work()
                if shard in self.broken:
                    raise ObjectNotFound(f"no tokens of shard {shard}")
            self._work()
            return memoryview(self._data[shard])

    def leave(self, reader: int) -> None:
        self._schedule.leave(reader)
        self._work()

    @property
    def held(self) -> frozenset[int]:
        return self._schedule.held

    def _work(self) -> None:
        for over in self._schedule.drop():
            del self._data[over]
        while (shard := self._schedule.next_capture()) is not None:
            self.most_in_flight = max(self.most_in_flight, self._schedule.num_in_flight)
            self.num_captures[shard] += 1
            if shard in self.broken:
                self._schedule.failed(shard)
                continue
            tokens = decode_shard(self.tokens[shard], origin="tokens")
            self._data[shard] = capture_shard(self.target, tokens, TAPS, self.codec)
            self._schedule.captured(shard)


@dataclasses.dataclass
class Feed:
    """One reader's view."""

    captures: Captures
    reader: int

    def fetch(self, window: int, shard: int) -> memoryview:
        return self.captures.fetch(self.reader, window, shard)

    def leave(self) -> None:
        self.captures.leave(self.reader)


def infos(captures: Captures) -> list[ShardInfo]:
    return [
        ShardInfo.of(shard_name("train", number), "train", COUNTS[number], 1, data)
        for number, data in enumerate(captures.tokens)
    ]


def make(
    codec: str = "bf16", *, num_readers: int = 1, max_held: int = 3, keep_samples: int = 0
) -> tuple[Captures, list[StreamSource]]:
    captures = Captures(toy_target(), codec, num_readers=num_readers, max_held=max_held)
    sources = [
        StreamSource(Feed(captures, reader), infos(captures), SEED, keep_samples=keep_samples, window_shards=WINDOW)
        for reader in range(num_readers)
    ]
    return captures, sources


def stored(captures: Captures, folder: Path) -> CacheReader:
    """A cache of the same token shards."""
    store = LocalStore(folder)
    entries = []
    for info, tokens in zip(infos(captures), captures.tokens, strict=True):
        if info.num_samples == 0:
            entries.append(info)
            continue
        shard = decode_shard(tokens, origin="tokens")
        data = capture_shard(captures.target, shard, TAPS, captures.codec)
        store.put(f"cache/{info.name}", data)
        entries.append(ShardInfo.of(info.name, "train", info.num_samples, len(shard.tensors["input_ids"]), data))
    manifest = Manifest("hidden-states", captures.target.fingerprint, tuple(entries), captures.codec, TAPS, 16)
    return CacheReader(store, "cache", manifest, "train", SEED, ReadOptions(window_shards=WINDOW))


def assert_equal(one: CachedSample, other: CachedSample) -> None:
    for field in dataclasses.fields(CachedSample):
        left, right = getattr(one, field.name), getattr(other, field.name)
        if isinstance(left, torch.Tensor):
            assert left.dtype == right.dtype and torch.equal(left, right), field.name
        else:
            assert left == right


@pytest.mark.parametrize("codec", ["fp32", "bf16", "fp8", "int4"])
def test_the_samples_are_the_caches_in_the_same_order(codec: str, tmp_path: Path) -> None:
    captures, (source,) = make(codec)
    reader = stored(captures, tmp_path)
    assert source.num_samples == reader.num_samples == sum(COUNTS)
    for position in range(3 * source.num_samples):
        assert_equal(source.at(position), reader.at(position))
    assert source.wait_s > 0


@pytest.mark.parametrize("window_shards", [1, 2, 3, 5, 16])
def test_the_order_is_the_readers_and_windows_hold_it(window_shards: int) -> None:
    order = StreamOrder(COUNTS, SEED, window_shards)
    for epoch in (0, 1, 7):
        expected = sample_order(COUNTS, epoch, SEED, window_shards)
        first = epoch * order.num_samples
        places = [order.place(first + index) for index in range(order.num_samples)]
        assert [(shard, sample) for _, shard, sample in places] == expected
        assert [window for window, _, _ in places] == sorted(window for window, _, _ in places)
        for window in range(epoch * order.num_windows, (epoch + 1) * order.num_windows):
            assert order.shards(window) == tuple(dict.fromkeys(shard for w, shard, _ in places if w == window))
            assert len(order.shards(window)) <= window_shards


@pytest.mark.parametrize("num_readers", [1, 2, 3])
def test_readers_share_each_capture_and_few_shards_are_held(num_readers: int) -> None:
    """As in training: a step's samples are shared out, and everybody ends a step before anybody starts the next."""
    captures, sources = make(num_readers=num_readers)
    epochs, per_step = 4, 6
    for first in range(0, epochs * sum(COUNTS), per_step):
        for reader, source in enumerate(sources):
            share = per_step // num_readers
            for position in range(first + reader * share, first + (reader + 1) * share):
                source.at(position)
    shards = [shard for shard, count in enumerate(COUNTS) if count]
    # What is captured ahead of the end may come on top.
    assert all(captures.num_captures[shard] <= epochs + 1 for shard in shards)
    # A step may lie across two windows; what is captured ahead comes on top.
    assert captures.most_in_flight <= 2 * WINDOW + 3


def test_a_reader_may_start_anywhere(tmp_path: Path) -> None:
    captures, _ = make()
    reader = stored(captures, tmp_path)
    for start in range(0, 2 * sum(COUNTS), 3):
        _, (source,) = make()
        assert_equal(source.at(start), reader.at(start))
        assert_equal(source.at(0), reader.at(0))


def test_what_is_read_again_and_again_is_captured_once(tmp_path: Path) -> None:
    captures, sources = make(num_readers=2, max_held=0, keep_samples=4)
    reader = stored(captures, tmp_path)
    positions = [[0, 3], [6, 9]]
    for _ in range(3):
        for source, mine in zip(sources, positions, strict=True):
            for position in mine:
                assert_equal(source.at(position), reader.at(position))
    needed = {StreamOrder(COUNTS, SEED, WINDOW).place(p)[1] for mine in positions for p in mine}
    assert captures.num_captures == dict.fromkeys(needed, 1)
    assert captures.held == frozenset(), "nobody needs a shard any more"


def test_a_closed_source_holds_nothing() -> None:
    captures, (source,) = make()
    source.at(0)
    assert captures.held
    source.close()
    assert captures.held == frozenset()
    source.close()


def test_a_failed_capture_is_told_and_tried_again_when_asked_again(tmp_path: Path) -> None:
    captures, (source,) = make()
    shard = StreamOrder(COUNTS, SEED, WINDOW).place(0)[1]
    captures.broken.add(shard)
    for _ in range(2):
        with pytest.raises(ObjectNotFound, match=f"no tokens of shard {shard}"):
            source.at(0)
    captures.broken.clear()
    assert_equal(source.at(0), stored(captures, tmp_path).at(0))


def test_no_samples_are_told() -> None:
    captures, _ = make()
    with pytest.raises(InputError, match="no samples to capture"):
        StreamSource(Feed(captures, 0), [info for info in infos(captures) if info.num_samples == 0], SEED)
