"""What past steps say about drafts to come: how often they survive, and whose; without torch.

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

from draftline.scheduling.loops import (
    MOST_COUNTED,
    PRICE_STEP,
    correct,
    count_accepted,
    exceed,
    expect,
    keep_blocks,
    recent_blocks,
    refresh_factors,
)

Array = NDArray[np.float64]
Survival = NDArray[np.float32]
"""Single precision sorts twice as fast, and no confidence is known to seven digits."""
Rows = NDArray[np.int64]
Flags = NDArray[np.bool_]

DEFAULT_CONFIDENCE = 0.7
"""Of a draft of which nothing is known: about what chain drafters reach at temperature 1."""

HISTORY_BLOCKS = 8
_PRIOR_TRIALS = 8.0
_KEPT_PER_STEP = 0.98
_KEPT_PER_BLOCK = 1 - 1 / 24
_COMMON_PRIOR_TRIALS = 20.0
_COMMON_BLOCKS = 64
_WEIGHT_BY_AGE = (0.5 + 0.5 * 0.97 ** np.maximum(0, np.arange(200) - 3)).astype(np.float32)
_FRACTIONS = ((np.arange(16) * 5 % 16 + 0.5) / 16).astype(np.float32)
_NUM_PRICES = round(1 / PRICE_STEP)


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
        self._counts_N3 = np.zeros((num_rows, 3))
        self._accepted = 0.0
        self._predicted = 0.0
        self._factors_NB = np.ones((num_rows, block_size), dtype=np.float32)
        self._history_NWB = np.zeros((num_rows, HISTORY_BLOCKS, block_size), dtype=np.float32)
        self._means_NB = np.zeros((num_rows, block_size), dtype=np.float32)
        self._surplus_NK = np.zeros((num_rows, _NUM_PRICES), dtype=np.float32)
        self._mean_surplus_K = _surplus_of(self._mean_B)
        self._common_CB = np.tile(self._mean_B.astype(np.float32), (_COMMON_BLOCKS, 1))
        self.num_blocks = 0
        self._next_N = np.zeros(num_rows, dtype=np.int64)
        self._pending: list[tuple[Rows, Survival, Flags]] = []
        self._last_N = np.zeros(num_rows, dtype=np.int64)
        self._admitted_N = np.zeros(num_rows, dtype=np.int64)
        self._step = 0

    def set_prior(self, prior_B: Sequence[float] | None) -> None:
        """Take another prior; what was seen since stays."""
        self._prior_B = _conditional(prior_B, self.block_size)
        if not self._step:
            self._mean_B = np.cumprod(self._prior_B).astype(np.float64)
            self._common_CB[:] = self._mean_B
            self._mean_surplus_K = _surplus_of(self._mean_B)

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

    def corrected(self, rows_M: Rows, survival_MB: Survival) -> Survival:
        """Survivals ``[M, B]`` as past steps of each request correct them; at most 1, still not rising."""
        return correct(survival_MB, rows_M, self._factors_NB)

    def outlook(self, rows_M: Rows) -> Outlook:
        """What is expected of the next blocks of some requests; nothing in it is younger than two steps."""
        own_M, surplus_MK, change_M = expect(
            rows_M,
            self._step,
            _WEIGHT_BY_AGE,
            self._next_N,
            self._last_N,
            self._factors_NB,
            self._means_NB,
            self._surplus_NK,
            self._mean_B,
            self._mean_surplus_K,
        )
        return Outlook(self, rows_M, own_M, surplus_MK, change_M)

    def recent_blocks(self, rows_M: Rows, own_M: Survival, num_blocks: int) -> Survival:
        """See :meth:`Outlook.history`.

        Args:
            rows_M: Requests.
            own_M: How much the past of each says of its future.
            num_blocks: Of each.
        """
        return recent_blocks(
            rows_M,
            own_M,
            num_blocks,
            self._step,
            _FRACTIONS,
            self._next_N,
            self._factors_NB,
            self._history_NWB,
            self._common_CB,
            min(self.num_blocks, _COMMON_BLOCKS),
        )

    # -- what happened ------------------------------------------------------------------------------------------

    def admit(self, row: int) -> None:
        """A new request takes a row; nothing of the one before is kept."""
        self._next_N[row] = 0
        self._counts_N3[row] = 0.0
        refresh_factors(np.array([row]), self.common_correction, self._counts_N3, self._factors_NB)
        self._admitted_N[row] = self._step

    def note_drafted(self, rows_M: Rows, survival_MB: Survival, fair_M: NDArray[np.bool_] | None = None) -> None:
        """Predictions of this step's blocks; they become history after the next step.

        Args:
            rows_M: Requests that drafted.
            survival_MB: Uncorrected.
            fair_M: Those that were not chosen for how well their drafts do: others are no guide to all requests.
        """
        is_fair_M = np.ones(len(rows_M), dtype=np.bool_) if fair_M is None else fair_M
        self._pending.append((rows_M, survival_MB, is_fair_M))

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
        hits_B, trials_B = np.empty((2, self.block_size), dtype=np.int64)
        accepted, predicted = count_accepted(
            rows_M, predicted_MB, lengths_M, accepted_M, _KEPT_PER_BLOCK, self._counts_N3, hits_B, trials_B
        )
        if is_estimate:
            self._hits_B = _KEPT_PER_STEP * self._hits_B + hits_B
            self._trials_B = _KEPT_PER_STEP * self._trials_B + trials_B
        else:
            self._accepted = _KEPT_PER_STEP * self._accepted + accepted
            self._predicted = _KEPT_PER_STEP * self._predicted + predicted
        refresh_factors(rows_M, self.common_correction, self._counts_N3, self._factors_NB)

    def end_step(self) -> None:
        """The step is over; blocks of the step before it become history."""
        self._step += 1
        while len(self._pending) > 1:
            rows_M, survival_MB, is_fair_M = self._pending.pop(0)
            self.num_blocks = keep_blocks(
                rows_M,
                survival_MB,
                is_fair_M,
                self._step,
                self._admitted_N,
                self._next_N,
                self._last_N,
                self._factors_NB,
                self._history_NWB,
                self._means_NB,
                self._surplus_NK,
                self._mean_B,
                self._mean_surplus_K,
                self._common_CB,
                self.num_blocks,
            )


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

    def exceed(self, price: float, least: float) -> Flags:
        """Requests whose survivals exceed a price by more than ``least``, summed over those of a block that do.

        That is what a block brings beyond its verification if only the slots
        that pay are verified; a mean over blocks. The surplus of mean
        survivals would be less: it hides that good blocks can be picked out.
        """
        return exceed(self.surplus_MK, self.change_M, price, least)

    def history(self, chosen_M: NDArray[np.bool_], num_blocks: int) -> Survival:
        """The latest blocks of some of the requests, corrected, ``[chosen, num_blocks, B]``.

        A request that has none yet has some of all requests' latest in their
        place, not their mean: to pick slots out, one must know how blocks differ.
        """
        return self.estimate.recent_blocks(self.rows_M[chosen_M], self.own_M[chosen_M], num_blocks)


def _surplus_of(survival_B: Array) -> Array:
    """By how much a block exceeds each price, summed over positions where it does."""
    above_KB = survival_B - PRICE_STEP * np.arange(_NUM_PRICES)[:, None]
    surplus_K: Array = np.maximum(above_KB, 0).sum(axis=1)
    return surplus_K


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
        if self._turn % -(-max(1, len(lengths_M)) // MOST_COUNTED):
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
