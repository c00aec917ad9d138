"""The outer shape of a shard file, read without tensors: safetensors' header and our metadata in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from draftline.errors import FormatError

FORMAT_VERSION = 2
"""Of hidden-state shards and their manifests."""

FORMAT_VERSIONS: Mapping[str, int] = {"tokens": 1, "hidden-states": FORMAT_VERSION}
"""Of each kind of shard and of its manifest."""

RECORDS = "records"
"""The tensor that is last in a hidden-state shard; all before it is the *head*."""

_ITEM_BYTES = {"U8": 1, "BF16": 2, "I32": 4, "F32": 4, "I64": 8}
_MAX_HEADER_BYTES = 100 << 20


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies in the file; ``start`` and ``end`` count from the file's first byte."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """A shard's header.

    Attributes:
        metadata: Our JSON object; ``kind`` and ``version`` are checked.
        tensors: Entries by name, in the order of the file.
        size_bytes: Of the whole file.
    """

    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]
    size_bytes: int

    @property
    def head_bytes(self) -> int:
        """Bytes before the records; the whole file where there are none."""
        records = self.tensors.get(RECORDS)
        return self.size_bytes if records is None else records.start


def read_header(data: bytes | memoryview, *, origin: str, kind: str | None = None) -> Header:
    """Read the header from a file's first bytes.

    Args:
        data: The file, or as much of its beginning as holds the header.
        origin: Named in errors.
        kind: What is expected, if that matters.

    Raises:
        FormatError: foreign, damaged, of an unknown version or of another kind.
    """
    try:
        length = int.from_bytes(data[:8], "little")
        if len(data) < 8 or length > min(_MAX_HEADER_BYTES, len(data) - 8):
            raise ValueError("its header is cut off")
        document = json.loads(bytes(data[8 : 8 + length]))
        metadata = json.loads(document.pop("__metadata__")["draftline"])
        version, found_kind = metadata["version"], metadata["kind"]
        tensors = _entries(document, 8 + length)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(
            f"{origin} is not a Draftline shard ({error})", remedy="Delete it and run its step again"
        ) from None
    _check_version(found_kind, version, origin)
    if kind is not None and found_kind != kind:
        raise FormatError(f"{origin} is a shard of another kind", got=found_kind, expected=kind)
    ends = [entry.end for entry in tensors.values()]
    return Header(metadata, tensors, max(ends, default=8 + length))


def _entries(document: Mapping[str, Any], origin_bytes: int) -> dict[str, TensorEntry]:
    """Tensors in file order; they fill the file without gaps, as safetensors demands."""
    entries: dict[str, TensorEntry] = {}
    expected = origin_bytes
    for name, entry in sorted(document.items(), key=lambda item: tuple(item[1]["data_offsets"])):
        start, end = (origin_bytes + int(offset) for offset in entry["data_offsets"])
        shape = tuple(int(size) for size in entry["shape"])
        if start != expected or end - start != prod(shape) * _ITEM_BYTES[entry["dtype"]]:
            raise ValueError(f"tensor {name!r} does not fit its place")
        entries[name] = TensorEntry(entry["dtype"], shape, start, end)
        expected = end
    return entries


def _check_version(kind: object, version: object, origin: str) -> None:
    known = FORMAT_VERSIONS.get(kind) if isinstance(kind, str) else None
    if known is None or not isinstance(version, int):
        raise FormatError(
            f"{origin} is not a Draftline shard", got=f"kind {kind!r}", remedy="Delete it and run its step again"
        )
    if version > known:
        raise FormatError(
            f"{origin} has an unknown format", got=version, expected=f"at most {known}", remedy="Upgrade Draftline"
        )
    if version < known:
        raise FormatError(
            f"{origin} has an old format that is no longer read",
            got=version,
            expected=str(known),
            remedy=f"Run the {kind} step again: it writes a new cache under a new key, and leaves the old one alone",
        )
