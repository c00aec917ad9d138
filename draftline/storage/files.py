"""Durable file primitives and the one table from ``OSError`` to our errors."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from draftline.errors import AccessDenied, NoSpace, ObjectExists, ObjectNotFound, StorageError
from draftline.storage.keys import TEMP_MARK

# EFBIG: the process's own file size limit (ulimit -f) is a quota, too.
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_DENIED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR})
_STALE_S = 24 * 3600.0
_NO_HARD_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})


def is_absent(error: OSError) -> bool:
    """Whether the error says that there is no file at the path (a folder is no file)."""
    return error.errno in _ABSENT


@contextmanager
def translated(what: str, *, reads_object: bool = False) -> Iterator[None]:
    """Turn an ``OSError`` of the body into a :class:`~draftline.errors.StorageError`.

    Args:
        what: What is being done, for example ``"Cannot write /data/ws/a.bin"``.
        reads_object: A missing file then means ObjectNotFound.

    Raises:
        NoSpace, AccessDenied, ObjectNotFound, StorageError: by ``errno``.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in _NO_SPACE:
            raise NoSpace(what, got=reason, remedy="Free some space or raise the quota, then run again") from error
        if error.errno in _DENIED:
            remedy = "Give this user the right to read and write there, or choose another directory"
            raise AccessDenied(what, got=reason, remedy=remedy) from error
        if reads_object and is_absent(error):
            raise ObjectNotFound(what, got=reason) from error
        raise StorageError(what, got=reason) from error


def fsync_directory(directory: Path) -> None:
    """Make the entries of a directory survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directories(directory: Path) -> None:
    """Create a directory with its parents, each entry durable; an existing one is fine.

    Raises:
        NotADirectoryError: something else has that name.
    """
    if directory.is_dir():
        return
    make_directories(directory.parent)
    try:
        directory.mkdir()
    except FileExistsError:
        # Another process was faster, which is fine, or a file has the name, which is not.
        if not directory.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "A file has the name of a folder", str(directory)) from None
    fsync_directory(directory.parent)


def replace_durably(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Create or replace ``path`` atomically and durably with what ``fill`` writes.

    Raises:
        OSError: nothing at ``path`` has changed.
    """
    temp = _write_temp(path.parent, fill)
    try:
        os.replace(temp, path)
    except OSError:
        temp.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def create_durably(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Create ``path`` atomically and durably; of several callers exactly one succeeds.

    ``link`` is the one call that creates a name with its content already in
    place and fails when the name is taken.

    Raises:
        ObjectExists: the name is taken.
        StorageError: the file system has no hard links.
        OSError: anything else; ``path`` was not created.
    """
    temp = _write_temp(path.parent, fill)
    try:
        os.link(temp, path)
    except FileExistsError as error:
        raise ObjectExists(f"{path} exists already") from error
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        raise StorageError(
            f"Cannot create {path} atomically",
            got=f"a file system without hard links ({error.strerror})",
            remedy="Put the workspace on a local disk, NFS or an s3:// endpoint",
        ) from error
    finally:
        temp.unlink(missing_ok=True)
    fsync_directory(path.parent)


def remove_stale_temps(root: Path) -> None:
    """Remove the temporary files that killed writers left below a folder more than a day ago.

    A courtesy: what cannot be looked at or removed stays.
    """
    oldest_s = time.time() - _STALE_S
    for directory, _, names in os.walk(root):
        for name in names:
            if not name.startswith(TEMP_MARK):
                continue
            with contextlib.suppress(OSError):
                path = os.path.join(directory, name)
                status = os.lstat(path)
                # A writer at work moves the time on with every chunk.
                if stat.S_ISREG(status.st_mode) and status.st_mtime < oldest_s:
                    os.unlink(path)


def _write_temp(directory: Path, fill: Callable[[BinaryIO], object]) -> Path:
    """A finished, synced file under a name of its own; whoever dies here leaves only that name behind."""
    make_directories(directory)
    temp = directory / f"{TEMP_MARK}{uuid.uuid4().hex}"
    descriptor = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with open(descriptor, "wb") as handle:
            fill(handle)
            handle.flush()
            os.fsync(handle.fileno())
    except BaseException:
        temp.unlink(missing_ok=True)
        raise
    return temp
