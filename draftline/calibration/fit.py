"""Sequential temperature scaling (paper section 3.2.1); numpy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from draftline.calibration.measures import Array, expected_calibration_error, measure_confidences, survival_events
from draftline.calibration.survival import Calibration

_GRID = np.exp(np.linspace(np.log(0.2), np.log(5.0), 97))
MIN_SAMPLES = 50


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
    before = np.ones(num_samples)
    for k in range(block_size):
        best = 1.0
        if num_samples >= MIN_SAMPLES:
            losses = [expected_calibration_error(before * _sigmoid(logits_NB[:, k] / t), events[:, k]) for t in _GRID]
            best = float(_GRID[int(np.argmin(losses))])
        temperatures.append(best)
        before = before * _sigmoid(logits_NB[:, k] / best)
    raw = measure_confidences(Calibration.identity(block_size).survival(logits_NB), events)
    fitted = Calibration(tuple(temperatures), dataset, num_samples)
    scaled = measure_confidences(fitted.survival(logits_NB), events)
    extra = {
        "auc": scaled.to_json()["auc"],
        "auc_before": raw.to_json()["auc"],
        "brier": list(scaled.brier),
        "brier_before": list(raw.brier),
        "reliability": list(scaled.reliability),
        "reliability_before": list(raw.reliability),
    }
    return Calibration(tuple(temperatures), dataset, num_samples, raw.ece, scaled.ece, extra)


def _sigmoid(logits: Array) -> Array:
    out: Array = 1 / (1 + np.exp(-np.clip(logits, -60, 60)))
    return out
