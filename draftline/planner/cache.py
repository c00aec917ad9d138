"""Bytes of the hidden-state cache, before a byte is written."""

from __future__ import annotations

from draftline.cache.sizes import CODEC_SIZES, HEAD_SAMPLE_BYTES

REFERENCE = "reference"
"""DeepSpec's layout: bf16 taps and last hidden state, int32 id, one byte each of attention mask and loss mask
(``deepspec/data/target_cache_dataset.py``, version 2)."""

_REFERENCE_TOKEN_BYTES = 4 + 1 + 1


def bytes_per_token(codec: str, num_taps: int, hidden_size: int, answer_share: float = 1.0) -> float:
    """Stored bytes of one token on average, for one of :data:`CODECS`; at most, since no beginning counts as shared.

    Args:
        codec: A cache codec, or ``reference``.
        num_taps: L, tapped layers.
        hidden_size: D.
        answer_share: Share of the tokens that the target produced. Only those have a
            law to store, except in the reference's layout.
    """
    if codec == REFERENCE:
        return 2 * (num_taps + 1) * hidden_size + _REFERENCE_TOKEN_BYTES
    return CODEC_SIZES[codec].token_bytes(num_taps, hidden_size, answer_share)


CODECS = ("bf16", "fp8", "int4", "fp32", REFERENCE)


def cache_bytes(codec: str, num_samples: int, tokens: float, token_bytes: float) -> float:
    """Stored bytes of a whole cache, without the headers of its shards (some kB each).

    Args:
        codec: A cache codec, or ``reference``.
        num_samples: Samples.
        tokens: Of all samples together.
        token_bytes: From :func:`bytes_per_token`.
    """
    total = tokens * token_bytes
    return total if codec == REFERENCE else total + num_samples * HEAD_SAMPLE_BYTES
