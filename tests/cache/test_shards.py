"""The shard format: exact bytes, exact refusals, and who reads what at every place of the stream."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import save as save_safetensors

from draftline.cache.reader import CacheReader, sample_order
from draftline.cache.shards import Manifest, ShardInfo, decode_shard, encode_shard, shard_name
from draftline.errors import FormatError, InputError, ObjectNotFound
from draftline.storage.local import LocalStore

TENSORS = {
    "input_ids": torch.tensor([5, 6, 7], dtype=torch.int32),
    "loss_mask": torch.tensor([0, 1, 1], dtype=torch.uint8),
    "cu_seqlens": torch.tensor([0, 1, 3]),
}
METADATA = {"kind": "tokens", "ids": ["a/0", "b/0"], "target": "f" * 8}


def test_golden_bytes() -> None:
    """The whole small shard; if this differs, every cache in the world is read anew: raise FORMAT_VERSION."""
    data = encode_shard(TENSORS, METADATA)
    header_length = int.from_bytes(data[:8], "little")
    assert json.loads(data[8 : 8 + header_length]) == {
        "__metadata__": {"draftline": '{"ids":["a/0","b/0"],"kind":"tokens","target":"ffffffff","version":1}'},
        "cu_seqlens": {"dtype": "I64", "shape": [3], "data_offsets": [0, 24]},
        "input_ids": {"dtype": "I32", "shape": [3], "data_offsets": [24, 36]},
        "loss_mask": {"dtype": "U8", "shape": [3], "data_offsets": [36, 39]},
    }
    assert data[8 + header_length :].hex() == (
        "000000000000000001000000000000000300000000000000" + "050000000600000007000000" + "000101"
    )


def test_equal_content_gives_equal_bytes_whatever_the_order() -> None:
    backwards = dict(reversed(TENSORS.items()))
    assert encode_shard(backwards, dict(reversed(METADATA.items()))) == encode_shard(TENSORS, METADATA)


def test_round_trip() -> None:
    data = encode_shard(TENSORS, METADATA)
    shard = decode_shard(data, origin="x", expected=ShardInfo.of("x", "train", 2, 3, data))
    assert shard.metadata == {**METADATA, "version": 1}
    assert all(torch.equal(shard.tensors[name], value) for name, value in TENSORS.items())
    assert list(shard.ids) == ["a/0", "b/0"]
    assert [shard.bounds(i) for i in range(2)] == [(0, 1), (1, 3)]


def test_every_cut_and_every_flipped_byte_is_refused() -> None:
    data = encode_shard(TENSORS, METADATA)
    info = ShardInfo.of("x", "train", 2, 3, data)
    for length in range(len(data)):
        with pytest.raises(FormatError, match="the-shard is truncated"):
            decode_shard(data[:length], origin="the-shard", expected=info)
    for place in range(len(data)):
        flipped = bytearray(data)
        flipped[place] ^= 0x10
        with pytest.raises(FormatError, match="the-shard is damaged"):
            decode_shard(bytes(flipped), origin="the-shard", expected=info)
    with pytest.raises(FormatError, match="is truncated"):
        decode_shard(data + b"\0", origin="x", expected=info)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GGUF" * 40,
        b"\x80\x04\x95pickle" * 9,
        save_safetensors({"a": torch.zeros(2)}),
        save_safetensors({"a": torch.zeros(2)}, {"draftline": "no json"}),
        save_safetensors({"a": torch.zeros(2)}, {"draftline": "3"}),
        save_safetensors({"a": torch.zeros(2)}, {"draftline": "{}"}),
    ],
    ids=["empty", "gguf", "pickle", "no metadata", "no json", "no object", "no version"],
)
def test_foreign_files_are_refused(data: bytes) -> None:
    with pytest.raises(FormatError, match="not a Draftline shard"):
        decode_shard(data, origin="x")


def test_newer_files_are_refused() -> None:
    newer = save_safetensors(TENSORS, {"draftline": json.dumps({**METADATA, "version": 2})})
    with pytest.raises(FormatError, match="Upgrade Draftline"):
        decode_shard(newer, origin="x")


MANIFEST = Manifest(
    "hidden-states",
    "f",
    (ShardInfo("train-00000.safetensors", "train", 2, 3, 9, "ab"), ShardInfo("v", "validation", 1, 2, 8, "cd")),
    "bf16",
    (1, 4),
    64,
)


def test_manifest_round_trip_and_splits() -> None:
    document = json.loads(json.dumps(MANIFEST.to_json()))
    assert Manifest.from_json(document, kind="hidden-states") == MANIFEST
    assert Manifest.from_json({**document, "counts": "counts.json"}, kind="hidden-states") == MANIFEST
    assert [s.name for s in MANIFEST.of_split("validation")] == ["v"]
    assert MANIFEST.of_split("calibration") == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "does not fit"),
        ({"kind": "tokens"}, "does not fit"),
        ({"shards": None}, "damaged"),
        ({"shards": [{"name": "x"}]}, "damaged"),
        ({"tap_ids": 3}, "damaged"),
    ],
)
def test_foreign_and_damaged_manifests_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        Manifest.from_json({**MANIFEST.to_json(), **changes}, kind="hidden-states")
    with pytest.raises(FormatError, match="damaged"):
        Manifest.from_json({}, kind="hidden-states")


def test_shard_names_sort_as_their_numbers() -> None:
    names = [shard_name("train", number) for number in (0, 2, 10, 99999)]
    assert names == sorted(names) and names[1] == "train-00002.safetensors"


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


def fill(store: LocalStore, sizes: tuple[int, ...]) -> Manifest:
    infos = []
    for number, size in enumerate(sizes):
        lengths = torch.arange(1, size + 1)
        total = int(lengths.sum())
        data = encode_shard(
            {
                "input_ids": torch.arange(total, dtype=torch.int32) + 100 * number,
                "loss_mask": torch.ones(total, dtype=torch.uint8),
                "cu_seqlens": torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]),
                "taps": torch.zeros(total, 1, 2),
                "last_hidden": torch.zeros(total, 2),
                "log_normaliser": torch.zeros(total),
            },
            {"kind": "hidden-states", "ids": [f"{number}-{i}" for i in range(size)], "target": "t"},
        )
        store.put(f"cache/{shard_name('train', number)}", data)
        infos.append(ShardInfo.of(shard_name("train", number), "train", size, total, data))
    return Manifest("hidden-states", "t", tuple(infos), "fp32", (0,), 2)


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
    assert (sample.sample_id, sample.input_ids_T.tolist()) == ("1-1", [101, 102])
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
