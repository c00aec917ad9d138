"""Small hidden-state caches, written as the capture writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch

from draftline.cache.catalogue import COUNTS_FILE
from draftline.cache.manifest import KIND, Manifest, ShardInfo, shard_name
from draftline.cache.shards import decode_shard
from draftline.capture.capture import capture_shard
from draftline.steps.ledger import Ledger, StepResult
from draftline.storage import ObjectStore
from draftline.target.load import Target
from tests.servers.tiny_target import toy_target
from tests.training.cases import Conversation, token_shard

KEY, OTHER_KEY, THIRD_KEY = "0123456789abcdef0123", "89abcdef012345678901", "ffffffffffffffffffff"
TAPS = (0, 1)
CODEC = "bf16"
LAYOUT = {"train": (3, 1, 2), "validation": (2,)}
"""Samples in each shard of each split."""


def samples(count: int, seed: int) -> list[Conversation]:
    """Some token sequences of the toy target, of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        ids = torch.randint(0, 16, (5 + 3 * number,), generator=generator).tolist()
        made.append((f"{seed}-{number}", ids, [0, 0, *[1] * (len(ids) - 2)]))
    return made


def write_shards(
    store: ObjectStore, key: str, target: Target, layout: Mapping[str, tuple[int, ...]]
) -> list[ShardInfo]:
    """The shards of a cache, each with its entry."""
    infos = []
    for split, counts in layout.items():
        for number, count in enumerate(counts):
            data = token_shard(samples(count, 10 * len(infos)), target.fingerprint)
            tokens = decode_shard(data, origin="tokens")
            captured = capture_shard(target, tokens, TAPS, CODEC)
            name = shard_name(split, number)
            info = ShardInfo.of(name, split, count, len(tokens.tensors["input_ids"]), captured)
            store.put(f"hidden-states/{key}/{name}", captured)
            store.put(f"hidden-states/{key}/{name}.json", json.dumps(info.to_json()).encode())
            infos.append(info)
    return infos


def write_cache(
    store: ObjectStore,
    key: str = KEY,
    *,
    target_seed: int = 0,
    layout: Mapping[str, tuple[int, ...]] = LAYOUT,
    is_finished: bool = True,
) -> Manifest:
    """A cache of the toy target; unfinished without its counts and its manifest."""
    target = toy_target(seed=target_seed)
    infos = write_shards(store, key, target, layout)
    manifest = Manifest(KIND, target.fingerprint, tuple(infos), CODEC, TAPS, target.config.hidden_size)
    if is_finished:
        store.put(f"hidden-states/{key}/{COUNTS_FILE}", b"[]")
        Ledger(store).commit(StepResult("hidden-states", key, outputs={**manifest.to_json(), "counts": COUNTS_FILE}))
    return manifest


def write_draft(store: ObjectStore, cache: str = KEY, key: str = THIRD_KEY) -> None:
    """A finished draft that was trained from a cache."""
    Ledger(store).commit(StepResult("draft", key, inputs={"hidden-states": cache}))


def keys(store: ObjectStore) -> list[str]:
    """Everything stored."""
    return [info.key for info in store.list()]
