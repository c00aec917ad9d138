"""Object storage: one interface over a local directory and any S3 endpoint.

:func:`open_store` is the way in; :class:`ObjectStore` is what it returns.
"""

from __future__ import annotations

from pathlib import Path

from draftline.storage.base import ObjectInfo, ObjectStore
from draftline.storage.local import LocalStore
from draftline.storage.uri import join_uri, parse_uri

__all__ = ["ObjectInfo", "ObjectStore", "join_uri", "open_store"]


def open_store(uri: str, *, create: bool = False) -> ObjectStore:
    """The store at a URI; contacts no server unless asked to create.

    Args:
        uri: A directory, ``file:///directory`` or ``s3://bucket/prefix``. S3
            credentials, region and endpoint come from boto3's usual places
            (``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL_S3``, ``~/.aws``, ...).
        create: Make the directory or the bucket when it is missing.

    Raises:
        SpecError: the URI, or the S3 endpoint in the environment, is malformed.
        StorageError: the place cannot be created, or boto3 is misconfigured.
    """
    place = parse_uri(uri)
    if isinstance(place, Path):
        local = LocalStore(place)
        if create:
            local.create()
        return local
    return _open_s3(*place, create=create)


def _open_s3(bucket: str, prefix: str, *, create: bool) -> ObjectStore:
    # boto3 takes a third of a second to import; a local workspace need not pay it.
    from draftline.storage.s3 import S3Store
    from draftline.storage.s3_client import build_client, build_session, resolve_config

    session = build_session()
    config = resolve_config(session, bucket, prefix)
    if create:
        from draftline.storage.provision import ensure_bucket

        ensure_bucket(config, session)
    return S3Store(config, build_client(config, session))
