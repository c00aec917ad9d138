"""The entries of a shard collection's manifest; loads no tensors. See FORMAT.md."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from draftline.cache.container import FORMAT_VERSION as FORMAT_VERSION
from draftline.cache.container import FORMAT_VERSIONS, RECORDS, read_header
from draftline.errors import FormatError

KIND = "hidden-states"
"""Kind of a manifest that names shards of hidden states."""

STREAM_KIND = "hidden-states-stream"
"""Kind of a manifest that names the token shards whose hidden states are captured while training runs."""

COUNTS_FILE = "counts.json"
"""Token counts of the corpus, beside the shards of tokens and of hidden states."""


@dataclass(frozen=True)
class ShardInfo:
    """One manifest entry.

    Attributes:
        name: File name.
        split: Side of the split.
        num_samples: Samples in it.
        num_tokens: Their tokens, shared ones counted for every sample.
        size_bytes: Of the file.
        sha256: Of the file.
        num_rows: Tokens whose hidden states are stored; 0 for shards without records.
        head_bytes: Bytes before the records: what a reader of ranges reads first.
        head_sha256: Of those.
    """

    name: str
    split: str
    num_samples: int
    num_tokens: int
    size_bytes: int
    sha256: str
    num_rows: int = 0
    head_bytes: int = 0
    head_sha256: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain fields; those about records only where there are some."""
        fields = asdict(self)
        if not self.head_bytes:
            for name in ("num_rows", "head_bytes", "head_sha256"):
                del fields[name]
        return fields

    @classmethod
    def of(cls, name: str, split: str, num_samples: int, num_tokens: int, data: bytes) -> ShardInfo:
        """The entry of a shard with these bytes.

        Raises:
            FormatError: the bytes are no shard.
        """
        digest = hashlib.sha256(data).hexdigest()
        header = read_header(data, origin=name)
        if RECORDS not in header.tensors:
            return cls(name, split, num_samples, num_tokens, len(data), digest)
        head = memoryview(data)[: header.head_bytes]
        num_rows, head_digest = header.metadata["num_rows"], hashlib.sha256(head).hexdigest()
        return cls(name, split, num_samples, num_tokens, len(data), digest, num_rows, len(head), head_digest)


@dataclass(frozen=True)
class Manifest:
    """A shard collection; ``outputs`` of its step."""

    kind: str
    target: str
    shards: tuple[ShardInfo, ...]
    codec: str = ""
    tap_ids: tuple[int, ...] = ()
    hidden_size: int = 0

    @property
    def format(self) -> int:
        """Version of this kind's format."""
        return FORMAT_VERSIONS.get(self.kind, FORMAT_VERSION)

    def of_split(self, split: str) -> tuple[ShardInfo, ...]:
        """Shards of one split, in order."""
        return tuple(s for s in self.shards if s.split == split)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        fields = {**asdict(self), "tap_ids": list(self.tap_ids), "format": self.format}
        return {**fields, "shards": [s.to_json() for s in self.shards]}

    @classmethod
    def from_json(cls, document: Mapping[str, Any], *, kind: str) -> Manifest:
        """Read :meth:`to_json`.

        Raises:
            FormatError: another kind, a newer format, or a damaged document.
        """
        try:
            known = FORMAT_VERSIONS.get(kind, FORMAT_VERSION)
            if document["format"] != known or document["kind"] != kind:
                raise FormatError(
                    "the shard manifest does not fit",
                    got=f"{document['kind']} format {document['format']}",
                    expected=f"{kind} format {known}",
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
