"""Which map a draft's confidences get: compared on requests that the fit has not seen, then fitted on all.

Dimension letters: N verified blocks, B positions of a block.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from draftline.calibration.fit import FITS
from draftline.calibration.maps import Array, Temperatures
from draftline.calibration.measures import ConfidenceMeasures, measure_confidences, survival_events
from draftline.calibration.survival import Calibration, Method
from draftline.errors import StepError

MIN_SAMPLES = 50
"""Blocks below which nothing is fitted: the standard error of a frequency would be above 0.07."""
NUM_FOLDS = 5
RULE = (
    "the simplest of raw, sts, bias and isotonic whose held-out Brier score, a mean over blocks and positions, "
    "lies within one standard error of the lowest"
)


@dataclass(frozen=True)
class VerifiedBlocks:
    """Blocks that were drafted with confidences and verified whole.

    Attributes:
        logits_NB: Confidence logits.
        num_accepted: Accepted drafts of each block.
        request_ids: Whose block it is. Blocks of one request are alike, so they
            are held out together.
    """

    logits_NB: Array
    num_accepted: Sequence[int]
    request_ids: Sequence[Hashable]


def fit_calibration(blocks: VerifiedBlocks, dataset: str, method: Literal["auto"] | Method = "auto") -> Calibration:
    """Fit every map, choose one, and fit it on all blocks.

    The figures in the result are those of predictions for requests that the fit
    had not seen (five-fold cross-validation by request). ``auto`` chooses by
    :data:`RULE`: the Brier score is a proper one, so it pays for right levels
    and for telling blocks apart, and like the gain of a verified draft it is
    weighed by probability and not by its logarithm. The standard error is that of
    the difference, by request (Breiman et al. 1984, section 3.4.3).

    Fewer than :data:`MIN_SAMPLES` blocks keep the raw confidences, whatever is
    asked for. Blocks of a single request cannot be compared on another: ``auto``
    is then the paper's ``sts``, with figures on the fitted blocks themselves.

    Args:
        blocks: What was decoded.
        dataset: Named in the file.
        method: ``auto``, or the map to take.

    Raises:
        StepError: a confidence is not a number.
    """
    _check(blocks.logits_NB)
    num_samples, block_size = blocks.logits_NB.shape
    if num_samples == 0:
        return Calibration.identity(block_size)
    events_NB = survival_events(blocks.num_accepted, block_size)
    if num_samples < MIN_SAMPLES:
        raw = measure_confidences(Calibration.identity(block_size).survival(blocks.logits_NB), events_NB)
        extra = _details(raw, raw) | {"held_out": {"num_blocks": num_samples, "too_few_to_fit": True}}
        return Calibration((1.0,) * block_size, dataset, num_samples, raw.ece, raw.ece, extra, "raw")
    request_N = _numbered(blocks.request_ids)
    predicted = _predictions(blocks.logits_NB, events_NB, request_N)
    measures = {name: measure_confidences(survival_NB, events_NB) for name, survival_NB in predicted.items()}
    chosen = method if method != "auto" else _choose(predicted, events_NB, request_N)
    extra = _details(measures["raw"], measures[chosen]) | {
        "candidates": {name: _figures(found) for name, found in measures.items()},
        "rule": RULE if method == "auto" else f"calibration.method is {method}",
        "held_out": {"num_requests": int(request_N.max()) + 1, "num_folds": _num_folds(request_N)},
    }
    temperatures = FITS["sts"](blocks.logits_NB, events_NB)
    assert isinstance(temperatures, Temperatures)
    return Calibration(
        temperatures.temperatures,
        dataset,
        num_samples,
        measures["raw"].ece,
        measures[chosen].ece,
        extra,
        chosen,
        None if chosen in ("raw", "sts") else FITS[chosen](blocks.logits_NB, events_NB),
    )


def _check(logits_NB: Array) -> None:
    unknown_NB = np.isnan(logits_NB)
    if unknown_NB.any():
        where = ", ".join(str(k + 1) for k in np.flatnonzero(unknown_NB.any(axis=0)))
        raise StepError(
            "the draft's confidences cannot be calibrated",
            got=f"NaN in {int(unknown_NB.any(axis=1).sum())} of {len(logits_NB)} blocks, at position {where}",
            expected="numbers",
            remedy="The confidence head is damaged: look at the training's confidence loss and train the draft again",
        )


def _numbered(request_ids: Sequence[Hashable]) -> NDArray[np.int64]:
    """Requests by order of appearance, ``[N]``."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(request, len(numbers)) for request in request_ids], dtype=np.int64)


def _num_folds(request_N: NDArray[np.int64]) -> int:
    return min(NUM_FOLDS, int(request_N.max()) + 1)


def _predictions(logits_NB: Array, events_NB: NDArray[np.bool_], request_N: NDArray[np.int64]) -> dict[Method, Array]:
    """Every method's survival of every block, by a fit that has not seen its request."""
    num_folds = _num_folds(request_N)
    fold_N = request_N % num_folds
    predicted: dict[Method, Array] = {}
    for name, fit in FITS.items():
        survival_NB = np.empty_like(logits_NB)
        for fold in range(num_folds):
            is_held = fold_N == fold
            is_seen = ~is_held if num_folds > 1 else is_held
            survival_NB[is_held] = fit(logits_NB[is_seen], events_NB[is_seen]).survival(logits_NB[is_held])
        predicted[name] = survival_NB
    return predicted


def _choose(predicted: Mapping[Method, Array], events_NB: NDArray[np.bool_], request_N: NDArray[np.int64]) -> Method:
    if _num_folds(request_N) == 1:
        return "sts"
    losses = {name: ((survival_NB - events_NB) ** 2).mean(axis=1) for name, survival_NB in predicted.items()}
    best = min(losses, key=lambda name: float(losses[name].mean()))
    for name, loss_N in losses.items():
        surplus_N = loss_N - losses[best]
        if surplus_N.mean() <= _standard_error(surplus_N, request_N):
            return name
    raise AssertionError("the best lies within any distance of itself")


def _standard_error(values_N: Array, request_N: NDArray[np.int64]) -> float:
    """Of the mean, when the values of one request go together (ratio estimator, Cochran 1977, section 9A)."""
    sizes = np.bincount(request_N)
    residuals = np.bincount(request_N, values_N) - sizes * values_N.mean()
    count = len(sizes)
    return float(np.sqrt(count / (count - 1) * (residuals**2).sum()) / len(values_N))


def _figures(measures: ConfidenceMeasures) -> dict[str, Any]:
    return {name: values for name, values in measures.to_json().items() if name != "reliability"}


def _details(before: ConfidenceMeasures, after: ConfidenceMeasures) -> dict[str, Any]:
    names = ("auc", "brier", "log_loss", "reliability")
    first, second = before.to_json(), after.to_json()
    return {name: second[name] for name in names} | {f"{name}_before": first[name] for name in names}
