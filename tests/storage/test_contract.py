"""What every store promises; runs on the local directory, on moto and on a real S3 server if one is named."""

from __future__ import annotations

import itertools
import os
import pickle
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import draftline.storage.s3
from draftline.errors import ObjectExists, ObjectNotFound, StorageError
from draftline.storage import ObjectInfo, ObjectStore

BAD_KEYS = (
    "",
    "/absolute",
    "a//b",
    "a/",
    "..",
    "a/../b",
    "./a",
    "a\\b",
    "a\nb",
    "a\0b",
    "a/.draftline-tmp-b",
    "\ud800",
    "k" * 901,
)


def _keys(store: ObjectStore, prefix: str = "") -> list[str]:
    return [info.key for info in store.list(prefix)]


@pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * 300], ids=["empty", "one", "76800"])
def test_bytes_come_back(store: ObjectStore, data: bytes) -> None:
    store.put("some/folder/object.bin", data)
    assert store.get("some/folder/object.bin") == data
    assert store.head("some/folder/object.bin") == ObjectInfo("some/folder/object.bin", len(data))


@pytest.mark.parametrize("key", ["a b+c%20&=?#.txt", "ünïcödé/λ.bin", "~x/'q'(1)!*", "..a/b..", "k" * 200])
def test_keys_come_back(store: ObjectStore, key: str) -> None:
    store.put(key, b"1")
    assert store.get(key) == b"1"
    assert _keys(store) == [key]


def test_put_replaces(store: ObjectStore) -> None:
    store.put("k", b"a longer first version")
    store.put("k", b"second")
    assert store.get("k") == b"second"
    assert list(store.list()) == [ObjectInfo("k", 6)]


def test_ranges(store: ObjectStore) -> None:
    store.put("digits", b"0123456789")
    ranges = {
        (0, 4): b"0123",
        (3, 1): b"3",
        (0, 10): b"0123456789",
        (8, 100): b"89",
        (10, 5): b"",
        (99, 5): b"",
        (4, 0): b"",
    }
    assert {bounds: store.get_range("digits", *bounds) for bounds in ranges} == ranges


def test_range_of_an_empty_object(store: ObjectStore) -> None:
    store.put("nothing", b"")
    assert store.get_range("nothing", 0, 10) == b""


@pytest.mark.parametrize(("start", "length"), [(-1, 4), (0, -1)])
def test_negative_ranges_are_refused(store: ObjectStore, start: int, length: int) -> None:
    store.put("digits", b"0123456789")
    with pytest.raises(StorageError, match="both >= 0"):
        store.get_range("digits", start, length)


def test_missing_objects(store: ObjectStore, tmp_path: Path) -> None:
    store.put("folder/object", b"1")
    for key in ("absent", "folder", "folder/absent", "folder/object/below"):
        with pytest.raises(ObjectNotFound, match=key):
            store.get(key)
        with pytest.raises(ObjectNotFound):
            store.get_range(key, 0, 1)
        with pytest.raises(ObjectNotFound):
            store.get_range(key, 0, 0)
        with pytest.raises(ObjectNotFound):
            store.get_file(key, tmp_path / "copy")
        assert store.head(key) is None
        store.delete(key)
    assert list(tmp_path.glob("copy*")) == []
    assert _keys(store) == ["folder/object"]


def test_delete(store: ObjectStore) -> None:
    store.put("a/1", b"1")
    store.put("a/2", b"2")
    store.delete("a/1")
    assert store.head("a/1") is None
    assert _keys(store) == ["a/2"]
    store.put_if_absent("a/1", b"again")
    assert store.get("a/1") == b"again"


def test_list_is_in_key_order_and_takes_any_prefix(store: ObjectStore) -> None:
    keys = ["a-b", "a.b", "a/b", "a/c/d", "a/c0", "a0", "aa", "b/a", "z", "é", "日"]
    for key in reversed(keys):
        store.put(key, b"1")
    assert _keys(store) == keys
    assert _keys(store, "a") == keys[:7]
    assert _keys(store, "a/") == ["a/b", "a/c/d", "a/c0"]
    assert _keys(store, "a/c") == ["a/c/d", "a/c0"]
    assert _keys(store, "a/c/") == ["a/c/d"]
    assert _keys(store, "b/a") == ["b/a"]
    assert _keys(store, "nothing/here") == []


def test_list_of_an_empty_store(store: ObjectStore) -> None:
    assert _keys(store) == []


def test_list_goes_beyond_one_page(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draftline.storage.s3, "LIST_PAGE_KEYS", 10)
    keys = [f"many/{number:05d}" for number in range(31)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: store.put(key, b"1"), keys))
    assert _keys(store, "many/") == keys


def test_put_if_absent_refuses_a_taken_key(store: ObjectStore) -> None:
    store.put_if_absent("manifest", b"first")
    for data in (b"second", b"first"):
        with pytest.raises(ObjectExists, match="manifest"):
            store.put_if_absent("manifest", data)
    assert store.get("manifest") == b"first"


