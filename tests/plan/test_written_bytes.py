"""A plan's bytes are those that the capture really writes."""

from __future__ import annotations

import pytest
import torch

from draftline.cache.shards import CODEC_DTYPES, encode_shard
from draftline.planner.cache import bytes_per_token, cache_bytes

LAYERS, HIDDEN = 5, 576


def shard(codec: str, lengths: list[int]) -> bytes:
    """A shard of SmolLM2's shape, encoded as the capture encodes it."""
    tokens = sum(lengths)
    dtype = CODEC_DTYPES[codec]
    return encode_shard(
        {
            "input_ids": torch.zeros(tokens, dtype=torch.int32),
            "loss_mask": torch.zeros(tokens, dtype=torch.uint8),
            "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0),
            "taps": torch.zeros(tokens, LAYERS, HIDDEN, dtype=dtype),
            "last_hidden": torch.zeros(tokens, HIDDEN, dtype=dtype),
            "log_normaliser": torch.zeros(tokens),
        },
        {"kind": "hidden-states", "ids": [f"{n}" for n in range(len(lengths))], "codec": codec},
    )


@pytest.mark.parametrize("codec", CODEC_DTYPES)
def test_planned_bytes_are_written_bytes(codec: str) -> None:
    small, large = shard(codec, [30] * 10), shard(codec, [30] * 10 + [50] * 10)
    # Headers cancel, up to the digits of their offsets.
    assert len(large) - len(small) == pytest.approx(500 * bytes_per_token(codec, LAYERS, HIDDEN) + 10 * 8, abs=200)
    planned = cache_bytes(codec, 20, 40.0, LAYERS, HIDDEN)
    assert 0 <= len(large) - planned < 2000
