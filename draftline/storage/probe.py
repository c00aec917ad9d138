"""The life of one small object, as a proof that a store can do all that Draftline needs."""

from __future__ import annotations

import uuid

from draftline.errors import ObjectExists, StorageError
from draftline.storage.base import ObjectStore

_CONTENT = b"draftline was here"


def probe(store: ObjectStore) -> None:
    """Create an object conditionally, fail to create it again, read, list and delete it.

    Args:
        store: Any store; its key ``.draftline-check-<random>`` is used.

    Raises:
        StorageError: the store does not keep its promises, or the child that
            the failing operation raised.
    """
    key = f".draftline-check-{uuid.uuid4().hex[:12]}"
    store.put_if_absent(key, _CONTENT)
    try:
        _must_refuse_second_create(store, key)
        _must_read_back(store, key)
    finally:
        store.delete(key)


def _must_refuse_second_create(store: ObjectStore, key: str) -> None:
    try:
        store.put_if_absent(key, b"a second writer")
    except ObjectExists:
        return
    raise StorageError(
        f"{store.uri} does not honour create-if-absent",
        got="a second object under a key that was taken",
        expected="a refusal (HTTP 412 to 'If-None-Match: *')",
        remedy="Use a store with conditional writes: a local directory, AWS S3, MinIO, Ceph RGW",
    )


def _must_read_back(store: ObjectStore, key: str) -> None:
    content = store.get(key)
    if content != _CONTENT:
        raise StorageError(f"{store.uri} returned other bytes than were written", got=content, expected=str(_CONTENT))
    keys = [info.key for info in store.list(key)]
    if keys != [key]:
        raise StorageError(f"{store.uri} does not list what was written", got=keys, expected=str([key]))
