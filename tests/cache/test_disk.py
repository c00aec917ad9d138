"""The local disk cache: bounded, shared by processes, never trusted, never fatal."""

from __future__ import annotations

import logging
import multiprocessing
import os
import resource
from pathlib import Path

import pytest

from draftline.cache.disk import DiskCache


def names(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.part")}


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_what_was_put_is_there_for_the_next_process(tmp_path: Path) -> None:
    DiskCache(tmp_path / "new" / "folder", 100).put("a", b"content")
    again = DiskCache(tmp_path / "new" / "folder", 100)
    assert again.get("a") == b"content" and again.get("b") is None
    again.discard("a")
    again.discard("a")
    assert again.get("a") is None


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 30)
    for age, name in enumerate(("a", "b", "c")):
        cache.put(name, bytes(10))
        os.utime(tmp_path / f"{name}.part", (1000 + age, 1000 + age))
    assert cache.get("a") is not None
    cache.put("d", bytes(10))
    assert names(tmp_path) == {"a", "c", "d"}
    cache.put("e", bytes(25))
    assert names(tmp_path) == {"e"}


def test_what_is_larger_than_the_bound_is_not_stored(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 30)
    cache.put("a", bytes(30))
    cache.put("b", bytes(31))
    assert names(tmp_path) == {"a"} and size(tmp_path) == 30


def test_a_killed_writers_rest_is_cleared_and_strangers_are_not(tmp_path: Path) -> None:
    (tmp_path / ".writing-0123").write_bytes(bytes(50))
    (tmp_path / "notes.txt").write_bytes(bytes(50))
    DiskCache(tmp_path, 30).put("a", bytes(10))
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "a.part", "notes.txt"}


def hammer(folder: Path, worker: int) -> None:
    cache = DiskCache(folder, 1000)
    for number in range(60):
        name = f"{(worker * 7 + number) % 23}"
        content = cache.get(name)
        assert content is None or content == name.encode() * 50, content
        cache.put(name, name.encode() * 50)
    assert not cache.is_off


def test_processes_share_a_folder_and_keep_its_bound_together(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=hammer, args=(tmp_path, worker)) for worker in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert 500 < size(tmp_path) <= 1000


def test_a_disk_that_fails_turns_it_off_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = DiskCache(tmp_path, 1000)
    cache.put("a", b"kept")

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    with caplog.at_level(logging.WARNING), monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        cache.put("b", b"lost")
        cache.put("c", b"lost")
    assert cache.is_off and cache.get("a") is None
    assert [record.getMessage().count("No space left on device") for record in caplog.records] == [1]
    assert names(tmp_path) == {"a"} and not list(tmp_path.glob(".writing-*"))


def write_beyond_the_quota(folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    cache = DiskCache(folder, 1 << 20)
    cache.put("small", bytes(4096))
    assert not cache.is_off
    cache.put("large", bytes(8192))
    assert cache.is_off


def test_a_real_quota_is_met_without_an_error(tmp_path: Path) -> None:
    worker = multiprocessing.get_context("spawn").Process(target=write_beyond_the_quota, args=(tmp_path,))
    worker.start()
    worker.join(60)
    assert worker.exitcode == 0
    assert names(tmp_path) == {"small"} and not list(tmp_path.glob(".writing-*"))


def test_a_folder_that_cannot_be_made_turns_it_off(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    cache = DiskCache(tmp_path / "file" / "folder", 1000)
    cache.put("a", b"x")
    assert cache.is_off and cache.get("a") is None
