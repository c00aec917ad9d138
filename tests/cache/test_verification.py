"""Damage of every kind is found and named, on every kind of store; whole caches are not complained about."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from draftline.cache import verification
from draftline.cache.catalogue import find_caches
from draftline.cache.header import parse_header
from draftline.cache.manifest import FORMAT_VERSION, Manifest, ShardInfo
from draftline.cache.verification import Check, Finding, check_shard, plan_checks, repair, run_checks
from draftline.errors import StorageError
from draftline.storage import ObjectStore, open_store
from draftline.storage.local import LocalStore
from tests.cache.caches import KEY, OTHER_KEY, keys, write_cache
from tests.servers.faulty_s3 import Fault, running_faulty_s3
from tests.servers.s3 import BUCKET, S3_SERVERS, S3Server, named_server

PREFIX = f"hidden-states/{KEY}"
SHARD = f"{PREFIX}/train-00001.safetensors"


def findings(store: ObjectStore) -> list[Finding]:
    checks, found = plan_checks(store, find_caches(store))
    return [*found, *run_checks(store, checks)]


def brief(store: ObjectStore) -> list[tuple[str, str]]:
    return [(finding.kind, finding.object) for finding in findings(store)]


def reversion(data: bytes, version: int) -> bytes:
    """The same shard, saying that it is of another format version."""
    old, new = f'\\"version\\":{FORMAT_VERSION}'.encode(), f'\\"version\\":{version}'.encode()
    assert data.count(old) == 1 and len(old) == len(new)
    return data.replace(old, new)


def test_whole_caches_are_whole(any_store: ObjectStore) -> None:
    write_cache(any_store)
    write_cache(any_store, OTHER_KEY, target_seed=1, is_finished=False)
    checks, found = plan_checks(any_store, find_caches(any_store))
    read: list[int] = []
    assert [*found, *run_checks(any_store, checks, read.append)] == []
    assert len(checks) == 8
    assert sum(read) == sum(check.expected.size_bytes for check in checks)


def test_an_empty_workspace_is_whole(any_store: ObjectStore) -> None:
    assert findings(any_store) == []


SAFETENSORS_OF_OTHERS = (lambda header: len(header).to_bytes(8, "little") + header)(
    b'{"weight":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'
) + b"abcd"

DAMAGES: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "cut": ("truncated", lambda data: data[:-1]),
    "cut to half": ("truncated", lambda data: data[: len(data) // 2]),
    "cut within the header": ("truncated", lambda data: data[:40]),
    "emptied": ("truncated", lambda data: b""),
    "grown": ("truncated", lambda data: data + b"x"),
    "last bit": ("flipped", lambda data: data[:-1] + bytes([data[-1] ^ 1])),
    "first bit": ("flipped", lambda data: bytes([data[0] ^ 1]) + data[1:]),
    "bit in the header": ("flipped", lambda data: data[:60] + bytes([data[60] ^ 128]) + data[61:]),
    "newer": ("newer", lambda data: reversion(data, FORMAT_VERSION + 1)),
    "safetensors of others": ("foreign", lambda data: SAFETENSORS_OF_OTHERS),
    "text": ("foreign", lambda data: b"this was a good place for my notes\n" * 20),
    "pickle": ("foreign", lambda data: b"\x80\x04\x95" + bytes(range(256)) * 3),
}


@pytest.mark.parametrize(("kind", "damage"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_shard_is_named(any_store: ObjectStore, kind: str, damage: Callable[[bytes], bytes]) -> None:
    write_cache(any_store)
    write_cache(any_store, OTHER_KEY)
    any_store.put(SHARD, damage(any_store.get(SHARD)))
    (finding,) = findings(any_store)
    assert (finding.kind, finding.object, finding.cache) == (kind, SHARD, KEY)
    assert finding.detail and finding.remedy


def test_a_missing_shard_is_named(any_store: ObjectStore) -> None:
    write_cache(any_store)
    any_store.delete(SHARD)
    (finding,) = findings(any_store)
    assert (finding.kind, finding.object) == ("missing", SHARD)
    assert "--repair" in finding.remedy


def test_a_shard_of_another_cache_is_a_stranger(any_store: ObjectStore) -> None:
    write_cache(any_store)
    write_cache(any_store, OTHER_KEY, target_seed=1)
    any_store.put(SHARD, any_store.get(f"hidden-states/{OTHER_KEY}/train-00001.safetensors"))
    (finding,) = findings(any_store)
    assert (finding.kind, finding.object) == ("foreign", SHARD)
    assert "a shard of target" in finding.detail


def test_shards_that_changed_places_are_named(any_store: ObjectStore) -> None:
    write_cache(any_store)
    first = f"{PREFIX}/train-00000.safetensors"
    one, other = any_store.get(first), any_store.get(SHARD)
    any_store.put(first, other)
    any_store.put(SHARD, one)
    assert {name for _, name in brief(any_store)} == {first, SHARD}


def test_objects_that_nobody_names_are_named(any_store: ObjectStore) -> None:
    write_cache(any_store)
    any_store.put(f"{PREFIX}/train-00009.safetensors", any_store.get(SHARD))
    any_store.put(f"{PREFIX}/train-00009.safetensors.json", b"{}")
    any_store.put(f"{PREFIX}/notes.txt", b"mine")
    assert brief(any_store) == [
        ("foreign", f"{PREFIX}/notes.txt"),
        ("leftover", f"{PREFIX}/train-00009.safetensors"),
        ("leftover", f"{PREFIX}/train-00009.safetensors.json"),
    ]


def test_missing_counts_are_named(any_store: ObjectStore) -> None:
    write_cache(any_store)
    any_store.delete(f"{PREFIX}/counts.json")
    assert brief(any_store) == [("missing", f"{PREFIX}/counts.json")]


def test_folders_that_are_no_caches_are_left_alone(any_store: ObjectStore) -> None:
    any_store.put("hidden-states/my-own/train-00000.safetensors", b"1")
    any_store.put("hidden-states/readme", b"1")
    any_store.put("tokens/0123456789abcdef0123/train-00000.safetensors", b"1")
    assert findings(any_store) == []


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda document: document["outputs"].update(format=FORMAT_VERSION + 1), "newer"),
        (lambda document: document.update(version=99), "newer"),
        (lambda document: document["outputs"].pop("shards"), "unreadable"),
        (lambda document: document["outputs"].update(kind="recipes"), "unreadable"),
    ],
    ids=["newer manifest", "newer result", "no shards", "another kind"],
)
def test_a_manifest_that_cannot_be_read_is_named(
    any_store: ObjectStore, change: Callable[[dict[str, dict[str, object]]], None], kind: str
) -> None:
    write_cache(any_store)
    document = json.loads(any_store.get(f"{PREFIX}/result.json"))
    change(document)
    any_store.put(f"{PREFIX}/result.json", json.dumps(document).encode())
    assert brief(any_store) == [(kind, f"{PREFIX}/result.json")]


def test_a_cut_manifest_is_named(any_store: ObjectStore) -> None:
    write_cache(any_store)
    any_store.put(f"{PREFIX}/result.json", any_store.get(f"{PREFIX}/result.json")[:100])
    assert brief(any_store) == [("unreadable", f"{PREFIX}/result.json")]


def test_damage_is_found_before_the_capture_is_finished(any_store: ObjectStore) -> None:
    write_cache(any_store, is_finished=False)
    data = any_store.get(SHARD)
    any_store.put(SHARD, data[:-1] + bytes([data[-1] ^ 1]))
    # What is being written has no entry yet, and what an entry names may be gone: both are captured when it goes on.
    any_store.put(f"{PREFIX}/train-00007.safetensors", data)
    any_store.delete(f"{PREFIX}/train-00002.safetensors")
    assert brief(any_store) == [("flipped", SHARD)]


def test_repair_removes_the_damaged_and_the_manifest_and_nothing_else(any_store: ObjectStore) -> None:
    write_cache(any_store)
    write_cache(any_store, OTHER_KEY)
    before = set(keys(any_store))
    any_store.put(SHARD, any_store.get(SHARD)[:-1])
    any_store.delete(f"{PREFIX}/train-00002.safetensors")
    any_store.put(f"{PREFIX}/train-00000.safetensors", b"this was a good place for my notes\n" * 20)
    any_store.put(f"{PREFIX}/notes.txt", b"mine")
    removed = repair(any_store, findings(any_store))
    assert removed == [
        f"{PREFIX}/result.json",
        f"{SHARD}.json",
        SHARD,
        f"{PREFIX}/train-00002.safetensors.json",
    ]
    assert set(keys(any_store)) == (before | {f"{PREFIX}/notes.txt"}) - {*removed, f"{PREFIX}/train-00002.safetensors"}


def test_a_large_shard_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path)
    monkeypatch.setattr(verification, "CHUNK_BYTES", 1 << 16)
    data = SAFETENSORS_OF_OTHERS + bytes(64 << 20)
    store.put("shard", data)
    info = ShardInfo("shard", "train", 1, 1, len(data), hashlib.sha256(data).hexdigest())
    check = Check(KEY, "shard", info, len(data), None)
    del data
    pieces: list[int] = []
    tracemalloc.start()
    try:
        finding = check_shard(store, check, pieces.append)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert finding is not None and finding.kind == "foreign"
    assert max(pieces) == 1 << 16 and sum(pieces) == check.expected.size_bytes
    assert peak_bytes < 2 << 20


@pytest.mark.parametrize("chunk_bytes", [8, 9, 100, 333])
def test_pieces_of_any_size_give_the_same_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    store = LocalStore(tmp_path)
    write_cache(store, layout={"train": (1,)})
    monkeypatch.setattr(verification, "CHUNK_BYTES", chunk_bytes)
    assert findings(store) == []
    path = f"{PREFIX}/train-00000.safetensors"
    store.put(path, reversion(store.get(path), FORMAT_VERSION + 1))
    assert brief(store) == [("newer", path)]


def test_a_header_says_what_the_shard_is(any_store: ObjectStore) -> None:
    manifest: Manifest = write_cache(any_store)
    header = parse_header(any_store.get(SHARD))
    assert header is not None
    assert (header.version, header.kind, header.target, header.codec) == (
        FORMAT_VERSION,
        "hidden-states",
        manifest.target,
        manifest.codec,
    )


@pytest.mark.parametrize(
    "fault",
    [Fault("status", 503, "SlowDown"), Fault("reset"), Fault("cut_body"), Fault("slow", pause_s=0.01)],
    ids=["503", "reset", "cut body", "slow"],
)
@pytest.mark.parametrize("server", S3_SERVERS)
def test_passing_faults_of_the_server_are_no_damage(
    server: str, moto_server: S3Server, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    """Every object's first GET meets the fault; the second does not. A lasting one is told as what it is."""
    behind = named_server(server, moto_server)
    behind.use(monkeypatch)
    uri = f"s3://{BUCKET}/faults-{fault.kind}-{uuid.uuid4().hex}"
    write_cache(open_store(uri, create=True))
    with running_faulty_s3(behind.endpoint_url) as proxy:
        S3Server(proxy.endpoint_url, behind.access_key, behind.secret_key).use(monkeypatch)
        met: set[str] = set()

        def first_get(method: str, path: str, query: str) -> Fault | None:
            if method != "GET" or "list-type" in query or path in met:
                return None
            met.add(path)
            return fault

        proxy.chosen = first_get
        store = open_store(uri)
        assert findings(store) == []
        assert len(met) == 5, "four shards and a manifest"
        proxy.chosen = lambda method, path, query: (
            Fault("status", 503, "SlowDown") if path.endswith("00001.safetensors") else None
        )
        with pytest.raises(StorageError, match=r"train-00001.safetensors; got HTTP 503"):
            findings(store)
