"""Hidden-state shards of made-up states, which depend on the tokens before as a target's do."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from draftline.cache.hidden import SegmentRows, as_stored, encode_hidden_states, segment_laws, split_samples
from draftline.cache.manifest import Manifest, ShardInfo, shard_name
from draftline.cache.prefixes import plan_prefixes
from draftline.cache.shards import decode_shard, encode_shard
from draftline.storage import ObjectStore

LAYERS, HIDDEN = 3, 96
"""96 is no multiple of 64, so that padding is always part of what is tested."""

Sample = tuple[list[int], list[int]]
"""Token ids and loss mask."""


def states(ids: Sequence[int], *, hidden_size: int = HIDDEN) -> tuple[Tensor, Tensor]:
    """Taps and last hidden state of every token, from the tokens up to it."""
    taps, hidden = [], []
    for end in range(1, len(ids) + 1):
        digest = hashlib.sha256(np.asarray(ids[:end], dtype=np.int64).tobytes()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:6], "little"))
        taps.append(torch.randn(LAYERS, hidden_size, generator=generator))
        hidden.append(torch.randn(hidden_size, generator=generator))
    return torch.stack(taps), torch.stack(hidden)


def make_shard(
    samples: Sequence[Sample], codec: str = "fp32", *, dedupe: bool = True, hidden_size: int = HIDDEN, name: str = "s"
) -> bytes:
    """The samples ``<name>-0``, ``<name>-1``, ... as a hidden-state shard."""
    tokens = decode_shard(
        encode_shard(
            {
                "input_ids": torch.tensor([t for ids, _ in samples for t in ids], dtype=torch.int32),
                "loss_mask": torch.tensor([m for _, mask in samples for m in mask], dtype=torch.uint8),
                "cu_seqlens": torch.tensor([0, *(len(ids) for ids, _ in samples)]).cumsum(0),
            },
            {"kind": "tokens", "ids": [f"{name}-{n}" for n in range(len(samples))], "target": "t"},
        ),
        origin="tokens",
    )
    ids, masks = split_samples(tokens)
    plan = plan_prefixes(ids, dedupe=dedupe)
    rows = []
    for segment, law in zip(plan.segments, segment_laws(plan, masks), strict=True):
        taps, hidden = (
            part[segment.start : segment.end] for part in states(ids[segment.sample].tolist(), hidden_size=hidden_size)
        )
        rows.append(SegmentRows(taps, hidden[law], as_stored(hidden[law], codec).sum(-1)))
    return encode_hidden_states(tokens, plan, rows, range(LAYERS), codec)


def numbered_samples(count: int, first: int = 0, *, opening: int = 12) -> list[Sample]:
    """Samples of growing length behind a common opening; ids tell them apart."""
    made = []
    for number in range(first, first + count):
        own = [1000 + 50 * number + place for place in range(3 + number % 7)]
        made.append(([*range(opening), *own], [0] * (opening + 1) + [1] * (len(own) - 1)))
    return made


def fill(store: ObjectStore, sizes: Sequence[int], codec: str = "fp32", *, split: str = "train") -> Manifest:
    """A cache of shards of so many samples, below ``cache``."""
    infos = []
    for number, size in enumerate(sizes):
        samples = numbered_samples(size, 100 * number)
        data = make_shard(samples, codec, name=f"{number}")
        name = shard_name(split, number)
        store.put(f"cache/{name}", data)
        infos.append(ShardInfo.of(name, split, size, sum(len(ids) for ids, _ in samples), data))
    return Manifest("hidden-states", "t", tuple(infos), codec, tuple(range(LAYERS)), HIDDEN)
