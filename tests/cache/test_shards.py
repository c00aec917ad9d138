"""The shard format: exact bytes, exact refusals."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from safetensors.torch import save as save_safetensors

from draftline.cache.container import FORMAT_VERSION, read_header
from draftline.cache.shards import Manifest, ShardInfo, decode_shard, encode_shard, shard_name
from draftline.errors import FormatError
from tests.cache.made import make_shard, numbered_samples

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


def test_an_entry_knows_the_head_of_hidden_states_and_nothing_of_the_kind_for_tokens() -> None:
    data = make_shard(numbered_samples(3))
    info = ShardInfo.of("x", "train", 3, 48, data)
    header = read_header(data, origin="x")
    assert info.head_bytes == header.head_bytes == header.tensors["records"].start
    assert info.head_sha256 == hashlib.sha256(data[: info.head_bytes]).hexdigest()
    assert info.num_rows == header.metadata["num_rows"]
    assert ShardInfo(**info.to_json()) == info
    tokens = ShardInfo.of("x", "train", 2, 3, encode_shard(TENSORS, METADATA))
    assert set(tokens.to_json()) == {"name", "split", "num_samples", "num_tokens", "size_bytes", "sha256"}
    assert ShardInfo(**tokens.to_json()) == tokens


def test_a_file_longer_than_its_header_says_is_refused() -> None:
    with pytest.raises(FormatError, match="x is truncated"):
        decode_shard(encode_shard(TENSORS, METADATA) + b"\0", origin="x")


def test_manifests_have_the_version_of_their_kind() -> None:
    assert MANIFEST.format == MANIFEST.to_json()["format"] == FORMAT_VERSION
    assert Manifest("tokens", "f", ()).format == 1


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
        ({"format": 1}, "does not fit"),
        ({"format": 3}, "does not fit"),
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
