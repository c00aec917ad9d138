"""Encode and decode shards; see FORMAT.md."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from draftline.cache.manifest import FORMAT_VERSION
from draftline.cache.manifest import Manifest as Manifest
from draftline.cache.manifest import ShardInfo as ShardInfo
from draftline.cache.manifest import shard_name as shard_name
from draftline.errors import FormatError

CODEC_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Shard:
    """A decoded shard; tensors as in FORMAT.md."""

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
    """Shard bytes; equal content gives equal bytes (one metadata key, sorted JSON)."""
    text = json.dumps({"version": FORMAT_VERSION, **metadata}, sort_keys=True, separators=(",", ":"))
    return save_safetensors({name: value.contiguous() for name, value in tensors.items()}, {"draftline": text})


def decode_shard(data: bytes, *, origin: str, expected: ShardInfo | None = None) -> Shard:
    """Check and decode shard bytes.

    Args:
        data: The whole file.
        origin: Named in errors.
        expected: Manifest entry whose size and digest must match.

    Raises:
        FormatError: truncated, altered, foreign, or of a newer format.
    """
    if expected is not None:
        _check_digest(data, origin, expected)
    try:
        tensors = load_safetensors(data)
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        metadata = json.loads(header["__metadata__"]["draftline"])
        version = metadata["version"]
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise FormatError(
            f"{origin} is not a Draftline shard ({error})", remedy="Delete it and run its step again"
        ) from None
    if version != FORMAT_VERSION:
        raise FormatError(
            f"{origin} has an unknown format", got=version, expected=str(FORMAT_VERSION), remedy="Upgrade Draftline"
        )
    return Shard(metadata, tensors)


def _check_digest(data: bytes, origin: str, expected: ShardInfo) -> None:
    remedy = "Delete the shard and its step's result.json, then run again: only this shard is computed anew"
    if len(data) != expected.size_bytes:
        raise FormatError(
            f"{origin} is truncated", got=f"{len(data)} bytes", expected=f"{expected.size_bytes}", remedy=remedy
        )
    digest = hashlib.sha256(data).hexdigest()
    if digest != expected.sha256:
        raise FormatError(
            f"{origin} is damaged", got=f"sha256 {digest[:12]}", expected=expected.sha256[:12], remedy=remedy
        )
