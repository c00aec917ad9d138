"""How good confidences are, and what verifying less would bring; numpy only.

Dimension letters: N verified blocks, B positions of a block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

NUM_BINS = 10
THRESHOLDS = tuple(round(0.1 * step, 1) for step in range(9))
"""Of the sweep: 0 to 0.8, as in the paper's figure."""

Array = NDArray[np.float64]


def survival_events(num_accepted: Sequence[int], block_size: int) -> NDArray[np.bool_]:
    """``[N, B]``: whether the first k drafts were all accepted, for whole blocks verified."""
    events: NDArray[np.bool_] = np.asarray(num_accepted)[:, None] > np.arange(block_size)[None]
    return events


def expected_calibration_error(predicted: Array, observed: NDArray[np.bool_], num_bins: int = NUM_BINS) -> float:
    """ECE over bins of equal counts: mean absolute gap between predicted and observed frequency."""
    if len(predicted) == 0:
        return float("nan")
    total = sum(abs(p - o) * n for p, o, n in _bins(predicted, observed, num_bins))
    return float(total / len(predicted))


def brier_score(predicted: Array, observed: NDArray[np.bool_]) -> float:
    """Mean squared difference of prediction and outcome (Brier 1950); NaN of nothing."""
    return float(np.mean((predicted - observed) ** 2)) if len(predicted) else float("nan")


def log_loss(predicted: Array, observed: NDArray[np.bool_]) -> float:
    """Mean negative log-likelihood of the outcomes in nats, predictions a millionth off 0 and 1; NaN of nothing."""
    if len(predicted) == 0:
        return float("nan")
    kept = np.clip(predicted, 1e-6, 1 - 1e-6)
    return float(-np.mean(np.log(np.where(observed, kept, 1 - kept))))


def area_under_curve(predicted: Array, observed: NDArray[np.bool_]) -> float:
    """ROC AUC by ranks (ties share theirs); NaN when only one outcome occurs."""
    positives = int(observed.sum())
    negatives = len(observed) - positives
    if positives == 0 or negatives == 0:
        return float("nan")
    _, inverse, counts = np.unique(predicted, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks = (last - (counts - 1) / 2)[inverse]
    return float((ranks[observed].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def reliability(predicted: Array, observed: NDArray[np.bool_], num_bins: int = NUM_BINS) -> list[dict[str, float]]:
    """Points of a reliability diagram: mean prediction, observed frequency, count."""
    return [
        {"predicted": float(p), "observed": float(o), "count": float(n)}
        for p, o, n in _bins(predicted, observed, num_bins)
    ]


@dataclass(frozen=True)
class ConfidenceMeasures:
    """Quality of the predicted survival a_k of "the first k drafts are all accepted", a value a position.

    Attributes:
        ece: Expected calibration error.
        brier: Mean squared error.
        log_loss: Mean negative log-likelihood, nats.
        auc: Area under the ROC curve, NaN where only one outcome occurred.
        reliability: Points of the reliability diagram.
    """

    ece: tuple[float, ...]
    brier: tuple[float, ...]
    log_loss: tuple[float, ...]
    auc: tuple[float, ...]
    reliability: tuple[list[dict[str, float]], ...]

    def to_json(self) -> dict[str, Any]:
        """Plain mapping; an AUC that does not exist is ``None``."""
        return {
            "ece": list(self.ece),
            "brier": list(self.brier),
            "log_loss": list(self.log_loss),
            "auc": [None if math.isnan(value) else value for value in self.auc],
            "reliability": list(self.reliability),
        }


def measure_confidences(survival_NB: Array, events_NB: NDArray[np.bool_]) -> ConfidenceMeasures:
    """Compare predicted survival with what happened.

    Args:
        survival_NB: Cumulative products of (scaled) confidences.
        events_NB: Whether the first k drafts were all accepted.
    """
    columns = [(survival_NB[:, k], events_NB[:, k]) for k in range(survival_NB.shape[1])]
    return ConfidenceMeasures(
        tuple(expected_calibration_error(p, o) for p, o in columns),
        tuple(brier_score(p, o) for p, o in columns),
        tuple(log_loss(p, o) for p, o in columns),
        tuple(area_under_curve(p, o) for p, o in columns),
        tuple(reliability(p, o) for p, o in columns),
    )


@dataclass(frozen=True)
class SweepPoint:
    """What stopping at a survival threshold would verify and accept.

    Attributes:
        threshold: A block is verified up to the first a_k below it.
        acceptance_rate: Accepted of the verified drafts, NaN when none is verified.
        verified_length: Mean drafts verified per block.
        accepted_length: Mean tokens per target step, the target's own included.
    """

    threshold: float
    acceptance_rate: float
    verified_length: float
    accepted_length: float

    def to_json(self) -> dict[str, float | None]:
        """Plain mapping; a rate that does not exist is ``None``."""
        rate = None if math.isnan(self.acceptance_rate) else self.acceptance_rate
        return {**asdict(self), "acceptance_rate": rate}


def sweep_thresholds(
    survival_NB: Array, num_accepted: Sequence[int], thresholds: Sequence[float] = THRESHOLDS
) -> list[SweepPoint]:
    """Acceptance rate and lengths at several thresholds, from blocks that were verified whole.

    For each block the figure is what a threshold would have done with it:
    cutting a block changes neither the drafts before the cut nor the verdicts
    on them (greedy: the very same; sampled: the same in law). What is not the
    same is which blocks there are. Cut blocks end earlier, so a real run at a
    threshold starts its blocks at other places than the run that was recorded;
    that is left out, at temperature 0 too.

    Args:
        survival_NB: Calibrated survival.
        num_accepted: Accepted drafts of each block, verified whole.
        thresholds: To be tried.
    """
    block = survival_NB.shape[1]
    accepted_N = np.asarray(num_accepted)
    points = []
    for threshold in thresholds:
        is_low = survival_NB < threshold
        length_N = np.where(is_low.any(axis=1), is_low.argmax(axis=1), block)
        kept_N = np.minimum(accepted_N, length_N)
        verified = int(length_N.sum())
        rate = float(kept_N.sum() / verified) if verified else math.nan
        points.append(SweepPoint(threshold, rate, float(length_N.mean()), float(1 + kept_N.mean())))
    return points


def _bins(predicted: Array, observed: NDArray[np.bool_], num_bins: int) -> list[tuple[float, float, int]]:
    order = np.argsort(predicted, kind="stable")
    parts = [part for part in np.array_split(order, min(num_bins, len(order))) if len(part)]
    return [(float(predicted[p].mean()), float(observed[p].mean()), len(p)) for p in parts]
