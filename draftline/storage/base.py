"""The one storage interface; its only atomic need is create-if-absent."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class ObjectInfo:
    """One stored object.

    Attributes:
        key: Key relative to the store's root, ``/``-separated.
        size_bytes: Length.
        modified_s: When it was last written, by the store's clock (Unix time);
            equal objects may differ in it.
    """

    key: str
    size_bytes: int
    modified_s: float = field(default=0.0, compare=False)


class ObjectStore(Protocol):
    """Objects under one root (a directory or an S3 prefix).

    Keys follow :func:`draftline.storage.keys.validate_key`. A reader never
    sees half an object. Errors are :class:`draftline.errors.StorageError` and
    its children, nothing else. Stores are safe for threads and pickle without
    secrets.
    """

    @property
    def uri(self) -> str:
        """The root, for :func:`draftline.storage.open_store` in any process; a directory comes back absolute."""
        ...

    def get(self, key: str) -> bytes:
        """The whole object. Raises ObjectNotFound."""
        ...

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Bytes ``[start, start + length)``; shorter, even empty, only past the end. Raises ObjectNotFound."""
        ...

    def put(self, key: str, data: bytes) -> None:
        """Create or replace the object, durably and atomically (multipart where large, its parts gone if it fails)."""
        ...

    def put_if_absent(self, key: str, data: bytes) -> None:
        """Create the object. Raises ObjectExists when the key is taken; of N racers one wins."""
        ...

    def put_file(self, key: str, path: Path) -> None:
        """Create or replace the object from a local file (multipart where large)."""
        ...

    def get_file(self, key: str, path: Path) -> None:
        """Copy the object to a local file atomically. Raises ObjectNotFound."""
        ...

    def head(self, key: str) -> ObjectInfo | None:
        """Size, or ``None`` when absent."""
        ...

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """All objects whose key starts with ``prefix``, in ascending key order."""
        ...

    def delete(self, key: str) -> None:
        """Remove the object; absent is fine."""
        ...

    def check(self) -> None:
        """Prove that the root can be written, read, listed and conditionally created; leaves nothing behind.

        Raises:
            StoreUnreachable, AccessDenied, NoSpace, StorageError: with a remedy.
        """
        ...
