"""What a shard says of itself: the metadata of its safetensors header, read without tensors. See FORMAT.md."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from draftline.errors import FormatError
from draftline.storage.base import ObjectStore

FIRST_READ_BYTES = 64 << 10
"""Holds the header of an ordinary shard, so that one request is enough."""

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000
"""The limit of safetensors itself."""


@dataclass(frozen=True)
class ShardHeader:
    """A shard's own account of what it holds.

    Attributes:
        version: Of the shard format.
        kind: ``tokens`` or ``hidden-states``.
        target: Fingerprint of the target.
        codec: Of the hidden states, ``""`` for tokens.
    """

    version: int
    kind: str
    target: str
    codec: str


def header_size(first: bytes) -> int:
    """Bytes up to the end of the header, from a file's first eight or more.

    Raises:
        FormatError: no safetensors file begins like this.
    """
    length = int.from_bytes(first[:_LENGTH_BYTES], "little")
    if len(first) < _LENGTH_BYTES or not 2 <= length <= _MAX_HEADER_BYTES:
        raise FormatError("this is no safetensors file", got=f"a header of {length} bytes")
    return _LENGTH_BYTES + length


def parse_header(data: bytes) -> ShardHeader | None:
    """The header out of a file's beginning that holds all of it.

    Returns:
        ``None`` for an intact safetensors file that Draftline did not write.

    Raises:
        FormatError: not a safetensors file, or a damaged or incomplete header.
    """
    end = header_size(data)
    if len(data) < end:
        raise FormatError("the header is cut short", got=f"{len(data)} bytes", expected=f"{end} bytes")
    try:
        metadata: Mapping[str, str] = json.loads(data[_LENGTH_BYTES:end]).get("__metadata__", {})
        if "draftline" not in metadata:
            return None
        document: Mapping[str, Any] = json.loads(metadata["draftline"])
        return ShardHeader(
            int(document["version"]), str(document["kind"]), str(document["target"]), str(document.get("codec", ""))
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"the header is damaged ({type(error).__name__}: {error})") from None


def read_header(store: ObjectStore, key: str) -> ShardHeader | None:
    """The header of a stored shard as :func:`parse_header` gives it, by one or two range requests.

    Raises:
        FormatError: as :func:`parse_header`.
        StorageError: it cannot be read.
    """
    data = store.get_range(key, 0, FIRST_READ_BYTES)
    end = header_size(data)
    if len(data) == FIRST_READ_BYTES < end:
        data += store.get_range(key, len(data), end - len(data))
    return parse_header(data)
