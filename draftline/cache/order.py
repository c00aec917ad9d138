"""Who reads what: a pure function of integers, without tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WINDOW_SHARDS = 16
"""Shards whose samples are mixed with each other."""


@dataclass(frozen=True)
class Window:
    """A run of the stream that mixes a few shards.

    Attributes:
        shards: In the order of their shuffle.
        start: Place in the epoch of its first sample.
        samples: ``(shard, sample)`` pairs, shuffled.
    """

    shards: tuple[int, ...]
    start: int
    samples: tuple[tuple[int, int], ...]


def windows(
    samples_per_shard: Sequence[int], epoch: int, seed: int, window_shards: int = WINDOW_SHARDS
) -> list[Window]:
    """One epoch: shards are shuffled, taken a few at a time, and samples are shuffled among those."""
    random = np.random.default_rng([seed, epoch])
    shards = random.permutation(len(samples_per_shard))
    found: list[Window] = []
    place = 0
    for start in range(0, len(shards), window_shards):
        own = tuple(int(s) for s in shards[start : start + window_shards])
        pairs = [(s, i) for s in own for i in range(samples_per_shard[s])]
        found.append(Window(own, place, tuple(pairs[i] for i in random.permutation(len(pairs)))))
        place += len(pairs)
    return found


def sample_order(
    samples_per_shard: Sequence[int], epoch: int, seed: int, window_shards: int = WINDOW_SHARDS
) -> list[tuple[int, int]]:
    """All ``(shard, sample)`` pairs once, in the order of one epoch."""
    return [pair for window in windows(samples_per_shard, epoch, seed, window_shards) for pair in window.samples]
