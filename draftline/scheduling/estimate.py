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
Rows = NDArray[np.int64]

DEFAULT_CONFIDENCE = 0.7
"""Of a draft of which nothing is known: about what chain drafters reach at temperature 1."""

HISTORY_BLOCKS = 8
_PRIOR_TRIALS = 8.0
_KEPT_PER_STEP = 0.98
_KEPT_PER_BLOCK = 1 - 1 / 16
_REQUEST_PRIOR_TOKENS = 2.0
_COMMON_PRIOR_TOKENS = 20.0
_MEAN_WEIGHT = 0.05
_HIGHEST_CORRECTION = 2.0


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
        self._history_NWB = np.zeros((num_rows, HISTORY_BLOCKS, block_size))
        self._next_N = np.zeros(num_rows, dtype=np.int64)
        self._pending: list[tuple[Rows, Array]] = []
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
        """Accepted over predicted drafts, all requests; 1 where predictions are right."""
        return (_COMMON_PRIOR_TOKENS + self._accepted) / (_COMMON_PRIOR_TOKENS + self._predicted)

    def correction(self, rows_M: Rows) -> Array:
        """Accepted over predicted drafts of each request, drawn to :attr:`common_correction`."""
        prior = _REQUEST_PRIOR_TOKENS
        found: Array = (prior * self.common_correction + self._accepted_N[rows_M]) / (prior + self._predicted_N[rows_M])
        return np.minimum(found, _HIGHEST_CORRECTION)

    def corrected(self, rows_M: Rows, survival: Array) -> Array:
        """Survivals ``[M, ..., B]`` as past steps of each request correct them; at most 1, still not rising."""
        factor = self.correction(rows_M).reshape(-1, *([1] * (survival.ndim - 1)))
        return np.minimum(survival * factor, 1.0)

    def history(self, rows_M: Rows, num_blocks: int = HISTORY_BLOCKS) -> Array:
        """Each request's latest blocks, corrected, ``[M, num_blocks, B]``; none is younger than two steps.

        A request with fewer blocks has the mean of all requests in their place.
        """
        places = (self._next_N[rows_M, None] - 1 - np.arange(num_blocks)) % HISTORY_BLOCKS
        return self.corrected(rows_M, self._history_NWB[rows_M[:, None], places])

    # -- what happened ------------------------------------------------------------------------------------------

    def admit(self, row: int) -> None:
        """A new request takes a row; nothing of the one before is kept."""
        self._history_NWB[row] = self._mean_B
        self._next_N[row] = 0
        self._accepted_N[row] = self._predicted_N[row] = 0.0
        self._admitted_N[row] = self._step

    def note_drafted(self, rows_M: Rows, survival_MB: Array) -> None:
        """Predictions of this step's blocks; they become history after the next step."""
        self._pending.append((rows_M, survival_MB))
        if len(rows_M):
            self._mean_B = self._mean_B + _MEAN_WEIGHT * (survival_MB.mean(axis=0) - self._mean_B)

    def note_verified(
        self, rows_M: Rows, predicted_MB: Array, lengths_M: Rows, accepted_M: Rows, *, is_estimate: bool
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
        position_B = np.arange(self.block_size)
        is_verified_MB = position_B < lengths_M[:, None]
        self._hits_B *= _KEPT_PER_STEP
        self._trials_B *= _KEPT_PER_STEP
        self._hits_B += (position_B < accepted_M[:, None]).sum(axis=0)
        self._trials_B += (is_verified_MB & (position_B <= accepted_M[:, None])).sum(axis=0)
        predicted_M = np.where(is_verified_MB, predicted_MB, 0.0).sum(axis=1)
        tried = rows_M[lengths_M > 0]
        self._accepted_N[tried] *= _KEPT_PER_BLOCK
        self._predicted_N[tried] *= _KEPT_PER_BLOCK
        self._accepted_N[rows_M] += accepted_M
        self._predicted_N[rows_M] += predicted_M
        if not is_estimate:
            self._accepted = _KEPT_PER_STEP * self._accepted + float(accepted_M.sum())
            self._predicted = _KEPT_PER_STEP * self._predicted + float(predicted_M.sum())

    def end_step(self) -> None:
        """The step is over; blocks of the step before it become history."""
        self._step += 1
        while len(self._pending) > 1:
            rows, survival = self._pending.pop(0)
            # A row that changed hands since belongs to a request that never drafted this block.
            stays = self._admitted_N[rows] < self._step - 1
            rows, survival = rows[stays], survival[stays]
            self._history_NWB[rows, self._next_N[rows] % HISTORY_BLOCKS] = survival
            self._next_N[rows] += 1


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

    def note(self, predicted_MB: Array, lengths_M: Rows, accepted_M: Rows) -> None:
        """Count a step's verified positions."""
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
