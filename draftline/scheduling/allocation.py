"""The scheduler's arithmetic as pure functions of survivals and costs; numpy only.

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
    rising = survival_HB.flatten()
    rising.sort()
    first = int(rising.searchsorted(rising.dtype.type(0), side="right"))
    # Converted before they are added up: numpy's sum of one type in another takes twice as long.
    falling = rising[first:][::-1].astype(np.float64)
    if pooled > 1:
        # A curve of whole slots: every pooled-th point is one slot of the step.
        return np.concatenate(([0.0], falling.cumsum()[pooled - 1 :: pooled] / pooled))
    curve = np.zeros(len(falling) + 1)
    falling.cumsum(out=curve[1:])
    return curve


def best_budget(gain_K: Array, cost_K: Array, num_requests: int) -> int:
    """The K that maximises Theta over all K, the least of equals.

    A jagged cost cannot trap it. It may look only at survivals of earlier
    steps: with this step's it would choose by what is decided about.

    Args:
        gain_K: See :func:`gain_curve`.
        cost_K: Milliseconds of the step with K draft tokens, drafting included; at least as long.
        num_requests: R, tokens that come without drafts.
    """
    return int(np.argmax((num_requests + gain_K) / cost_K[: len(gain_K)]))


def first_stop(gain_K: Array, cost_K: Array, num_requests: int) -> int:
    """Algorithm 1: admit slots one by one and stop before the first that does not raise Theta.

    The stop looks at admitted slots and the next one alone, so it may use this
    step's survivals. Arguments as of :func:`best_budget`.
    """
    throughput = (num_requests + gain_K) / cost_K[: len(gain_K)]
    does_not_raise = throughput[1:] <= throughput[:-1]
    return int(does_not_raise.argmax()) if does_not_raise.any() else len(gain_K) - 1


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
    candidates = survival_RB > 0 if floor <= 0 else survival_RB >= floor
    if budget >= np.count_nonzero(candidates):
        return _by_request(candidates)
    # The budget-th highest survival: all above it are in, of those equal to it the first.
    least = np.partition(survival_RB, survival_RB.size - budget, axis=None)[survival_RB.size - budget]
    above_RB = survival_RB > least
    lengths = _by_request(above_RB)
    left = budget - int(np.count_nonzero(above_RB))
    ties_RB = survival_RB == least
    if left >= np.count_nonzero(ties_RB):
        return lengths + _by_request(ties_RB)
    counts_B = np.cumsum(ties_RB.sum(axis=0))
    whole = int(np.searchsorted(counts_B, left, side="right"))
    lengths += _by_request(ties_RB[:, :whole])
    left -= int(counts_B[whole - 1]) if whole else 0
    tied = np.flatnonzero(ties_RB[:, whole])
    tied = np.roll(tied, -int(np.searchsorted(tied, first_request % len(survival_RB))))
    lengths[tied[:left]] += 1
    return lengths


def _by_request(slots_RB: NDArray[np.bool_]) -> Lengths:
    # A product with ones: numpy sums rows of a few elements at half the pace.
    lengths: Lengths = (slots_RB.view(np.uint8) @ np.ones(slots_RB.shape[1], dtype=np.uint8)).astype(np.int64)
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
    saved = (cost_K[budget] - cost_K[:budget]) / np.arange(budget, 0, -1)
    return max(0.0, float(throughput * saved.min()))
