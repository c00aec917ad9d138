"""A plan's bytes are those that the capture really writes."""

from __future__ import annotations

import pytest
import torch

from draftline.cache.codecs import CODECS
from draftline.cache.hidden import SegmentRows, encode_hidden_states, segment_laws, split_samples
from draftline.cache.prefixes import plan_prefixes
from draftline.cache.shards import decode_shard, encode_shard
from draftline.planner.cache import bytes_per_token, cache_bytes

LAYERS, HIDDEN = 5, 576


def shard(codec: str, lengths: list[int]) -> bytes:
    """A shard of SmolLM2's shape in which nothing is shared and everything was produced."""
    token_bytes = encode_shard(
        {
            "input_ids": torch.cat([torch.full((size,), place) for place, size in enumerate(lengths)]).int(),
            "loss_mask": torch.ones(sum(lengths), dtype=torch.uint8),
            "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0),
        },
        {"kind": "tokens", "ids": [f"{n}" for n in range(len(lengths))], "target": "t"},
    )
    tokens = decode_shard(token_bytes, origin="tokens")
    ids, masks = split_samples(tokens)
    plan = plan_prefixes(ids)
    rows = [
        SegmentRows(torch.ones(len(law), LAYERS, HIDDEN), torch.ones(law.sum(), HIDDEN), torch.ones(law.sum()))
        for law in segment_laws(plan, masks)
    ]
    return encode_hidden_states(tokens, plan, rows, range(LAYERS), codec)


@pytest.mark.parametrize("codec", CODECS)
def test_planned_bytes_are_written_bytes(codec: str) -> None:
    small, large = shard(codec, [30] * 10), shard(codec, [30] * 10 + [50] * 10)
    # Headers cancel, up to the digits of their offsets.
    assert len(large) - len(small) == pytest.approx(500 * bytes_per_token(codec, LAYERS, HIDDEN) + 10 * 36, abs=200)
    planned = cache_bytes(codec, 20, 800, bytes_per_token(codec, LAYERS, HIDDEN))
    channel_scales = 4 * LAYERS * HIDDEN if codec == "int4" else 0
    assert 0 <= len(large) - planned - channel_scales < 2000
