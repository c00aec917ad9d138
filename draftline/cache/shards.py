"""Encode and decode shards; the manifest's entries. See FORMAT.md."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from draftline.errors import FormatError

FORMAT_VERSION = 1
CODEC_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class ShardInfo:
    """One manifest entry."""

    name: str
    split: str
    num_samples: int
    num_tokens: int
    size_bytes: int
    sha256: str

    def to_json(self) -> dict[str, Any]:
        """Plain fields."""
        return asdict(self)

    @classmethod
    def of(cls, name: str, split: str, num_samples: int, num_tokens: int, data: bytes) -> ShardInfo:
        """The entry of a shard with these bytes."""
        return cls(name, split, num_samples, num_tokens, len(data), hashlib.sha256(data).hexdigest())


@dataclass(frozen=True)
class Manifest:
    """A shard collection; ``outputs`` of its step."""

    kind: str
    target: str
    shards: tuple[ShardInfo, ...]
    codec: str = ""
    tap_ids: tuple[int, ...] = ()
    hidden_size: int = 0
    format: int = FORMAT_VERSION

    def of_split(self, split: str) -> tuple[ShardInfo, ...]:
        """Shards of one split, in order."""
        return tuple(s for s in self.shards if s.split == split)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        return {**asdict(self), "tap_ids": list(self.tap_ids), "shards": [s.to_json() for s in self.shards]}

    @classmethod
    def from_json(cls, document: Mapping[str, Any], *, kind: str) -> Manifest:
        """Read :meth:`to_json`.

        Raises:
            FormatError: another kind, a newer format, or a damaged document.
        """
        try:
            if document["format"] != FORMAT_VERSION or document["kind"] != kind:
                raise FormatError(
                    "the shard manifest does not fit",
                    got=f"{document['kind']} format {document['format']}",
                    expected=f"{kind} format {FORMAT_VERSION}",
                    remedy="Use the Draftline version that wrote it, or run the step again",
                )
            return cls(
                kind=kind,
                target=document["target"],
                shards=tuple(ShardInfo(**entry) for entry in document["shards"]),
                codec=document["codec"],
                tap_ids=tuple(document["tap_ids"]),
                hidden_size=document["hidden_size"],
            )
        except (KeyError, TypeError) as error:
            raise FormatError(f"the shard manifest is damaged ({error})", remedy="Run its step again") from None


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


def shard_name(split: str, number: int) -> str:
    """File name of a shard."""
    return f"{split}-{number:05d}.safetensors"
