"""A directory as an object store."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from draftline.errors import StorageError
from draftline.storage.base import ObjectInfo
from draftline.storage.files import (
    create_durably,
    is_absent,
    make_directories,
    remove_stale_temps,
    replace_durably,
    translated,
)
from draftline.storage.keys import TEMP_MARK, validate_key, validate_prefix
from draftline.storage.probe import probe

_COPY_CHUNK_BYTES = 1 << 20


class LocalStore:
    """Objects are files below one directory. Implements :class:`draftline.storage.base.ObjectStore`.

    A write fills a temporary file in the object's own folder, syncs it,
    renames it (``put``) or links it (``put_if_absent``) and syncs the folder:
    readers and crashes see the old object or the new one. A killed writer
    leaves at most a ``.draftline-tmp-*`` file, which no reader ever sees and
    which :meth:`create` removes once it is a day old.

    Unlike on S3, ``a`` and ``a/b`` cannot both be objects.

    Args:
        root: The directory; made absolute, created by the first write.
    """

    def __init__(self, root: Path) -> None:
        self._root = Path(os.path.abspath(root))

    def __repr__(self) -> str:
        return f"LocalStore({str(self._root)!r})"

    @property
    def uri(self) -> str:
        """The directory as an absolute path."""
        return str(self._root)

    def get(self, key: str) -> bytes:
        """See :meth:`ObjectStore.get`."""
        path = self._path(key)
        with translated(f"Cannot read {path}", reads_object=True):
            return path.read_bytes()

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """See :meth:`ObjectStore.get_range`."""
        path = self._path(key)
        if start < 0 or length < 0:
            raise StorageError(f"Cannot read {path}", got=f"start {start}, length {length}", expected="both >= 0")
        with translated(f"Cannot read {path}", reads_object=True), open(path, "rb") as handle:
            handle.seek(start)
            return handle.read(length)

    def put(self, key: str, data: bytes) -> None:
        """See :meth:`ObjectStore.put`."""
        path = self._path(key)
        with translated(f"Cannot write {path}"):
            replace_durably(path, lambda handle: handle.write(data))

    def put_if_absent(self, key: str, data: bytes) -> None:
        """See :meth:`ObjectStore.put_if_absent`."""
        path = self._path(key)
        with translated(f"Cannot write {path}"):
            create_durably(path, lambda handle: handle.write(data))

    def put_file(self, key: str, path: Path) -> None:
        """See :meth:`ObjectStore.put_file`."""
        target = self._path(key)
        with translated(f"Cannot read {path}"):
            source = open(path, "rb")  # noqa: SIM115 (the next line closes it)
        with source, translated(f"Cannot copy {path} to {target}"):
            replace_durably(target, lambda handle: _copy(source, handle))

    def get_file(self, key: str, path: Path) -> None:
        """See :meth:`ObjectStore.get_file`."""
        origin = self._path(key)
        with translated(f"Cannot read {origin}", reads_object=True):
            source = open(origin, "rb")  # noqa: SIM115 (the next line closes it)
        with source, translated(f"Cannot copy {origin} to {path}"):
            replace_durably(Path(os.path.abspath(path)), lambda handle: _copy(source, handle))

    def head(self, key: str) -> ObjectInfo | None:
        """See :meth:`ObjectStore.head`."""
        path = self._path(key)
        with translated(f"Cannot look at {path}"):
            try:
                status = path.stat()
            except OSError as error:
                if is_absent(error):
                    return None
                raise
        return ObjectInfo(key, status.st_size, status.st_mtime) if stat.S_ISREG(status.st_mode) else None

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See :meth:`ObjectStore.list`."""
        validate_prefix(prefix)
        folder, slash, _ = prefix.rpartition("/")
        return self._walk(folder + slash, prefix)

    def delete(self, key: str) -> None:
        """See :meth:`ObjectStore.delete`. Folders stay; they hold no objects and cost nothing."""
        path = self._path(key)
        with translated(f"Cannot delete {path}"):
            try:
                path.unlink()
            except OSError as error:
                if not is_absent(error):
                    raise

    def check(self) -> None:
        """See :meth:`ObjectStore.check`.

        When the directory does not exist yet, the check is done in the
        nearest folder above it that does: there the first write would create it.
        """
        base = self._root
        while not base.exists():
            base = base.parent
        if not base.is_dir():
            raise StorageError(
                f"The workspace {self._root} cannot be a directory",
                got=f"a file at {base}",
                remedy="Name another directory",
            )
        probe(LocalStore(base))

    def create(self) -> None:
        """Create the root directory; an existing one is fine and is rid of killed writers' old temporary files.

        Raises:
            AccessDenied, NoSpace, StorageError: it cannot be made.
        """
        with translated(f"Cannot create the directory {self._root}"):
            make_directories(self._root)
        remove_stale_temps(self._root)

    def _path(self, key: str) -> Path:
        return self._root.joinpath(validate_key(key))

    def _walk(self, folder: str, prefix: str) -> Iterator[ObjectInfo]:
        """Objects below ``folder`` (``""`` or ``"a/"``) that match, depth first.

        A folder is sorted as ``name/``: then the order of a depth-first walk is the order of the whole keys.
        """
        directory = self._root.joinpath(folder)
        with translated(f"Cannot list {directory}"):
            try:
                with os.scandir(directory) as entries:
                    found = {entry.name + "/" * entry.is_dir(): entry for entry in entries}
            except (FileNotFoundError, NotADirectoryError):
                return
        for name in sorted(found):
            key = folder + name
            if name.startswith(TEMP_MARK):
                continue
            if name.endswith("/"):
                if key.startswith(prefix) or prefix.startswith(key):
                    yield from self._walk(key, prefix)
            elif key.startswith(prefix):
                # A file deleted since the scan, a dangling link or a socket is no object.
                info = self._info(key, found[name])
                if info is not None:
                    yield info

    def _info(self, key: str, entry: os.DirEntry[str]) -> ObjectInfo | None:
        with translated(f"Cannot look at {entry.path}"):
            try:
                status = entry.stat()
            except FileNotFoundError:
                return None
        return ObjectInfo(key, status.st_size, status.st_mtime) if stat.S_ISREG(status.st_mode) else None


def _copy(source: BinaryIO, target: BinaryIO) -> None:
    shutil.copyfileobj(source, target, _COPY_CHUNK_BYTES)
