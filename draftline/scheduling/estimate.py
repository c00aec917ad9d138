"""What past steps say about drafts to come: how often they survive, and whose; numpy only.

Everything here looks at finished steps, so nothing that is decided with it
depends on the drafts it is decided about.

Dimension letters: N rows (a request holds one from admission to its end),
W blocks kept per row, B positions, M rows of this step.
"""

from __future__ import annotations

from collections.abc import Sequence

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
_KEPT_PER_BLOCK = 1 - 1 / 16
_REQUEST_PRIOR_TRIALS = 1.0
_COMMON_PRIOR_TRIALS = 20.0
_MEAN_WEIGHT = 0.05
_REQUEST_MEAN_WEIGHT = 0.2
_HIGHEST_CORRECTION = 2.0
_MOST_COUNTED = 32
_TINY = np.float32(1e-30)


class AcceptanceEstimate:
    """Survival by position over all requests, and how each request differs from what is predicted.

    Args:
        num_rows: Requests at a time, N.
        block_size: B.
        prior_B: Mean survival by position as evaluated before serving; falls
            along the block. Without it every draft is taken to survive with
            probability 0.7 given its predecessors.
    """

    def __init__(self, num_rows: int, block_size: int, prior_B: Sequence[float] | None = None) -> None:
        self.block_size = block_size
        self._prior_B = _conditional(prior_B, block_size)
        self._hits_B = np.zeros(block_size)
        self._trials_B = np.zeros(block_size)
        self._mean_B: Array = np.cumprod(self._prior_B).astype(np.float64)
        self._accepted_N = np.zeros(num_rows)
        self._predicted_N = np.zeros(num_rows)
        self._accepted = 0.0
        self._predicted = 0.0
        self._ones_B = np.ones(block_size, dtype=np.float32)
        self._factors_BN = np.ones((block_size, num_rows), dtype=np.float32)
        self._history_NWB = np.zeros((num_rows, HISTORY_BLOCKS, block_size), dtype=np.float32)
        self._means_NB = np.zeros((num_rows, block_size), dtype=np.float32)
        self._next_N = np.zeros(num_rows, dtype=np.int64)
        self._pending: list[tuple[Rows, Survival]] = []
        self._admitted_N = np.zeros(num_rows, dtype=np.int64)
        self._step = 0

    def set_prior(self, prior_B: Sequence[float] | None) -> None:
        """Take another prior; what was seen since stays."""
        self._prior_B = _conditional(prior_B, self.block_size)
        if not self._step:
            self._mean_B = np.cumprod(self._prior_B).astype(np.float64)

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
        factors: Survival = self._factors_BN[0, rows_M]
        return factors

    def corrected(self, rows_M: Rows, survival: Survival) -> Survival:
        """Survivals ``[M, ..., B]`` as past steps of each request correct them; at most 1, still not rising."""
        factors = self._factors_BN[:, rows_M].T
        if survival.ndim == 3:
            factors = factors[:, None]
        corrected: Survival = np.minimum(survival * factors, np.float32(1))
        return corrected

    def _refresh(self, rows: Rows | int) -> None:
        """Factors of rows: below 1 a power by position, above 1 the same for all, so that survival does not rise."""
        prior = _REQUEST_PRIOR_TRIALS
        found = (prior * self.common_correction + self._accepted_N[rows]) / (prior + self._predicted_N[rows])
        factor = np.minimum(found, _HIGHEST_CORRECTION)
        self._factors_BN[0, rows] = factor
        lower = np.minimum(factor, 1.0)
        for k in range(1, self.block_size):
            self._factors_BN[k, rows] = factor = factor * lower

    def means(self, rows_M: Rows) -> Survival:
        """Mean survival of each request's latest blocks, corrected, ``[M, B]``; none is younger than two steps."""
        return self.corrected(rows_M, self._means_NB[rows_M])

    def history(self, rows_M: Rows, num_blocks: int) -> Survival:
        """Each request's latest blocks, corrected, ``[M, num_blocks, B]``; none is younger than two steps.

        A request with fewer blocks has the mean of all requests in their place.
        """
        places = (self._next_N[rows_M, None] - 1 - np.arange(num_blocks)) % HISTORY_BLOCKS
        return self.corrected(rows_M, self._history_NWB[rows_M[:, None], places])

    # -- what happened ------------------------------------------------------------------------------------------

    def admit(self, row: int) -> None:
        """A new request takes a row; nothing of the one before is kept."""
        self._history_NWB[row] = self._means_NB[row] = self._mean_B
        self._next_N[row] = 0
        self._accepted_N[row] = self._predicted_N[row] = 0.0
        self._refresh(row)
        self._admitted_N[row] = self._step

    def note_drafted(self, rows_M: Rows, survival_MB: Survival) -> None:
        """Predictions of this step's blocks; they become history after the next step."""
        self._pending.append((rows_M, survival_MB))
        if len(rows_M):
            some = survival_MB[:: -(-len(rows_M) // _MOST_COUNTED)]
            self._mean_B = self._mean_B + _MEAN_WEIGHT * (some.mean(axis=0) - self._mean_B)

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
        kept_M = np.where(tried_M > 0, _KEPT_PER_BLOCK, 1.0)
        self._accepted_N[rows_M] = kept_M * self._accepted_N[rows_M] + accepted_M
        self._predicted_N[rows_M] = kept_M * self._predicted_N[rows_M] + predicted_M
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
            rows, survival = self._pending.pop(0)
            # A row that changed hands since belongs to a request that never drafted this block.
            stays = self._admitted_N[rows] < self._step - 1
            if not stays.all():
                rows, survival = rows[stays], survival[stays]
            places = self._next_N[rows]
            self._history_NWB[rows, places % HISTORY_BLOCKS] = survival
            self._next_N[rows] = places + 1
            means = self._means_NB[rows]
            self._means_NB[rows] = means + _REQUEST_MEAN_WEIGHT * (survival - means)


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
