"""A bounded cache on this machine's disk, of parts of shards that were read before."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LOG = logging.getLogger(__name__)
_LOCK, _TEMP, _SUFFIX = ".lock", ".writing-", ".part"


class DiskCache:
    """Named bytes in one directory, at most so many in total; the least recently used go first.

    Several processes may share a directory. A file appears whole or not at
    all; writers take turns, so that together they keep the bound; readers take
    no lock. Content is not trusted: callers compare what they get with a
    digest, and call :meth:`discard` when it is not what they stored.

    It never fails: a disk that is full or read-only turns it off, with one
    warning, and reading goes on from the store.

    Args:
        directory: Created if need be. Only files of this cache's own names are ever touched.
        limit_bytes: Of all files together, whoever wrote them.
    """

    def __init__(self, directory: Path, limit_bytes: int) -> None:
        self._directory = directory
        self._limit_bytes = limit_bytes
        self._is_off = False

    @property
    def is_off(self) -> bool:
        """Whether the disk has failed."""
        return self._is_off

    def get(self, name: str) -> bytes | None:
        """What was stored under a name, or ``None``."""
        if self._is_off:
            return None
        path = self._path(name)
        try:
            data = path.read_bytes()
            os.utime(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._turn_off(error)
            return None
        return data

    def put(self, name: str, data: bytes | memoryview) -> None:
        """Store bytes, making room first; too large ones are not stored."""
        if self._is_off or len(data) > self._limit_bytes:
            return
        temp = self._directory / f"{_TEMP}{uuid.uuid4().hex}"
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            with self._locked():
                self._make_room(len(data))
                try:
                    temp.write_bytes(data)
                    temp.replace(self._path(name))
                finally:
                    temp.unlink(missing_ok=True)
        except OSError as error:
            self._turn_off(error)

    def discard(self, name: str) -> None:
        """Forget a name."""
        try:
            self._path(name).unlink(missing_ok=True)
        except OSError as error:
            self._turn_off(error)

    def _path(self, name: str) -> Path:
        assert re.fullmatch(r"[0-9a-z-]+", name), "names are digests and numbers"
        return self._directory / f"{name}{_SUFFIX}"

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self._directory / _LOCK, "w", encoding="ascii") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def _make_room(self, needed_bytes: int) -> None:
        """Whoever writes holds the lock, so an unfinished file belongs to a writer that was killed."""
        found: list[tuple[float, str, int]] = []
        with os.scandir(self._directory) as entries:
            for entry in entries:
                if entry.name.startswith(_TEMP):
                    os.unlink(entry.path)
                elif entry.name.endswith(_SUFFIX):
                    try:
                        status = entry.stat()
                    except FileNotFoundError:
                        continue
                    found.append((status.st_mtime, entry.path, status.st_size))
        total_bytes = sum(size for _, _, size in found)
        for _, path, size in sorted(found):
            if total_bytes + needed_bytes <= self._limit_bytes:
                break
            Path(path).unlink(missing_ok=True)
            total_bytes -= size

    def _turn_off(self, error: OSError) -> None:
        if not self._is_off:
            self._is_off = True
            _LOG.warning(
                "the local cache %s is off: %s. Shards are read from the store; free some space or choose another "
                "cache.local_cache_dir",
                self._directory,
                error.strerror or error,
            )
