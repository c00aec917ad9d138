"""Which samples of a shard begin alike, and what of them is stored once; without torch.

The samples of a shard form a radix tree over their tokens. Every edge that is
worth it becomes a *segment*: rows that are stored once and read by all samples
below it. A sample is the concatenation of the segments on its path.

In lexicographic order, the sample before shares at least as much with a sample
as any earlier one does. So whoever computes the samples in that order, and
reuses what the one before had in common, computes every distinct prefix once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

MIN_SAVED_TOKENS = 8
"""A branch that would save fewer rows than this is not split: each segment costs an index entry and a range."""


@dataclass(frozen=True)
class Segment:
    """Rows stored together.

    Attributes:
        sample: The first sample, in computing order, that holds them.
        start: Its first token.
        end: The token after its last.
    """

    sample: int
    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class PrefixPlan:
    """How a shard's samples share rows.

    Attributes:
        order: Samples in lexicographic order of their tokens; equal ones in their own order.
        shared: For each place of ``order``, tokens in common with the place before.
        segments: In the order of computing and storing.
        paths: For each sample, the segments that make it, in order.
    """

    order: tuple[int, ...]
    shared: tuple[int, ...]
    segments: tuple[Segment, ...]
    paths: tuple[tuple[int, ...], ...]

    @property
    def num_rows(self) -> int:
        """Rows stored."""
        return sum(len(s) for s in self.segments)


def plan_prefixes(
    samples: Sequence[NDArray[np.int32]], *, dedupe: bool = True, min_saved_tokens: int = MIN_SAVED_TOKENS
) -> PrefixPlan:
    """Plan the sharing of a shard.

    Args:
        samples: Token ids of each, none empty.
        dedupe: Store common beginnings once; else every sample is one segment.
        min_saved_tokens: Rows that a branch must save to become a segment of its own.

    Returns:
        The plan; a pure function of the arguments.
    """
    order = sorted(range(len(samples)), key=lambda i: (samples[i].tolist(), i))
    shared = [0] + [common_prefix(samples[a], samples[b]) for a, b in pairwise(order)]
    paths: list[list[int]] = [[] for _ in samples]
    segments: list[Segment] = []

    def emit(low: int, high: int, start: int, end: int) -> None:
        if start < end:
            for place in range(low, high):
                paths[order[place]].append(len(segments))
            segments.append(Segment(order[low], start, end))

    # Groups of places that agree up to a depth; a stack, because a tree may be deeper than Python's own.
    pending = [(low, low + 1, 0) for low in range(len(order))] if not dedupe else [(0, len(order), 0)]
    pending.reverse()
    while pending:
        low, high, depth = pending.pop()
        if high - low == 1:
            emit(low, high, depth, len(samples[order[low]]))
            continue
        common = min(shared[low + 1 : high])
        cuts = [low, *(place for place in range(low + 1, high) if shared[place] == common), high]
        if (high - low - 1) * (common - depth) >= min_saved_tokens:
            emit(low, high, depth, common)
            depth = common
        pending.extend((a, b, depth) for a, b in reversed(list(pairwise(cuts))))
    return PrefixPlan(tuple(order), tuple(shared), tuple(segments), tuple(tuple(p) for p in paths))


def shared_needs(plan: PrefixPlan, needs: Sequence[NDArray[np.bool_]]) -> list[NDArray[np.bool_]]:
    """For each place of the order, what is needed of its tokens by its sample or by any later one that shares them.

    Args:
        plan: The sharing.
        needs: For each sample, the tokens of which something is needed.
    """
    joined = [needs[sample].copy() for sample in plan.order]
    for place in range(len(joined) - 1, 0, -1):
        common = plan.shared[place]
        joined[place - 1][:common] |= joined[place][:common]
    return joined


def common_prefix(a: NDArray[np.int32], b: NDArray[np.int32]) -> int:
    """Number of equal tokens at the start of both."""
    size = min(len(a), len(b))
    different = np.flatnonzero(a[:size] != b[:size])
    return int(different[0]) if len(different) else size