@pytest.mark.parametrize("has_equal_content", [False, True])
def test_one_of_sixteen_racers_wins(store: ObjectStore, has_equal_content: bool) -> None:
    contents = [b"same" if has_equal_content else f"writer {number}".encode() for number in range(16)]
    for round_number in range(3):
        key = f"race/{round_number}"
        start = threading.Barrier(16)

        def compete(data: bytes, key: str = key, start: threading.Barrier = start) -> bytes | None:
            start.wait()
            try:
                store.put_if_absent(key, data)
            except ObjectExists:
                return None
            return data

        with ThreadPoolExecutor(16) as pool:
            winners = [data for data in pool.map(compete, contents) if data is not None]
        assert len(winners) == 1
        assert store.get(key) == winners[0]


def test_a_reader_never_sees_a_mix(store: ObjectStore) -> None:
    size_bytes = 300_000
    store.put("k", b"a" * size_bytes)
    is_done = threading.Event()

    def write() -> None:
        for number in range(30):
            store.put("k", b"ba"[number % 2 : number % 2 + 1] * size_bytes)
        is_done.set()

    seen = set()
    with ThreadPoolExecutor(1) as pool:
        writer = pool.submit(write)
        while not is_done.is_set() and not writer.done():
            data = store.get("k")
            assert len(data) == size_bytes
            assert data.count(data[:1]) == size_bytes
            seen.add(data[:1])
        writer.result()
    assert seen == {b"a", b"b"}


def test_bad_keys_are_refused_everywhere(store: ObjectStore, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"1")
    calls: list[Callable[[str], object]] = [
        store.get,
        lambda key: store.get_range(key, 0, 1),
        lambda key: store.put(key, b"1"),
        lambda key: store.put_if_absent(key, b"1"),
        lambda key: store.put_file(key, file),
        lambda key: store.get_file(key, file),
        store.head,
        store.delete,
    ]
    for key, call in itertools.product(BAD_KEYS, calls):
        with pytest.raises(StorageError, match="The object key has") as caught:
            call(key)
        assert type(caught.value) is StorageError
    assert file.read_bytes() == b"1"
    assert _keys(store) == []


def test_bad_prefixes_are_refused_at_once(store: ObjectStore) -> None:
    for prefix in ("/", "/a", "a//", "../", "a/../b"):
        with pytest.raises(StorageError, match="The key prefix has"):
            store.list(prefix)


@pytest.mark.parametrize("size_bytes", [0, 5, (16 << 20) - 1, (16 << 20) + 1, (40 << 20) + 7])
def test_files_come_back(store: ObjectStore, tmp_path: Path, size_bytes: int) -> None:
    source, copy = tmp_path / "source", tmp_path / "new" / "folder" / "copy"
    source.write_bytes(os.urandom(size_bytes))
    store.put_file("file", source)
    assert store.head("file") == ObjectInfo("file", size_bytes)
    store.get_file("file", copy)
    assert copy.read_bytes() == source.read_bytes()
    assert os.listdir(copy.parent) == ["copy"]
    tail = store.get_range("file", max(0, size_bytes - 3), 10)
    assert tail == source.read_bytes()[max(0, size_bytes - 3) :]


@pytest.mark.parametrize("size_bytes", [(16 << 20) - 1, 16 << 20, (40 << 20) + 7])
def test_large_bytes_come_back(store: ObjectStore, size_bytes: int) -> None:
    data = os.urandom(size_bytes)
    store.put("large", b"an older object")
    store.put("large", data)
    assert store.head("large") == ObjectInfo("large", size_bytes)
    assert store.get("large") == data
    assert store.get_range("large", size_bytes - 3, 10) == data[-3:]


def test_objects_know_when_they_were_written(store: ObjectStore) -> None:
    store.put("k", b"1")
    found = store.head("k")
    listed = next(iter(store.list()))
    assert found is not None
    # S3 servers tell whole seconds.
    assert abs(found.modified_s - time.time()) < 60
    assert abs(listed.modified_s - found.modified_s) < 1.5


def test_files_replace(store: ObjectStore, tmp_path: Path) -> None:
    source, copy = tmp_path / "source", tmp_path / "copy"
    source.write_bytes(b"new")
    copy.write_bytes(b"an older and longer copy")
    store.put("file", b"an older and longer object")
    store.put_file("file", source)
    store.get_file("file", copy)
    assert copy.read_bytes() == b"new"


def test_a_missing_local_file_is_no_missing_object(store: ObjectStore, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"Cannot read .*/nowhere") as caught:
        store.put_file("file", tmp_path / "nowhere")
    assert type(caught.value) is StorageError
    assert store.head("file") is None


def test_a_local_path_that_cannot_be_written(store: ObjectStore, tmp_path: Path) -> None:
    store.put("file", b"1")
    (tmp_path / "blocked").write_bytes(b"a file, not a folder")
    with pytest.raises(StorageError, match="blocked") as caught:
        store.get_file("file", tmp_path / "blocked" / "copy")
    assert type(caught.value) is StorageError


def test_check_leaves_nothing(store: ObjectStore) -> None:
    store.check()
    assert _keys(store) == []
    store.put("k", b"1")
    store.check()
    assert _keys(store) == ["k"]


def test_a_pickled_store_works_and_holds_no_secret(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put("k", b"1")
    pickled = pickle.dumps(store)
    secret = os.environ.get("AWS_SECRET_ACCESS_KEY", "no such thing")
    # moto's secret is "test", which is in the bucket's name as well; any other must not be found.
    assert secret == "test" or secret.encode() not in pickled
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    copy: ObjectStore = pickle.loads(pickled)
    assert copy.uri == store.uri
    assert copy.get("k") == b"1"
