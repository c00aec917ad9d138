"""Sequential temperature scaling and its measures (paper section 3.2.1); numpy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from draftline.calibration.survival import Calibration

NUM_BINS = 10
_GRID = np.exp(np.linspace(np.log(0.2), np.log(5.0), 97))
_MIN_SAMPLES = 50

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


def fit_temperatures(logits_NB: Array, num_accepted: Sequence[int], dataset: str) -> Calibration:
    """Fit one temperature per position, left to right, earlier ones frozen.

    Each minimises the ECE of the cumulative product against "the first k
    drafts were all accepted". Positions with fewer than 50 samples keep the
    raw confidence.

    Args:
        logits_NB: Confidence logits of whole verified blocks.
        num_accepted: Accepted drafts of each.
        dataset: Named in the file.
    """
    num_samples, block_size = logits_NB.shape
    events = survival_events(num_accepted, block_size)
    temperatures: list[float] = []
    before, after = np.ones(num_samples), np.ones(num_samples)
    raw_errors, errors, raw_curves, curves, aucs = [], [], [], [], []
    for k in range(block_size):
        raw = before * _sigmoid(logits_NB[:, k])
        best = 1.0
        if num_samples >= _MIN_SAMPLES:
            losses = [expected_calibration_error(after * _sigmoid(logits_NB[:, k] / t), events[:, k]) for t in _GRID]
            best = float(_GRID[int(np.argmin(losses))])
        scaled = after * _sigmoid(logits_NB[:, k] / best)
        temperatures.append(best)
        raw_errors.append(expected_calibration_error(raw, events[:, k]))
        errors.append(expected_calibration_error(scaled, events[:, k]))
        aucs.append(area_under_curve(scaled, events[:, k]))
        raw_curves.append(reliability(raw, events[:, k]))
        curves.append(reliability(scaled, events[:, k]))
        before, after = raw, scaled
    extra = {"auc": [None if np.isnan(a) else a for a in aucs], "reliability": curves, "reliability_before": raw_curves}
    return Calibration(tuple(temperatures), dataset, num_samples, tuple(raw_errors), tuple(errors), extra)


def _sigmoid(logits: Array) -> Array:
    out: Array = 1 / (1 + np.exp(-np.clip(logits, -60, 60)))
    return out


def _bins(predicted: Array, observed: NDArray[np.bool_], num_bins: int) -> list[tuple[float, float, int]]:
    order = np.argsort(predicted, kind="stable")
    parts = [part for part in np.array_split(order, min(num_bins, len(order))) if len(part)]
    return [(float(predicted[p].mean()), float(observed[p].mean()), len(p)) for p in parts]
