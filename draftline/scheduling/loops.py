"""What :mod:`~draftline.scheduling.estimate` does for every request, as loops that Numba compiles.

As numpy expressions these take a hundred calls a step, and the calls longer
than the work. Arrays lie together in memory (C order) and have the dtypes named
below; for others a step would wait for the compiler. They change in place.

Dimension letters as in ``estimate.py``; C blocks of all requests, K prices.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from draftline.scheduling.compiled import compiled

Array = NDArray[np.float64]
Survival = NDArray[np.float32]
Rows = NDArray[np.int64]
Flags = NDArray[np.bool_]

PRICE_STEP = 1 / 8
"""Prices are 0, 1/8, ..., 7/8."""
HIGHEST_CORRECTION = 2.0
MOST_COUNTED = 32
"""Of the requests of a step, where more would tell little more."""

_CHANCE = 0.5
_REQUEST_PRIOR_TRIALS = 1.0
_FAIR_WEIGHT = 0.03
_REQUEST_MEAN_WEIGHT = 0.2
_TINY = 1e-30


@compiled
def count_accepted(
    rows_M: Rows,
    predicted_MB: Survival,
    lengths_M: Rows,
    accepted_M: Rows,
    kept: float,
    counts_N3: Array,
    hits_B: Rows,
    trials_B: Rows,
) -> tuple[float, float]:
    """Add a step's outcomes to what is kept of each request; drafts accepted and expected, over all.

    The last position tried is the first rejected one, or the last verified.

    Args:
        rows_M: Requests.
        predicted_MB: Survivals as predicted.
        lengths_M: Drafts verified.
        accepted_M: Of those, accepted.
        kept: Weight that past blocks keep.
        counts_N3: Accepted, expected, and the variance of what is accepted.
        hits_B: Becomes how many requests had k + 1 accepted.
        trials_B: Becomes how many tried position k.
    """
    hits_B[:] = 0
    trials_B[:] = 0
    all_accepted, all_expected = 0.0, 0.0
    for i in range(len(rows_M)):
        tried = min(lengths_M[i], accepted_M[i] + 1)
        expected, variance, before = 0.0, 0.0, 1.0
        for k in range(tried):
            confidence = predicted_MB[i, k] / (before + _TINY)
            before = predicted_MB[i, k]
            expected += confidence
            variance += confidence - confidence * confidence
            trials_B[k] += 1
        for k in range(accepted_M[i]):
            hits_B[k] += 1
        counts = counts_N3[rows_M[i]]
        if tried > 0:
            counts *= kept
        counts[0] += accepted_M[i]
        counts[1] += expected
        counts[2] += variance
        all_accepted += accepted_M[i]
        all_expected += expected
    return all_accepted, all_expected


@compiled
def refresh_factors(rows_M: Rows, common: float, counts_N3: Array, factors_NB: Survival) -> None:
    """Corrections of requests: below 1 a power by position, above 1 the same for all, so that survival does not rise.

    A deviation within half its standard error is taken for chance: powers of
    noise would lower what is expected of everybody.

    Args:
        rows_M: Requests.
        common: Correction of all requests.
        counts_N3: See :func:`count_accepted`.
        factors_NB: Results.
    """
    for row in rows_M:
        expected = common * counts_N3[row, 1]
        excess = counts_N3[row, 0] - expected
        size = max(abs(excess) - _CHANCE * np.sqrt(counts_N3[row, 2]), 0.0)
        excess = size if excess > 0 else -size
        factor = min(common * (1 + excess / (_REQUEST_PRIOR_TRIALS + expected)), HIGHEST_CORRECTION)
        lower = min(factor, 1.0)
        for k in range(factors_NB.shape[1]):
            factors_NB[row, k] = factor
            factor *= lower


@compiled
def keep_blocks(
    rows_M: Rows,
    survival_MB: Survival,
    is_fair_M: Flags,
    step: int,
    admitted_N: Rows,
    next_N: Rows,
    last_N: Rows,
    factors_NB: Survival,
    history_NWB: Survival,
    means_NB: Survival,
    surplus_NK: Survival,
    mean_B: Array,
    mean_surplus_K: Array,
    common_CB: Survival,
    num_blocks: int,
) -> int:
    """Blocks of the step before the last become history; how many are in ``common_CB`` since it began.

    Args:
        rows_M: Requests that drafted them.
        survival_MB: Uncorrected.
        is_fair_M: Which of them speak for all requests; of many only some are counted.
        step: The step that has ended.
        admitted_N: Step at which each row's request came: a row that changed hands since never drafted this block.
        next_N: Blocks that each row has had.
        last_N: Step of its last block.
        factors_NB: Corrections.
        history_NWB: The last blocks of each row.
        means_NB: Running means of its survivals.
        surplus_NK: Running means of what they exceed each price by, corrected.
        mean_B: As ``means_NB``, of all requests.
        mean_surplus_K: As ``surplus_NK``, of all requests.
        common_CB: The last blocks of all requests.
        num_blocks: See above.
    """
    size, kept, prices = survival_MB.shape[1], history_NWB.shape[1], surplus_NK.shape[1]
    staying = 0
    for row in rows_M:
        staying += admitted_N[row] < step - 1
    stride = max(1, -(-staying // MOST_COUNTED))
    some_B, some_K, fair, counted = np.zeros(size), np.zeros(prices), 0, 0
    surplus_K = np.empty(prices)
    for i in range(len(rows_M)):
        row = rows_M[i]
        if admitted_N[row] >= step - 1:
            continue
        surplus_K[:] = 0
        for k in range(size):
            survival = min(survival_MB[i, k] * factors_NB[row, k], 1.0)
            for p in range(prices):
                surplus_K[p] += max(survival - p * PRICE_STEP, 0.0)
        if next_N[row] == 0:
            means_NB[row], surplus_NK[row] = mean_B, mean_surplus_K
        for k in range(size):
            history_NWB[row, next_N[row] % kept, k] = survival_MB[i, k]
            means_NB[row, k] += _REQUEST_MEAN_WEIGHT * (survival_MB[i, k] - means_NB[row, k])
        for p in range(prices):
            surplus_NK[row, p] += _REQUEST_MEAN_WEIGHT * (surplus_K[p] - surplus_NK[row, p])
        next_N[row] += 1
        last_N[row] = step
        if is_fair_M[i]:
            if fair % stride == 0:
                some_B += survival_MB[i]
                some_K += surplus_K
                common_CB[(num_blocks + counted) % len(common_CB)] = survival_MB[i]
                counted += 1
            fair += 1
    if counted:
        weight = 1 - (1 - _FAIR_WEIGHT) ** counted
        mean_B += weight * (some_B / counted - mean_B)
        mean_surplus_K += weight * (some_K / counted - mean_surplus_K)
    return num_blocks + counted


@compiled
def expect(
    rows_M: Rows,
    step: int,
    weight_by_age: Survival,
    next_N: Rows,
    last_N: Rows,
    factors_NB: Survival,
    means_NB: Survival,
    surplus_NK: Survival,
    mean_B: Array,
    mean_surplus_K: Array,
) -> tuple[Survival, Survival, Survival]:
    """What is expected of requests' next blocks: weight of their own past, surplus by price, and what changed since.

    Blocks were noted as they were corrected then; what has been learned since
    moves all of them. Arguments as of :func:`keep_blocks`; a request says less
    of itself the older its last block.
    """
    own_M = np.empty(len(rows_M), dtype=np.float32)
    change_M = np.empty(len(rows_M), dtype=np.float32)
    surplus_MK = np.empty((len(rows_M), surplus_NK.shape[1]), dtype=np.float32)
    for i in range(len(rows_M)):
        row = rows_M[i]
        own = 0.0
        if next_N[row] > 0:
            own = weight_by_age[min(step - last_N[row], len(weight_by_age) - 1)]
        own_M[i] = own
        for p in range(surplus_NK.shape[1]):
            surplus_MK[i, p] = mean_surplus_K[p] + own * (surplus_NK[row, p] - mean_surplus_K[p])
        now = 0.0
        for k in range(len(mean_B)):
            now += min((mean_B[k] + own * (means_NB[row, k] - mean_B[k])) * factors_NB[row, k], 1.0)
        change_M[i] = now / (surplus_MK[i, 0] + _TINY)
    return own_M, surplus_MK, change_M


@compiled
def recent_blocks(
    rows_M: Rows,
    own_M: Survival,
    num_blocks: int,
    step: int,
    fractions: Survival,
    next_N: Rows,
    factors_NB: Survival,
    history_NWB: Survival,
    common_CB: Survival,
    num_common: int,
) -> Survival:
    """The latest blocks of requests, corrected, ``[M, num_blocks, B]``.

    Of those that have not drafted for long, a share has blocks of all requests
    in their place: as large a share as their own past is no guide.

    Args:
        rows_M: Requests.
        own_M: How much the past of each says of its future.
        num_blocks: Of each.
        step: Turns which of them these are.
        fractions: Evenly spread; the share is told by comparing with them.
        next_N: See :func:`keep_blocks`, as the others.
        factors_NB: Corrections.
        history_NWB: The last blocks of each row.
        common_CB: The last blocks of all requests.
        num_common: How many of them there are.
    """
    size, kept, taken = history_NWB.shape[2], history_NWB.shape[1], 0
    blocks_MWB = np.empty((len(rows_M), num_blocks, size), dtype=np.float32)
    for i in range(len(rows_M)):
        row = rows_M[i]
        is_other = own_M[i] < fractions[(i + step) % len(fractions)]
        for w in range(num_blocks):
            block = history_NWB[row, (next_N[row] - 1 - w) % kept]
            if is_other:
                block = common_CB[taken % max(1, num_common)]
                taken += 1
            for k in range(size):
                blocks_MWB[i, w, k] = min(block[k] * factors_NB[row, k], np.float32(1))
    return blocks_MWB


@compiled
def exceed(surplus_MK: Survival, change_M: Survival, price: float, least: float) -> Flags:
    """Which requests' blocks bring more than ``least`` above a price, between two prices by a straight line.

    Args:
        surplus_MK: See :func:`expect`, as ``change_M``.
        change_M: Factors.
        price: Of a slot, in accepted drafts.
        least: What drafting takes, in the same measure.
    """
    prices = surplus_MK.shape[1]
    place = price / PRICE_STEP
    lower = int(min(place, prices))
    does_M = np.empty(len(surplus_MK), dtype=np.bool_)
    for i in range(len(surplus_MK)):
        below = surplus_MK[i, lower] if lower < prices else 0.0
        above = surplus_MK[i, lower + 1] if lower + 1 < prices else 0.0
        does_M[i] = (below + (place - lower) * (above - below)) * change_M[i] > least
    return does_M


@compiled
def falling_up_to(survival_MB: Array, caps_M: Rows) -> Survival:
    """Survivals that do not rise along a block, 0 from the cap on.

    A fit of each position alone may let them rise; only predecessors are looked at.
    """
    requests, size = survival_MB.shape
    falling_MB = np.zeros((requests, size), dtype=np.float32)
    for i in range(requests):
        least = np.float32(np.inf)
        for k in range(min(caps_M[i], size)):
            least = min(least, np.float32(survival_MB[i, k]))
            falling_MB[i, k] = least
    return falling_MB


@compiled
def correct(survival_MB: Survival, rows_M: Rows, factors_NB: Survival) -> Survival:
    """Survivals times the corrections of their rows, at most 1."""
    corrected_MB = np.empty_like(survival_MB)
    for i in range(len(rows_M)):
        for k in range(survival_MB.shape[1]):
            corrected_MB[i, k] = min(survival_MB[i, k] * factors_NB[rows_M[i], k], np.float32(1))
    return corrected_MB
