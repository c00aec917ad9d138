"""Survivals and costs for the tests, and what the fast code is compared with."""

from __future__ import annotations

import heapq

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from draftline.scheduling.costs import CostTable

Array = NDArray[np.float64]

CONFIDENCES = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 0.8, 1.0]), st.floats(0, 1))
"""Round values make ties, within a block (1.0) and between blocks."""


@st.composite
def survivals(draw: st.DrawFn, most_requests: int = 5, most_positions: int = 4) -> Array:
    """Cumulative survivals ``[R, B]``."""
    shape = (draw(st.integers(1, most_requests)), draw(st.integers(1, most_positions)))
    confidence = draw(arrays(np.float64, shape, elements=CONFIDENCES))
    survival: Array = np.cumprod(confidence, axis=1)
    return survival


@st.composite
def jagged_costs(draw: st.DrawFn, length: int) -> Array:
    """Never falling, with flats and cliffs."""
    steps = draw(st.lists(st.one_of(st.just(0.0), st.floats(0, 3), st.just(20.0)), min_size=length, max_size=length))
    costs: Array = draw(st.floats(0.5, 50)) + np.cumsum(steps)
    return costs


def heap_lengths(survival_RB: Array, budget: int, floor: float = 0.0) -> list[int]:
    """Slots one by one from a heap of each request's next position: the rule as it is told."""
    lengths = [0] * len(survival_RB)
    heap = [(-row[0], 0, r) for r, row in enumerate(survival_RB.tolist())]
    heapq.heapify(heap)
    while heap and budget > 0:
        negative, position, request = heapq.heappop(heap)
        if negative >= 0 or -negative < floor:
            break
        lengths[request] += 1
        budget -= 1
        if position + 1 < survival_RB.shape[1]:
            heapq.heappush(heap, (-survival_RB[request, position + 1], position + 1, request))
    return lengths


def linear_costs(
    base: float = 20.0, token: float = 0.36, request: float = 0.7, draft: float = 2.0, draft_request: float = 0.4
) -> CostTable:
    """About the curves of a small model on a CPU, milliseconds."""
    counts = (1, 2, 4, 8, 16, 32, 64)
    return CostTable.from_points(
        {(r, r * q): base + token * r * q + request * r for r in counts for q in (1, 2, 4, 8)},
        {r: draft + draft_request * r for r in counts},
    )
