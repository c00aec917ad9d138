"""Who reads what at every place of the stream, and what is read for it."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from draftline.cache.manifest import Manifest
from draftline.cache.reader import CachedSample, CacheReader, ReadOptions, sample_order
from draftline.errors import FormatError, InputError, ObjectNotFound, StoreUnreachable
from draftline.spec import CacheSpec
from draftline.storage.local import LocalStore
from tests.cache.made import fill, numbered_samples, states

SIZES = [(3, 1, 4, 1, 5), (1,), (2, 2), tuple(range(1, 9))]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("window", [1, 2, 16])
def test_an_epoch_holds_every_sample_once(sizes: tuple[int, ...], window: int) -> None:
    everything = {(shard, i) for shard, size in enumerate(sizes) for i in range(size)}
    for epoch in range(4):
        order = sample_order(sizes, epoch, 7, window)
        assert Counter(order) == Counter(everything)
        assert order == sample_order(sizes, epoch, 7, window)
    if sum(sizes) > 6:
        assert sample_order(sizes, 0, 7, window) != sample_order(sizes, 1, 7, window)
        assert sample_order(sizes, 0, 7, window) != sample_order(sizes, 0, 8, window)


def test_a_window_bounds_the_shards_that_are_mixed() -> None:
    order = sample_order([3] * 6, 0, 0, 2)
    for start in range(0, 18, 6):
        assert len({shard for shard, _ in order[start : start + 6]}) == 2


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    made = LocalStore(tmp_path / "workspace")
    made.create()
    return made


class Watched:
    """A store that notes what is read, and can be slow or broken."""

    def __init__(self, store: LocalStore, delay_s: float = 0.0) -> None:
        self._store = store
        self._delay_s = delay_s
        self.whole: Counter[str] = Counter()
        self.ranges: list[tuple[str, int, int]] = []
        self.num_failures = 0

    @property
    def num_bytes(self) -> int:
        """Read by ranges."""
        return sum(length for _, _, length in self.ranges)

    def get(self, key: str) -> bytes:
        """See ObjectStore."""
        self._trouble()
        self.whole[key] += 1
        return self._store.get(key)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """See ObjectStore."""
        self._trouble()
        self.ranges.append((key, start, length))
        return self._store.get_range(key, start, length)

    def _trouble(self) -> None:
        time.sleep(self._delay_s)
        if self.num_failures > 0:
            self.num_failures -= 1
            raise StoreUnreachable("Cannot read", got="503")


def reader_of(
    store: object, manifest: Manifest, share: float = 1.0, window: int = 16, **changes: object
) -> CacheReader:
    """A reader of the training split with some fields of its spec changed."""
    spec = CacheSpec.model_validate(changes)
    options = ReadOptions(spec, share, window)
    return CacheReader(store, "cache", manifest, "train", 5, options)  # type: ignore[arg-type]


RANGES = {"reader_memory_bytes": 1000}
"""So little memory that nothing is read whole."""


def same(a: CachedSample, b: CachedSample) -> bool:
    return a.sample_id == b.sample_id and all(
        torch.equal(getattr(a, name), getattr(b, name))
        for name in ("input_ids_T", "loss_mask_T", "taps_TLD", "last_hidden_TD", "log_normaliser_T")
    )


@pytest.mark.parametrize("window", [1, 2, 16])
def test_reading_may_start_at_any_place(store: LocalStore, window: int) -> None:
    manifest = fill(store, (3, 1, 4))
    reader = reader_of(store, manifest, window=window)
    stream = [reader.at(place).sample_id for place in range(24)]
    order = [f"{s}-{i}" for epoch in range(3) for s, i in sample_order((3, 1, 4), epoch, 5, window)]
    assert stream == order
    for place in range(24):
        fresh = reader_of(store, manifest, window=window)
        assert [fresh.at(p).sample_id for p in range(place, 24)] == stream[place:]


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("is_announced", [False, True])
def test_a_shard_is_opened_once_an_epoch(store: LocalStore, window: int, is_announced: bool) -> None:
    watched = Watched(store)
    reader = reader_of(watched, fill(store, (3, 1, 4, 2)), window=window)
    for place in range(0, 10, 2):
        if is_announced:
            reader.announce(range(place, place + 2))
        reader.at(place)
        reader.at(place + 1)
    reader.close()
    opened = {f"cache/train-{number:05d}.safetensors" for number in range(4)}
    # Announcements open the next window's shards, too: here those of the next epoch, which are these again.
    assert set(watched.whole) == opened and not watched.ranges
    assert set(watched.whole.values()) == {1}


@pytest.mark.parametrize("codec", ["bf16", "fp8", "int4"])
def test_whole_or_by_ranges_announced_or_not_the_samples_are_the_same(store: LocalStore, codec: str) -> None:
    manifest = fill(store, (3, 7, 4), codec)
    plain = reader_of(store, manifest, prefetch_samples=0)
    expected = [plain.at(place) for place in range(28)]
    for share, changes in ((1.0, {}), (0.1, {}), (1.0, RANGES)):
        for ahead in (1, 5, 40):
            reader = reader_of(store, manifest, share, window=2, **changes)
            expected_here = reader_of(store, manifest, window=2)
            for first in range(0, 28, ahead):
                reader.announce(range(first, min(first + ahead, 28)))
                for place in range(first, min(first + ahead, 28)):
                    assert same(reader.at(place), expected_here.at(place))
            reader.close()
    assert sorted(s.sample_id for s in expected[:14]) == sorted(s.sample_id for s in expected[14:])


def test_samples_are_their_byte_ranges(store: LocalStore) -> None:
    reader = reader_of(store, fill(store, (3, 2)))
    sample = reader.sample(1, 1)
    expected, _ = numbered_samples(2, 100)[1]
    assert (sample.sample_id, sample.input_ids_T.tolist()) == ("1-1", expected)
    assert torch.equal(sample.taps_TLD, states(expected)[0])
    assert sample.input_ids_T.dtype == torch.int64 and sample.loss_mask_T.dtype == torch.bool


def test_a_worker_that_wants_little_reads_little(store: LocalStore) -> None:
    manifest = fill(store, (40,), "bf16")
    info = manifest.shards[0]
    watched = Watched(store)
    # A request counts like a megabyte; these shards are small, so that even one sample in forty is read whole ...
    reader = reader_of(watched, manifest, 1 / 40)
    assert reader.at(0) and watched.whole and not watched.ranges
    # ... unless memory forbids it.
    watched = Watched(store)
    reader = reader_of(watched, manifest, 1 / 40, **RANGES)
    first = reader.at(0)
    assert not watched.whole and watched.ranges[0] == (f"cache/{info.name}", 0, info.head_bytes)
    opening_and_own = info.head_bytes + 3 * len(first.input_ids_T) * 2 * 96 + 100 * 4 * 96
    assert watched.num_bytes <= opening_and_own < info.size_bytes


@pytest.mark.parametrize(
    ("share", "size_bytes", "is_whole"),
    [(1.0, 1 << 30, True), (0.01, 1 << 30, False), (0.5, 1 << 30, False), (0.9, 10 << 20, True)],
)
def test_the_cheaper_way_is_taken(store: LocalStore, share: float, size_bytes: int, is_whole: bool) -> None:
    """A hundred samples a shard; reading half of a gigabyte costs less than all of it, of ten megabytes more."""
    manifest = fill(store, (1,))
    large = replace(manifest.shards[0], size_bytes=size_bytes, num_samples=100)
    reader = reader_of(store, replace(manifest, shards=(large,)), share)
    assert reader._reads_whole(0) == is_whole


def test_what_is_shared_is_read_once_by_ranges(store: LocalStore) -> None:
    manifest = fill(store, (20,))
    watched = Watched(store)
    reader = reader_of(watched, manifest, reader_memory_bytes=120_000)
    assert manifest.shards[0].size_bytes > 90_000
    for place in range(20):
        reader.at(place)
    assert not watched.whole
    assert len(watched.ranges) == len(set(watched.ranges)) <= 1 + 1 + 20
    assert watched.num_bytes <= manifest.shards[0].size_bytes + 20 * (64 << 10)


def test_memory_stays_within_its_bound(store: LocalStore) -> None:
    manifest = fill(store, (9, 9, 9, 9, 9, 9))
    largest = max(shard.size_bytes for shard in manifest.shards)
    for bound, window in ((6 * largest, 1), (3 * largest, 1), (largest, 2)):
        reader = reader_of(store, manifest, window=window, reader_memory_bytes=bound, prefetch_samples=7)
        for place in range(54):
            reader.announce(range(place, place + 10))
            assert len(reader._ahead) <= 7
            reader.at(place)
            assert 0 < reader.held_bytes <= bound
        reader.close()
        assert reader.held_bytes == 0


def test_the_next_window_is_opened_while_this_one_is_used(store: LocalStore) -> None:
    watched = Watched(store)
    reader = reader_of(watched, fill(store, (4, 4, 4, 4)), window=2)
    for place in range(8):
        reader.announce([place])
        reader.at(place)
    reader.close()
    assert len(watched.whole) == 4


def test_reading_ahead_hides_the_wait(store: LocalStore) -> None:
    manifest = fill(store, (8, 8))
    waits = []
    for is_announced in (False, True):
        reader = reader_of(Watched(store, delay_s=0.03), manifest, **RANGES)
        for place in range(16):
            if is_announced:
                reader.announce(range(place, place + 6))
            reader.at(place)
            time.sleep(0.02)
        waits.append(reader.wait_s)
        reader.close()
    assert waits[0] > 16 * 0.03 and waits[1] < waits[0] / 2


def test_what_is_no_longer_announced_is_forgotten(store: LocalStore) -> None:
    reader = reader_of(store, fill(store, (20,)), prefetch_samples=4)
    reader.announce(range(10, 14))
    reader.announce([0])
    assert [*reader._ahead, *reader._queue] == [10, 11, 12, 13, 0]
    reader.announce([1])
    assert [*reader._ahead, *reader._queue] == [0, 1]
    assert reader.at(0).sample_id and list(reader._ahead) == [1]
    reader.close()


def test_a_failure_ahead_of_time_is_tried_again_when_it_matters(store: LocalStore) -> None:
    watched = Watched(store)
    reader = reader_of(watched, fill(store, (3,)))
    watched.num_failures = 1
    reader.announce([0])
    assert reader.at(0).sample_id
    reader.close()
    watched.num_failures = 1000
    with pytest.raises(StoreUnreachable):
        reader.at(1)
    watched.num_failures = 0
    assert reader.at(1).sample_id
    reader.close()


def test_damage_in_the_store_is_noticed_when_read(store: LocalStore) -> None:
    manifest = fill(store, (2,))
    name = f"cache/{manifest.shards[0].name}"
    data = bytearray(store.get(name))
    data[-1] ^= 1
    store.put(name, bytes(data))
    with pytest.raises(FormatError, match="only this shard is computed anew"):
        reader_of(store, manifest).at(0)
    store.delete(name)
    with pytest.raises(ObjectNotFound):
        reader_of(store, manifest).at(0)


@pytest.mark.parametrize("is_announced", [False, True])
def test_damage_is_noticed_in_single_records(store: LocalStore, is_announced: bool) -> None:
    """Every byte of the file in turn: some sample is refused, and no sample comes back changed."""
    manifest = fill(store, (3,))
    info = manifest.shards[0]
    name = f"cache/{info.name}"
    data = store.get(name)
    good = {s.sample_id: s for s in map(reader_of(store, manifest).at, range(3))}
    for place in [*range(0, len(data), 997), len(data) - 1]:
        damaged = bytearray(data)
        damaged[place] ^= 4
        store.put(name, bytes(damaged))
        reader, num_refused = reader_of(store, manifest, **RANGES), 0
        if is_announced:
            reader.announce(range(3))
        for position in range(3):
            try:
                sample = reader.at(position)
                assert same(sample, good[sample.sample_id])
            except FormatError:
                num_refused += 1
        assert num_refused >= 1
        reader.close()
    store.put(name, data[:-1])
    reader = reader_of(store, manifest, **RANGES)
    with pytest.raises(FormatError, match="is damaged"):
        [reader.at(position) for position in range(3)]


@pytest.mark.parametrize("changes", [{}, RANGES], ids=["whole", "ranges"])
def test_a_local_cache_spares_the_store_and_is_not_trusted(
    store: LocalStore, tmp_path: Path, changes: dict[str, object]
) -> None:
    manifest, folder = fill(store, (4, 4)), tmp_path / "local"
    local = {**changes, "local_cache_bytes": 1 << 30, "local_cache_dir": str(folder)}
    expected = [reader_of(store, manifest).at(place) for place in range(8)]

    def read() -> Watched:
        watched = Watched(store)
        reader = reader_of(watched, manifest, **local)
        assert all(same(reader.at(place), expected[place]) for place in range(8))
        return watched

    first = read()
    assert first.whole or first.ranges
    again = read()
    assert not again.whole and not again.ranges
    parts = sorted(folder.glob("*.part"))
    parts[0].write_bytes(parts[0].read_bytes()[:-1] + b"?")
    parts[1].write_bytes(b"")
    repaired = read()
    assert 1 <= len(repaired.ranges) + sum(repaired.whole.values()) <= 2, "neighbours may travel together"
    again = read()
    assert not again.whole and not again.ranges


def test_an_empty_split_is_an_input_error(store: LocalStore) -> None:
    with pytest.raises(InputError, match="'validation'"):
        CacheReader(store, "cache", fill(store, (1,)), "validation", 0)
