"""Bytes of the hidden-state cache, before a byte is written."""

from __future__ import annotations

from draftline.cache.sizes import CODEC_SIZES, HEAD_SAMPLE_BYTES

REFERENCE = "reference"
"""DeepSpec's layout: bf16 taps and last hidden state, int32 id, one byte each of attention mask and loss mask
(``deepspec/data/target_cache_dataset.py``, version 2)."""

_REFERENCE_TOKEN_BYTES = 4 + 1 + 1


def bytes_per_token(codec: str, num_taps: int, hidden_size: int) -> float:
    """Stored bytes of one token, for one of :data:`CODECS`.

    At most: as if the target had produced every token, so that every one has
    a law to store, and no beginning were shared.

    Args:
        codec: A cache codec, or ``reference``.
        num_taps: L, tapped layers.
        hidden_size: D.
    """
    if codec == REFERENCE:
        return 2 * (num_taps + 1) * hidden_size + _REFERENCE_TOKEN_BYTES
    return CODEC_SIZES[codec].token_bytes(num_taps, hidden_size)


CODECS = ("bf16", "fp8", "int4", "fp32", REFERENCE)


def cache_bytes(codec: str, num_samples: int, tokens_per_sample: float, num_taps: int, hidden_size: int) -> float:
    """Stored bytes of a whole cache, without the headers of its shards (some KB each)."""
    tokens = num_samples * tokens_per_sample
    total = tokens * bytes_per_token(codec, num_taps, hidden_size)
    return total if codec == REFERENCE else total + num_samples * HEAD_SAMPLE_BYTES
