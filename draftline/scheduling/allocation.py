"""The scheduler's arithmetic as pure functions of survivals and costs; without torch.

Throughput of a step is Theta(K) = (R + G(K)) / C(K): R tokens that the target
gives anyway, G(K) expected accepted drafts of the K likeliest, C(K) the step's
milliseconds (paper section 3.2.2, with a measured time in place of 1 / SPS).

All survivals are cumulative, so they do not rise along a block, and the K
likeliest slots are a prefix of every block. A slot may be admitted by what is
known of the drafts before it and of other requests, never by what comes after
it in its own block: that knows the very token that is decided about.

Dimension letters: R requests of this step, H past blocks, B positions, K slots.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from draftline.scheduling.compiled import compiled

Array = NDArray[np.float64]
Survival = NDArray[np.floating]
Lengths = NDArray[np.int64]


def gain_curve(survival_HB: Survival, pooled: int = 1) -> Array:
    """G(K) for K = 0, 1, ...: the sum of the K highest survivals.

    Args:
        survival_HB: Cumulative survivals; zeros (and below) are no candidates.
        pooled: Past blocks that stand for each request: the curve is that of
            ``H / pooled`` requests whose survivals are distributed alike.
    """
    # numpy sorts faster than any loop here would.
    rising = survival_HB.flatten()
    rising.sort()
    return _sums_from_the_end(rising, pooled)


def best_budget(gain_K: Array, cost_K: Array, num_requests: int) -> int:
    """The K that maximises Theta over all K, the least of equals.

    A jagged cost cannot trap it. It may look only at survivals of earlier
    steps: with this step's it would choose by what is decided about.

    Args:
        gain_K: See :func:`gain_curve`.
        cost_K: Milliseconds of the step with K draft tokens, drafting included; at least as long.
        num_requests: R, tokens that come without drafts.
    """
    return _best(gain_K, cost_K, num_requests)


def first_stop(gain_K: Array, cost_K: Array, num_requests: int) -> int:
    """Algorithm 1: admit slots one by one and stop before the first that does not raise Theta.

    The stop looks at admitted slots and the next one alone, so it may use this
    step's survivals. Arguments as of :func:`best_budget`.
    """
    return _first_stop(gain_K, cost_K, num_requests)


def allocate(survival_RB: Survival, budget: int, *, floor: float = 0.0, first_request: int = 0) -> Lengths:
    """Give ``budget`` slots to the highest survivals; verified drafts of each request.

    Equal survivals are served by position and then by request. Any order that
    the drafted tokens could influence would bias the output: with c_2 = 1 two
    slots of a block tie, and a request whose second draft looks certain would
    draw twice.

    Args:
        survival_RB: Not rising along a block; zeros are no candidates.
        budget: Slots to give at most.
        floor: Survival below which no slot is given.
        first_request: The request that ties of one position start with; must not depend on drafts.
    """
    if budget <= 0 or survival_RB.size == 0:
        return np.zeros(len(survival_RB), dtype=np.int64)
    lengths, candidates = _candidates(survival_RB, floor)
    if len(candidates) <= budget:
        return lengths
    # The budget-th highest survival: all above it are in, of those equal to it the first.
    candidates.partition(len(candidates) - budget)
    return _lengths_above(survival_RB, candidates[-budget], budget, first_request)


@compiled
def _sums_from_the_end(rising: Survival, pooled: int) -> Array:
    """Sums of the 0, 1, ... highest; with ``pooled`` every so many are one slot."""
    first = 0
    while first < len(rising) and rising[first] <= 0:
        first += 1
    count = (len(rising) - first) // pooled
    sums, total = np.zeros(count + 1), 0.0
    for k in range(count * pooled):
        total += rising[len(rising) - 1 - k]
        if (k + 1) % pooled == 0:
            sums[(k + 1) // pooled] = total / pooled
    return sums


@compiled
def _best(gain_K: Array, cost_K: Array, num_requests: int) -> int:
    """The first K of the highest throughput."""
    best, highest = 0, num_requests / cost_K[0]
    for k in range(1, len(gain_K)):
        throughput = (num_requests + gain_K[k]) / cost_K[k]
        if throughput > highest:
            best, highest = k, throughput
    return best


@compiled
def _first_stop(gain_K: Array, cost_K: Array, num_requests: int) -> int:
    """The last K before one that does not raise throughput."""
    reached = num_requests / cost_K[0]
    for k in range(1, len(gain_K)):
        throughput = (num_requests + gain_K[k]) / cost_K[k]
        if throughput <= reached:
            return k - 1
        reached = throughput
    return len(gain_K) - 1


@compiled
def _candidates(survival_RB: Survival, floor: float) -> tuple[Lengths, Survival]:
    """How many slots of each request may be given, and their survivals."""
    lengths = np.zeros(len(survival_RB), dtype=np.int64)
    found, count = np.empty(survival_RB.size, dtype=survival_RB.dtype), 0
    for r in range(len(survival_RB)):
        for survival in survival_RB[r]:
            if survival > 0 and survival >= floor:
                lengths[r] += 1
                found[count] = survival
                count += 1
    return lengths, found[:count]


@compiled
def _lengths_above(survival_RB: Survival, least: float, budget: int, first_request: int) -> Lengths:
    """All slots above ``least``, then those equal to it: by position, then by request, as far as the budget goes."""
    requests, size = survival_RB.shape
    lengths, left = np.zeros(requests, dtype=np.int64), budget
    for r in range(requests):
        for k in range(size):
            if survival_RB[r, k] > least:
                lengths[r] += 1
                left -= 1
    for k in range(size):
        for turn in range(requests):
            if left == 0:
                return lengths
            r = (first_request + turn) % requests
            if survival_RB[r, k] == least:
                lengths[r] += 1
                left -= 1
    return lengths


def price_floor(budget: int, throughput: float, cost_K: Array) -> float:
    """Survival below which a slot costs more time than it is worth, at a budget and a throughput.

    Giving up the last k of the budget's slots saves C(K) - C(K - k); the least
    saving per slot over all k, times the throughput, is what each must bring.
    On a step of the cost curve the saving is nothing, and so is the floor.

    Args:
        budget: K.
        throughput: Tokens per millisecond that time is worth.
        cost_K: See :func:`best_budget`.
    """
    if budget <= 0:
        return 0.0
    return max(0.0, throughput * _least_saving(budget, cost_K))


@compiled
def _least_saving(budget: int, cost_K: Array) -> float:
    """Milliseconds a slot that giving up the last few slots of a budget saves at least."""
    least = np.inf
    for k in range(budget):
        least = min(least, (cost_K[budget] - cost_K[k]) / (budget - k))
    return least
