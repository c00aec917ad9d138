"""Bytes that each codec takes, without tensors: for the codecs themselves, and for planning before anything runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

GROUP = 64
"""Values that share a scale, and the size of the rotation; divides the hidden size of every known target."""

NORMALISER_BYTES = 4
"""The log-normaliser, fp32, of every token that has a law."""

HEAD_TOKEN_BYTES = 4 + 1 + 1
"""Id, loss mask, and whether the row has a law."""

HEAD_SAMPLE_BYTES = 8 + 8 + 8 + 4 + 8
"""A sample's entries in three lists of offsets, one segment on its path, one checksum."""


def plain_bytes(item_bytes: int) -> Callable[[int], int]:
    """Vectors of plain numbers."""
    return lambda hidden_size: item_bytes * hidden_size


def e4m3_bytes(hidden_size: int) -> int:
    """One byte a value and an fp32 scale."""
    return hidden_size + 4


def rotated_bytes(bits: int) -> Callable[[int], int]:
    """Whole groups of codes, each with a bf16 scale."""
    return lambda hidden_size: math.ceil(hidden_size / GROUP) * (GROUP * bits // 8 + 2)


@dataclass(frozen=True)
class CodecSize:
    """Bytes of one vector of the hidden size.

    Attributes:
        tap: Of one tap.
        last_hidden: Of the last hidden state.
    """

    tap: Callable[[int], int]
    last_hidden: Callable[[int], int]

    def token_bytes(self, num_taps: int, hidden_size: int, law_share: float = 1.0) -> float:
        """Stored bytes of a token that no other sample shares.

        Args:
            num_taps: L.
            hidden_size: D.
            law_share: Share of the tokens that the target produced; only those have a law to store.
        """
        law = self.last_hidden(hidden_size) + NORMALISER_BYTES
        return HEAD_TOKEN_BYTES + num_taps * self.tap(hidden_size) + law_share * law


CODEC_SIZES: Mapping[str, CodecSize] = {
    "fp32": CodecSize(plain_bytes(4), plain_bytes(4)),
    "bf16": CodecSize(plain_bytes(2), plain_bytes(2)),
    "fp8": CodecSize(e4m3_bytes, rotated_bytes(8)),
    "int4": CodecSize(rotated_bytes(4), rotated_bytes(8)),
}
