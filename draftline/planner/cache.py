"""Bytes of the hidden-state cache, before a byte is written."""

from __future__ import annotations

from collections.abc import Mapping

REFERENCE = "reference"
"""DeepSpec's layout: bf16 taps and last hidden state, int32 id, one byte each of attention mask and loss mask
(``deepspec/data/target_cache_dataset.py``, version 2)."""

_REFERENCE_TOKEN_BYTES = 4 + 1 + 1
_ID_AND_MASK_BYTES = 4 + 1
_LOG_NORMALISER_BYTES = 4
_CU_SEQLENS_BYTES = 8


def bytes_per_token(codec: str, num_taps: int, hidden_size: int) -> float:
    """Stored bytes of one token, for one of :data:`CODECS`.

    Args:
        codec: A cache codec, or ``reference``.
        num_taps: L, tapped layers.
        hidden_size: D.
    """
    values = (num_taps + 1) * hidden_size
    if codec == REFERENCE:
        return 2 * values + _REFERENCE_TOKEN_BYTES
    return _VALUE_BYTES[codec] * values + _ID_AND_MASK_BYTES + _LOG_NORMALISER_BYTES


_VALUE_BYTES: Mapping[str, float] = {"bf16": 2, "fp32": 4}

CODECS = (*_VALUE_BYTES, REFERENCE)


def cache_bytes(codec: str, num_samples: int, tokens_per_sample: float, num_taps: int, hidden_size: int) -> float:
    """Stored bytes of a whole cache, without the headers of its shards (some KB each)."""
    tokens = num_samples * tokens_per_sample
    total = tokens * bytes_per_token(codec, num_taps, hidden_size)
    return total if codec == REFERENCE else total + num_samples * _CU_SEQLENS_BYTES
