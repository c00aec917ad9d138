"""Workspace URIs: what can be written and how parts are joined."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from draftline.errors import SpecError, StorageError
from draftline.storage.keys import validate_key

_EXPECTED = "a directory, file:///absolute/directory or s3://bucket/prefix"
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://|(s3|file):", re.IGNORECASE)
_EXPECTED_BUCKET = "s3://bucket/prefix, the bucket in 3 to 63 letters, digits and single dots or dashes between them"
# Capitals and underscores: old buckets have them, new ones cannot. No server takes the shape of an IP address.
_BUCKET = re.compile(r"(?!.*(?:\.\.|\.-|-\.))(?!(?:\d+\.){3}\d+$)[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9]")


def parse_uri(uri: str) -> Path | tuple[str, str]:
    """What a workspace URI names.

    Returns:
        The directory, or the bucket and the prefix (``""`` for the whole bucket).

    Raises:
        SpecError: neither; the message says what to write.
    """
    match = _SCHEME.match(uri)
    if match is None:
        return _directory(uri, uri)
    scheme = (match[1] or match[2]).lower()
    if scheme == "file":
        parts = urlsplit(uri)
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/") or parts.query or parts.fragment:
            raise SpecError("The workspace is not a file URI", got=repr(uri), expected="file:///absolute/directory")
        return _directory(unquote(parts.path), uri)
    if scheme == "s3":
        return _bucket_and_prefix(uri)
    remedy = None
    if scheme in ("http", "https"):
        remedy = f"For an S3 server, write s3://bucket/prefix and set AWS_ENDPOINT_URL_S3={uri}"
    raise SpecError(f"A workspace cannot be a {scheme}:// URI", got=repr(uri), expected=_EXPECTED, remedy=remedy)


def join_uri(root: str, *parts: str) -> str:
    """The URI of an object or a folder below a workspace.

    Args:
        root: A workspace as :func:`draftline.storage.open_store` takes it.
        parts: Keys, each of one or more ``/``-separated names.

    Raises:
        StorageError: a part breaks the rules of :func:`draftline.storage.keys.validate_key`.
    """
    key = "/".join(validate_key(part) for part in parts)
    base = root.rstrip("/") or ("/" if root else "")
    if not key or not base:
        return base or key
    return base + ("" if base.endswith("/") else "/") + key


def _directory(path: str, uri: str) -> Path:
    if not path.strip() or "\0" in path:
        raise SpecError("The workspace is empty", got=repr(uri), expected=_EXPECTED)
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise SpecError("The workspace names an unknown home directory", got=repr(uri)) from error


def _bucket_and_prefix(uri: str) -> tuple[str, str]:
    rest = uri.partition(":")[2]
    bucket, _, prefix = rest.removeprefix("//").partition("/")
    if not rest.startswith("//") or _BUCKET.fullmatch(bucket) is None:
        raise SpecError("The workspace has no valid bucket", got=repr(uri), expected=_EXPECTED_BUCKET)
    prefix = prefix.removesuffix("/")
    try:
        return bucket, validate_key(prefix) if prefix else ""
    except StorageError as error:
        raise SpecError("The workspace has no valid prefix", got=repr(uri), expected="s3://bucket/prefix") from error
