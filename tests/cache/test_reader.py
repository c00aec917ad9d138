"""Who reads what at every place of the stream, and what is read for it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from draftline.cache.reader import CacheReader, sample_order
from draftline.errors import FormatError, InputError, ObjectNotFound
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
    made = LocalStore(tmp_path)
    made.create()
    return made


class Counting:
    """A store that counts reads."""

    def __init__(self, store: LocalStore) -> None:
        self._store = store
        self.reads: Counter[str] = Counter()

    def get(self, key: str) -> bytes:
        """See ObjectStore."""
        self.reads[key] += 1
        return self._store.get(key)


@pytest.mark.parametrize("window", [1, 2, 16])
def test_reading_may_start_at_any_place(store: LocalStore, window: int) -> None:
    manifest = fill(store, (3, 1, 4))
    reader = CacheReader(store, "cache", manifest, "train", 5, window)
    stream = [reader.at(place).sample_id for place in range(24)]
    for epoch in range(3):
        assert sorted(stream[8 * epoch : 8 * epoch + 8]) == sorted({*stream[:8]})
    for place in range(24):
        fresh = CacheReader(store, "cache", manifest, "train", 5, window)
        assert [fresh.at(p).sample_id for p in range(place, 24)] == stream[place:]


@pytest.mark.parametrize("window", [1, 2])
def test_a_shard_is_opened_once_an_epoch(store: LocalStore, window: int) -> None:
    manifest = fill(store, (3, 1, 4, 2))
    counting = Counting(store)
    reader = CacheReader(counting, "cache", manifest, "train", 5, window)  # type: ignore[arg-type]
    for place in range(10):
        reader.at(place)
    assert set(counting.reads.values()) == {1} and len(counting.reads) == 4


def test_samples_are_their_byte_ranges(store: LocalStore) -> None:
    reader = CacheReader(store, "cache", fill(store, (3, 2)), "train", 0)
    sample = reader.sample(1, 1)
    expected, _ = numbered_samples(2, 100)[1]
    assert (sample.sample_id, sample.input_ids_T.tolist()) == ("1-1", expected)
    assert torch.equal(sample.taps_TLD, states(expected)[0])
    assert sample.input_ids_T.dtype == torch.int64 and sample.loss_mask_T.dtype == torch.bool


def test_damage_in_the_store_is_noticed_when_read(store: LocalStore) -> None:
    manifest = fill(store, (2,))
    name = f"cache/{manifest.shards[0].name}"
    data = bytearray(store.get(name))
    data[-1] ^= 1
    store.put(name, bytes(data))
    with pytest.raises(FormatError, match="only this shard is computed anew"):
        CacheReader(store, "cache", manifest, "train", 0).at(0)
    store.delete(name)
    with pytest.raises(ObjectNotFound):
        CacheReader(store, "cache", manifest, "train", 0).at(0)


def test_an_empty_split_is_an_input_error(store: LocalStore) -> None:
    with pytest.raises(InputError, match="'validation'"):
        CacheReader(store, "cache", fill(store, (1,)), "validation", 0)
