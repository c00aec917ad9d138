"""Encode and decode shards; see FORMAT.md."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor

from draftline.cache.container import FORMAT_VERSIONS, RECORDS, Header, TensorEntry, read_header
from draftline.cache.manifest import Manifest as Manifest
from draftline.cache.manifest import ShardInfo as ShardInfo
from draftline.cache.manifest import shard_name as shard_name
from draftline.errors import FormatError

_DTYPES = {
    "U8": torch.uint8,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "I64": torch.int64,
}
_REMEDY = "Delete the shard and its step's result.json, then run again: only this shard is computed anew"


@dataclass(frozen=True)
class Shard:
    """A shard's metadata and tensors, as in FORMAT.md; records stay in the file."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @property
    def ids(self) -> Sequence[str]:
        """Sample ids."""
        ids: Sequence[str] = self.metadata["ids"]
        return ids

    def bounds(self, index: int) -> tuple[int, int]:
        """Token range of one sample."""
        cu = self.tensors["cu_seqlens"]
        return int(cu[index]), int(cu[index + 1])


def encode_shard(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> bytes:
    """Shard bytes; equal content gives equal bytes (one metadata key, sorted JSON).

    Args:
        tensors: On the CPU.
        metadata: With ``kind`` and ``ids``; the version is added.
    """
    versioned = {"version": FORMAT_VERSIONS[metadata["kind"]], **metadata}
    text = json.dumps(versioned, sort_keys=True, separators=(",", ":"))
    return save_safetensors({name: value.contiguous() for name, value in tensors.items()}, {"draftline": text})


def decode_shard(data: bytes | memoryview, *, origin: str, expected: ShardInfo | None = None) -> Shard:
    """Check and decode shard bytes.

    Args:
        data: The whole file.
        origin: Named in errors.
        expected: Manifest entry whose size and digest must match.

    Raises:
        FormatError: truncated, altered, foreign, or of an unknown format.
    """
    if expected is not None:
        check_bytes(data, expected.size_bytes, expected.sha256, origin)
    header = read_header(data, origin=origin)
    check_size(data, header.size_bytes, origin)
    return decode_head(data, header)


def decode_head(data: bytes | memoryview, header: Header) -> Shard:
    """The tensors before the records, from the file or its head."""
    tensors = {name: _tensor(data, entry) for name, entry in header.tensors.items() if name != RECORDS}
    return Shard(header.metadata, tensors)


def check_bytes(data: bytes | memoryview, size_bytes: int, sha256: str, origin: str) -> None:
    """Compare a shard, or a part of one, with what is known of it.

    Raises:
        FormatError: it has another length or another digest.
    """
    check_size(data, size_bytes, origin)
    digest = hashlib.sha256(data).hexdigest()
    if digest != sha256:
        raise FormatError(f"{origin} is damaged", got=f"sha256 {digest[:12]}", expected=sha256[:12], remedy=_REMEDY)


def check_size(data: bytes | memoryview, size_bytes: int, origin: str) -> None:
    """Compare a length; errors as :func:`check_bytes`."""
    if len(data) != size_bytes:
        raise FormatError(f"{origin} is truncated", got=f"{len(data)} bytes", expected=f"{size_bytes}", remedy=_REMEDY)


def _tensor(data: bytes | memoryview, entry: TensorEntry) -> Tensor:
    dtype = _DTYPES[entry.dtype]
    if entry.start == entry.end:
        return torch.empty(entry.shape, dtype=dtype)
    # A copy: torch wants memory that it may write to, and the file's bytes need not be aligned.
    return torch.frombuffer(bytearray(data[entry.start : entry.end]), dtype=dtype).reshape(entry.shape)
