"""The local directory: crashes, full disks, rights, foreign files."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from draftline.errors import AccessDenied, NoSpace, ObjectExists, ObjectNotFound, StorageError
from draftline.storage import ObjectInfo, open_store
from draftline.storage.files import translated

SIZE_BYTES = 3_000_000

WRITER = """
import sys
from draftline.storage import open_store

store = open_store(sys.argv[1])
for number in range(1_000_000):
    store.put("replaced", bytes([number % 256]) * {size})
    store.put_if_absent(f"created/{{number:07d}}", bytes([number % 256]) * {size})
    print(number, flush=True)
"""

FULL_DISK = """
import resource, sys
from pathlib import Path
from draftline.errors import NoSpace
from draftline.storage import open_store

store = open_store(sys.argv[1])
big = Path(sys.argv[1] + ".big")
big.write_bytes(b"x" * 300_000)
store.put("kept", b"old")
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for write in (
    lambda: store.put("kept", b"x" * 300_000),
    lambda: store.put_if_absent("new", b"x" * 300_000),
    lambda: store.put_file("kept", big),
):
    try:
        write()
    except NoSpace as error:
        print(error)
"""


def _start(code: str, root: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code, str(root)], stdout=subprocess.PIPE, text=True)


def test_a_killed_writer_leaves_no_half_object(tmp_path: Path) -> None:
    num_cut_short = 0
    # Most of a writer's time is spent inside a write: that 30 kills all fall between two writes does not happen.
    for attempt in range(30):
        root = tmp_path / str(attempt)
        store = open_store(str(root))
        with _start(WRITER.format(size=SIZE_BYTES), root) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            # A write takes some milliseconds; these delays fall on different moments of it.
            time.sleep(0.0023 * (attempt % 8))
            writer.send_signal(signal.SIGKILL)
            num_acknowledged = 1 + len(writer.stdout.readlines())
        infos = {info.key: info.size_bytes for info in store.list()}
        assert set(infos.values()) == {SIZE_BYTES}
        for key in infos:
            data = store.get(key)
            assert data.count(data[:1]) == SIZE_BYTES
        assert len(infos) - 1 in (num_acknowledged, num_acknowledged + 1)
        num_cut_short += bool(list(root.rglob(".draftline-tmp-*")))
        # The next writer is not disturbed by what the killed one left.
        store.put("replaced", b"next")
        store.put_if_absent(f"created/{num_acknowledged + 5:07d}", b"next")
        assert store.get("replaced") == b"next"
        if num_cut_short >= 4:
            return
    pytest.fail("hardly a writer was killed in the middle of a write: the test has lost its point")


def test_stale_temporary_files_are_invisible(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.put("a/b", b"1")
    (tmp_path / ".draftline-tmp-0").write_bytes(b"half")
    (tmp_path / "a" / ".draftline-tmp-1").write_bytes(b"half")
    assert list(store.list()) == list(store.list("a")) == [ObjectInfo("a/b", 1)]
    with pytest.raises(StorageError, match="unfinished files"):
        store.get("a/.draftline-tmp-1")


def test_create_removes_the_temporary_files_of_a_day_ago(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.put("a/b", b"1")
    old, new = tmp_path / "a" / ".draftline-tmp-0", tmp_path / "a" / ".draftline-tmp-1"
    folder = tmp_path / ".draftline-tmp-folder"
    folder.mkdir()
    day_ago_s = time.time() - 24 * 3600
    for path in (old, new):
        path.write_bytes(b"half")
    for path, time_s in ((old, day_ago_s - 60), (new, day_ago_s + 600), (tmp_path / "a" / "b", 0), (folder, 0)):
        os.utime(path, (time_s, time_s))
    open_store(str(tmp_path))
    assert old.exists()
    open_store(str(tmp_path), create=True)
    assert not old.exists() and new.exists() and folder.exists()
    assert store.get("a/b") == b"1"


def test_a_finished_write_leaves_no_temporary_file(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.put("a", b"1")
    store.put("a", b"2")
    store.put_if_absent("b", b"1")
    with pytest.raises(ObjectExists):
        store.put_if_absent("b", b"1")
    store.put_file("c", tmp_path / "b")
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "c"]


def test_a_full_disk_is_told_and_harms_nothing(tmp_path: Path) -> None:
    root = tmp_path / "ws"
    with _start(FULL_DISK, root) as writer:
        output, _ = writer.communicate(timeout=60)
    assert writer.returncode == 0
    lines = output.splitlines()
    assert len(lines) == 3
    assert all("Free some space or raise the quota" in line and str(root) in line for line in lines)
    assert open_store(str(root)).get("kept") == b"old"
    assert os.listdir(root) == ["kept"]


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (errno.ENOSPC, NoSpace),
        (errno.EDQUOT, NoSpace),
        (errno.EFBIG, NoSpace),
        (errno.EACCES, AccessDenied),
        (errno.EPERM, AccessDenied),
        (errno.EROFS, AccessDenied),
        (errno.EIO, StorageError),
        (errno.ENAMETOOLONG, StorageError),
        (errno.ENOENT, StorageError),
    ],
)
def test_the_error_table(number: int, error: type[StorageError]) -> None:
    with (
        pytest.raises(error, match=f"Cannot write it; got {os.strerror(number)}") as caught,
        translated("Cannot write it"),
    ):
        raise OSError(number, os.strerror(number))
    assert type(caught.value) is error


def test_a_missing_file_is_a_missing_object_only_when_read() -> None:
    with pytest.raises(ObjectNotFound), translated("Cannot read it", reads_object=True):
        raise FileNotFoundError(errno.ENOENT, "no")


def test_a_place_without_write_permission() -> None:
    # The kernel's own tree: nobody, not even root, makes files there.
    store = open_store("/sys/kernel/draftline")
    uses: list[Callable[[], object]] = [
        store.check,
        lambda: store.put("k", b"1"),
        lambda: open_store("/sys/kernel/draftline", create=True),
    ]
    for use in uses:
        with pytest.raises(AccessDenied, match="/sys/kernel"):
            use()


def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: object, target: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    store = open_store(str(tmp_path))
    with pytest.raises(StorageError, match=r"without hard links.*local disk") as caught:
        store.check()
    assert type(caught.value) is StorageError
    assert os.listdir(tmp_path) == []


def test_check_of_a_directory_that_does_not_exist_yet(tmp_path: Path) -> None:
    open_store(str(tmp_path / "a" / "b")).check()
    assert os.listdir(tmp_path) == []


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "taken").write_bytes(b"1")
    for uri in (tmp_path / "taken", tmp_path / "taken" / "below"):
        with pytest.raises(StorageError, match="Name another directory"):
            open_store(str(uri)).check()
        with pytest.raises(StorageError, match="Cannot create the directory"):
            open_store(str(uri), create=True)


def test_an_object_and_a_folder_cannot_share_a_name(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.put("a/b", b"1")
    writes: list[Callable[[], None]] = [lambda: store.put("a", b"2"), lambda: store.put("a/b/c", b"2")]
    for write in writes:
        with pytest.raises(StorageError, match="Cannot write") as caught:
            write()
        assert type(caught.value) is StorageError
    assert [info.key for info in store.list()] == ["a/b"]


def test_what_is_no_regular_file_is_no_object(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.put("a", b"1")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert [info.key for info in store.list()] == ["a"]
    assert store.head("fifo") is store.head("dangling") is store.head("empty") is None
