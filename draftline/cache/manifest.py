"""The entries of a shard collection's manifest; loads no tensors. See FORMAT.md."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from draftline.errors import FormatError

FORMAT_VERSION = 1

KIND = "hidden-states"
"""Kind of a manifest that names shards of hidden states."""

STREAM_KIND = "hidden-states-stream"
"""Kind of a manifest that names the token shards whose hidden states are captured while training runs."""

COUNTS_FILE = "counts.json"
"""Token counts of the corpus, beside the shards of tokens and of hidden states."""


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


def shard_name(split: str, number: int) -> str:
    """File name of a shard."""
    return f"{split}-{number:05d}.safetensors"
