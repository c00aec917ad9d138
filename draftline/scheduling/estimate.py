"""What past steps say about drafts to come: how often they survive, and whose; numpy only.

Everything here looks at finished steps, so nothing that is decided with it
depends on the drafts it is decided about.

Dimension letters: N rows (a request holds one from admission to its end),
W blocks kept per row, B positions, M rows of this step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Survival = NDArray[np.float32]
"""Single precision sorts twice as fast, and no confidence is known to seven digits."""
Rows = NDArray[np.int64]

DEFAULT_CONFIDENCE = 0.7
"""Of a draft of which nothing is known: about what chain drafters reach at temperature 1."""

HISTORY_BLOCKS = 8
_PRIOR_TRIALS = 8.0
_KEPT_PER_STEP = 0.98
_KEPT_PER_BLOCK = 1 - 1 / 24
_CHANCE = 0.5
_REQUEST_PRIOR_TRIALS = 1.0
_COMMON_PRIOR_TRIALS = 20.0
_FAIR_WEIGHT = 0.03
_REQUEST_MEAN_WEIGHT = 0.2
_HIGHEST_CORRECTION = 2.0
_MOST_COUNTED = 32
_COMMON_BLOCKS = 64
_WEIGHT_BY_AGE = (0.5 + 0.5 * 0.97 ** np.maximum(0, np.arange(200) - 3)).astype(np.float32)
_FRACTIONS = ((np.arange(16) * 5 % 16 + 0.5) / 16).astype(np.float32)
_NUM_PRICES = 8
_PRICE_STEP = 1 / _NUM_PRICES
_PRICES = (np.arange(_NUM_PRICES) * _PRICE_STEP).astype(np.float32)
_TINY = np.float32(1e-30)


class AcceptanceEstimate:
    """Survival by position over all requests, and how each request differs from what is predicted.

    Args:
        num_rows: Requests at a time, N.
        block_size: B.
        prior_B: Mean survival by position as evaluated before serving; falls
            along the block. Without it every draft is taken to survive with
            probability 0.7 given its predecessors.

    Attributes:
        num_blocks: Blocks it has seen, of large steps only some.
    """

    def __init__(self, num_rows: int, block_size: int, prior_B: Sequence[float] | None = None) -> None:
        self.block_size = block_size
        self._prior_B = _conditional(prior_B, block_size)
        self._hits_B = np.zeros(block_size)
        self._trials_B = np.zeros(block_size)
        self._mean_B: Array = np.cumprod(self._prior_B).astype(np.float64)
        self._accepted_N = np.zeros(num_rows)
        self._predicted_N = np.zeros(num_rows)
        self._variance_N = np.zeros(num_rows)
        self._accepted = 0.0
        self._predicted = 0.0
        self._ones_B = np.ones(block_size, dtype=np.float32)
        self._factors_NB = np.ones((num_rows, block_size), dtype=np.float32)
        self._history_NWB = np.zeros((num_rows, HISTORY_BLOCKS, block_size), dtype=np.float32)
        self._means_NB = np.zeros((num_rows, block_size), dtype=np.float32)
        self._surplus_NK = np.zeros((num_rows, _NUM_PRICES), dtype=np.float32)
        self._mean_surplus_K = self._surplus_of(self._mean_B[None].astype(np.float32))[0]
        self._common_CB = np.tile(self._mean_B.astype(np.float32), (_COMMON_BLOCKS, 1))
        self.num_blocks = 0
        self._next_N = np.zeros(num_rows, dtype=np.int64)
        self._pending: list[tuple[Rows, Survival, Rows]] = []
        self._last_N = np.zeros(num_rows, dtype=np.int64)
        self._admitted_N = np.zeros(num_rows, dtype=np.int64)
        self._step = 0

    def set_prior(self, prior_B: Sequence[float] | None) -> None:
        """Take another prior; what was seen since stays."""
        self._prior_B = _conditional(prior_B, self.block_size)
        if not self._step:
            self._mean_B = np.cumprod(self._prior_B).astype(np.float64)
            self._common_CB[:] = self._mean_B
            self._mean_surplus_K = self._surplus_of(self._mean_B[None].astype(np.float32))[0]

    # -- what is expected ---------------------------------------------------------------------------------------

    @property
    def survival_B(self) -> Array:
        """Survival by position from what was accepted: for drafts that predict nothing themselves."""
        conditional = (_PRIOR_TRIALS * self._prior_B + self._hits_B) / (_PRIOR_TRIALS + self._trials_B)
        return np.cumprod(conditional).astype(np.float64)

    @property
    def common_correction(self) -> float:
        """How often drafts are accepted over how often that was predicted, all requests; 1 where predictions are right.

        It speaks of single drafts given their predecessors, so k of them in a row are off by its k-th power.
        """
        return (_COMMON_PRIOR_TRIALS + self._accepted) / (_COMMON_PRIOR_TRIALS + self._predicted)

    def correction(self, rows_M: Rows) -> Survival:
        """The same of each request, drawn to :attr:`common_correction`."""
        factors: Survival = self._factors_NB[rows_M, 0]
        return factors

    def corrected(self, rows_M: Rows, survival: Survival) -> Survival:
        """Survivals ``[M, ..., B]`` as past steps of each request correct them; at most 1, still not rising."""
        factors = self._factors_NB.take(rows_M, axis=0)
        if survival.ndim == 3:
            factors = factors[:, None]
        corrected: Survival = np.minimum(survival * factors, np.float32(1))
        return corrected

    def _refresh(self, rows: Rows) -> None:
        """Factors of rows: below 1 a power by position, above 1 the same for all, so that survival does not rise.

        A deviation within half its standard error is taken for chance: powers
        of noise would lower what is expected of everybody.
        """
        common = self.common_correction
        expected = common * self._predicted_N[rows]
        excess = self._accepted_N[rows] - expected
        chance = _CHANCE * np.sqrt(self._variance_N[rows])
        excess = np.sign(excess) * np.maximum(np.abs(excess) - chance, 0)
        found = common * (1 + excess / (_REQUEST_PRIOR_TRIALS + expected))
        first = np.minimum(found, _HIGHEST_CORRECTION).astype(np.float32)
        lower = np.minimum(first, np.float32(1))
        factors_BM = np.empty((self.block_size, len(rows)), dtype=np.float32)
        factors_BM[0] = first
        for k in range(1, self.block_size):
            np.multiply(factors_BM[k - 1], lower, out=factors_BM[k])
        self._factors_NB[rows] = factors_BM.T

    def outlook(self, rows_M: Rows) -> Outlook:
        """What is expected of the next blocks of some requests; nothing in it is younger than two steps."""
        surplus_MK, means_MB = self._surplus_NK.take(rows_M, axis=0), self._means_NB.take(rows_M, axis=0)
        own_M = self._weight_of_own(rows_M)
        if own_M.min() < 1:
            surplus_MK = self._mean_surplus_K + own_M[:, None] * (surplus_MK - self._mean_surplus_K)
            mean_B = self._mean_B.astype(np.float32)
            means_MB = mean_B + own_M[:, None] * (means_MB - mean_B)
        # Blocks were noted as they were corrected then; what has been learned since moves all of them.
        now_M = self.corrected(rows_M, means_MB) @ self._ones_B
        return Outlook(self, rows_M, own_M, surplus_MK, now_M / (surplus_MK[:, 0] + _TINY))

    def recent_blocks(self, rows_M: Rows, own_M: Survival, num_blocks: int) -> Survival:
        """See :meth:`Outlook.history`.

        Args:
            rows_M: Requests.
            own_M: How much the past of each says of its future.
            num_blocks: Of each.
        """
        places_MW = (self._next_N.take(rows_M)[:, None] - 1 - np.arange(num_blocks)) % HISTORY_BLOCKS
        blocks_CB = self._history_NWB.reshape(-1, self.block_size)
        history_MWB = blocks_CB.take(rows_M[:, None] * HISTORY_BLOCKS + places_MW, axis=0)
        # Of those that have not drafted for long, the share of requests that the weight of their own past says.
        is_other_M = own_M < _FRACTIONS[(np.arange(len(rows_M)) + self._step) % len(_FRACTIONS)]
        if is_other_M.any():
            some = np.arange(int(is_other_M.sum()) * num_blocks) % max(1, min(self.num_blocks, _COMMON_BLOCKS))
            history_MWB[is_other_M] = self._common_CB[some].reshape(-1, num_blocks, self.block_size)
        return self.corrected(rows_M, history_MWB)

    def _weight_of_own(self, rows_M: Rows) -> Survival:
        """How much a request's own blocks say of its next: texts change, and drafting stops where it went badly."""
        ages_M = np.minimum(self._step - self._last_N[rows_M], len(_WEIGHT_BY_AGE) - 1)
        weights: Survival = _WEIGHT_BY_AGE[ages_M]
        weights[self._next_N[rows_M] == 0] = 0
        return weights

    # -- what happened ------------------------------------------------------------------------------------------

    def admit(self, row: int) -> None:
        """A new request takes a row; nothing of the one before is kept."""
        self._next_N[row] = 0
        self._accepted_N[row] = self._predicted_N[row] = self._variance_N[row] = 0.0
        self._refresh(np.array([row]))
        self._admitted_N[row] = self._step

    def note_drafted(self, rows_M: Rows, survival_MB: Survival, fair_M: NDArray[np.bool_] | None = None) -> None:
        """Predictions of this step's blocks; they become history after the next step.

        Args:
            rows_M: Requests that drafted.
            survival_MB: Uncorrected.
            fair_M: Those that were not chosen for how well their drafts do: others are no guide to all requests.
        """
        self._pending.append((rows_M, survival_MB, rows_M if fair_M is None else rows_M[fair_M]))

    def note_verified(
        self, rows_M: Rows, predicted_MB: Survival, lengths_M: Rows, accepted_M: Rows, *, is_estimate: bool
    ) -> None:
        """Count what was accepted of what was verified.

        Args:
            rows_M: Requests that verified something or not.
            predicted_MB: Uncorrected survivals.
            lengths_M: Drafts verified.
            accepted_M: Of those, accepted.
            is_estimate: The predictions are :attr:`survival_B`, which learns by
                itself: no common correction on top.
        """
        # The last position tried is the first rejected one, or the last verified.
        tried_M = np.minimum(lengths_M, accepted_M + 1)
        confidence_MB = predicted_MB.copy()
        confidence_MB[:, 1:] /= predicted_MB[:, :-1] + _TINY
        confidence_MB *= np.arange(self.block_size) < tried_M[:, None]
        predicted_M = confidence_MB @ self._ones_B
        variance_M = predicted_M - (confidence_MB * confidence_MB) @ self._ones_B
        kept_M = np.where(tried_M > 0, _KEPT_PER_BLOCK, 1.0)
        self._accepted_N[rows_M] = kept_M * self._accepted_N[rows_M] + accepted_M
        self._predicted_N[rows_M] = kept_M * self._predicted_N[rows_M] + predicted_M
        self._variance_N[rows_M] = kept_M * self._variance_N[rows_M] + variance_M
        if is_estimate:
            self._hits_B = _KEPT_PER_STEP * self._hits_B + _num_above(accepted_M, self.block_size)
            self._trials_B = _KEPT_PER_STEP * self._trials_B + _num_above(tried_M, self.block_size)
        else:
            self._accepted = _KEPT_PER_STEP * self._accepted + float(accepted_M.sum())
            self._predicted = _KEPT_PER_STEP * self._predicted + float(predicted_M.sum())
        self._refresh(rows_M)

    def end_step(self) -> None:
        """The step is over; blocks of the step before it become history."""
        self._step += 1
        while len(self._pending) > 1:
            rows, survival, fair = self._pending.pop(0)
            # A row that changed hands since belongs to a request that never drafted this block.
            stays = self._admitted_N[rows] < self._step - 1
            if not stays.all():
                rows, survival = rows[stays], survival[stays]
            if len(rows):
                self._keep(
                    rows, survival, np.isin(rows, fair) if len(fair) < len(rows) else np.ones(len(rows), np.bool_)
                )

    def _keep(self, rows: Rows, survival: Survival, is_fair: NDArray[np.bool_]) -> None:
        places = self._next_N[rows]
        self._history_NWB[rows, places % HISTORY_BLOCKS] = survival
        self._next_N[rows] = places + 1
        surplus_MK = self._surplus_of(self.corrected(rows, survival))
        means, surplus = self._means_NB[rows], self._surplus_NK[rows]
        is_new = places == 0
        if is_new.any():
            means[is_new], surplus[is_new] = self._mean_B, self._mean_surplus_K
        self._means_NB[rows] = means + _REQUEST_MEAN_WEIGHT * (survival - means)
        self._surplus_NK[rows] = surplus + _REQUEST_MEAN_WEIGHT * (surplus_MK - surplus)
        self._last_N[rows] = self._step
        stride = -(-len(rows) // _MOST_COUNTED)
        counted = np.flatnonzero(is_fair)[::stride]
        if not len(counted):
            return
        some, surplus_CK = survival[counted], surplus_MK[counted]
        weight = 1 - (1 - _FAIR_WEIGHT) ** len(some)
        self._mean_B = self._mean_B + weight * (some.mean(axis=0) - self._mean_B)
        self._mean_surplus_K += weight * (surplus_CK.mean(axis=0) - self._mean_surplus_K)
        self._common_CB[(self.num_blocks + np.arange(len(some))) % _COMMON_BLOCKS] = some
        self.num_blocks += len(some)

    def _surplus_of(self, survival_MB: Survival) -> Survival:
        """At prices of 0, 1/8, ..., 7/8, ``[M, K]``; at 1 there is none."""
        above_KMB: Survival = survival_MB - _PRICES[:, None, None]
        np.maximum(above_KMB, 0, out=above_KMB)
        surplus_KM: Survival = above_KMB.reshape(-1, self.block_size) @ self._ones_B
        return surplus_KM.reshape(_NUM_PRICES, len(survival_MB)).T


@dataclass(frozen=True)
class Outlook:
    """What is expected of the next blocks of M requests, from blocks at least two steps old.

    Attributes:
        estimate: Where it comes from.
        rows_M: The requests.
        own_M: How much the past of each says of its future; the rest is what is usual.
        surplus_MK: Of their past blocks, by price.
        change_M: By how much the blocks' sums have changed since they were noted, by what was learned.
    """

    estimate: AcceptanceEstimate
    rows_M: Rows
    own_M: Survival
    surplus_MK: Survival
    change_M: Survival

    def surplus(self, price: float) -> Survival:
        """By how much survivals of a block exceed a price, summed over those that do; a mean over blocks.

        That is what a block brings beyond its verification if only the slots
        that pay are verified. The surplus of mean survivals would be less: it
        hides that good blocks can be picked out.
        """
        place = price / _PRICE_STEP
        lower = int(place)
        if lower >= _NUM_PRICES:
            return np.zeros(len(self.rows_M), dtype=np.float32)
        below_M = self.surplus_MK[:, lower]
        above_M: Survival | float = self.surplus_MK[:, lower + 1] if lower + 1 < _NUM_PRICES else 0.0
        surplus: Survival = below_M + np.float32(place - lower) * (above_M - below_M)
        return surplus * self.change_M

    def history(self, chosen_M: NDArray[np.bool_], num_blocks: int) -> Survival:
        """The latest blocks of some of the requests, corrected, ``[chosen, num_blocks, B]``.

        A request that has none yet has some of all requests' latest in their
        place, not their mean: to pick slots out, one must know how blocks differ.
        """
        return self.estimate.recent_blocks(self.rows_M[chosen_M], self.own_M[chosen_M], num_blocks)


def _num_above(counts_M: Rows, block_size: int) -> Rows:
    """How many counts are above k, for k = 0 to ``block_size - 1``."""
    of_each = np.bincount(counts_M, minlength=block_size + 1)
    above: Rows = len(counts_M) - np.cumsum(of_each[:block_size])
    return above


def _conditional(survival_B: Sequence[float] | None, block_size: int) -> Array:
    if survival_B is None:
        return np.full(block_size, DEFAULT_CONFIDENCE)
    # A shorter prior says nothing of later positions, a longer one too much.
    known = np.minimum.accumulate(np.clip(np.asarray(survival_B, dtype=np.float64)[:block_size], 1e-3, 1.0))
    conditional = known / np.concatenate(([1.0], known[:-1]))
    return np.pad(conditional, (0, block_size - len(known)), constant_values=DEFAULT_CONFIDENCE)


class CalibrationError:
    """Running ECE and Brier score of predicted survival against what was accepted.

    Positions that were verified count, each "the first k drafts were all
    accepted" one event. Older steps fade.

    Args:
        num_bins: Of equal width, for the ECE.
        kept_per_step: Weight that past events keep at every step.
    """

    def __init__(self, num_bins: int = 10, kept_per_step: float = 0.995) -> None:
        self._num_bins = num_bins
        self._kept = kept_per_step
        self._count = np.zeros(num_bins)
        self._predicted = np.zeros(num_bins)
        self._observed = np.zeros(num_bins)
        self._squares = 0.0
        self._turn = 0

    def note(self, predicted_MB: Survival, lengths_M: Rows, accepted_M: Rows) -> None:
        """Count a step's verified positions; of large steps every so many, which is enough for a running figure."""
        self._turn += 1
        if self._turn % -(-max(1, len(lengths_M)) // _MOST_COUNTED):
            return
        position_B = np.arange(predicted_MB.shape[1])
        is_verified = position_B < lengths_M[:, None]
        predicted = predicted_MB[is_verified]
        observed = np.broadcast_to(position_B < accepted_M[:, None], is_verified.shape)[is_verified]
        bins = np.minimum((predicted * self._num_bins).astype(np.int64), self._num_bins - 1)
        for total, weights in (
            (self._count, None),
            (self._predicted, predicted),
            (self._observed, observed.astype(np.float64)),
        ):
            total *= self._kept
            total += np.bincount(bins, weights, minlength=self._num_bins)
        self._squares = self._kept * self._squares + float(((predicted - observed) ** 2).sum())

    @property
    def ece(self) -> float:
        """Expected calibration error; 0 before the first event."""
        count = self._count.sum()
        return float(np.abs(self._predicted - self._observed).sum() / count) if count > 0 else 0.0

    @property
    def brier(self) -> float:
        """Mean squared difference (Brier 1950); 0 before the first event."""
        count = self._count.sum()
        return float(self._squares / count) if count > 0 else 0.0
