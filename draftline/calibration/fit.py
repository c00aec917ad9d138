"""Fits of the three maps, left to right, earlier positions frozen; numpy and scipy's optimisers.

Dimension letters: N verified blocks, B positions of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from draftline.calibration.maps import Array, Curves, SlopesAndBiases, SurvivalMap, Temperatures, sigmoid
from draftline.calibration.measures import expected_calibration_error
from draftline.calibration.survival import Method

_GRID = np.exp(np.linspace(np.log(0.2), np.log(5.0), 97))
_MAX_KNOTS = 16
_KNOT_SAMPLES = 25
"""Blocks behind a knot at least; the standard error of a frequency is then 0.1 at most."""
_TINY = 1e-12


def fit_temperatures(logits_NB: Array, events_NB: NDArray[np.bool_]) -> Temperatures:
    """Sequential temperature scaling (paper 3.2.1): a grid search for the least ECE of the cumulative product.

    Args:
        logits_NB: Confidence logits of whole verified blocks.
        events_NB: Whether the first k drafts were all accepted.
    """
    temperatures: list[float] = []
    before_N = np.ones(len(logits_NB))
    for logit_N, event_N in zip(logits_NB.T, events_NB.T, strict=True):
        losses = [expected_calibration_error(before_N * sigmoid(logit_N / t), event_N) for t in _GRID]
        temperatures.append(float(_GRID[int(np.argmin(losses))]))
        before_N = before_N * sigmoid(logit_N / temperatures[-1])
    return Temperatures(tuple(temperatures))


def fit_slopes_and_biases(logits_NB: Array, events_NB: NDArray[np.bool_]) -> SlopesAndBiases:
    """Slope and bias per position that make the outcomes likeliest under the cumulative product (after Platt 1999).

    A weak prior, (log w)^2 / 2 + b^2 / 2 against the whole log-likelihood, keeps
    the parameters finite where only one outcome occurred, and leaves confidences
    alone that are right.

    Args:
        logits_NB: Confidence logits of whole verified blocks.
        events_NB: Whether the first k drafts were all accepted.
    """
    from scipy.optimize import minimize  # half a second to import, wanted by no server

    slopes: list[float] = []
    biases: list[float] = []
    before_N = np.ones(len(logits_NB))
    clipped_NB = np.clip(logits_NB, -60, 60)
    for logit_N, event_N in zip(clipped_NB.T, events_NB.T, strict=True):
        found = minimize(_loss(before_N, logit_N, event_N), np.zeros(2), jac=True, method="BFGS")
        slopes.append(float(np.exp(found.x[0])))
        biases.append(float(found.x[1]))
        before_N = before_N * sigmoid(slopes[-1] * logit_N + biases[-1])
    return SlopesAndBiases(tuple(slopes), tuple(biases))


def _loss(before_N: Array, logit_N: Array, event_N: NDArray[np.bool_]) -> Callable[[Array], tuple[float, Array]]:
    """Negative log-posterior of (log w, b) and its gradient, a block each on average."""
    count = max(1, len(logit_N))

    def loss(parameters: Array) -> tuple[float, Array]:
        slope = np.exp(np.clip(parameters[0], -5, 5))
        here_N = sigmoid(slope * logit_N + parameters[1])
        survival_N = before_N * here_N
        likelihood_N = np.where(event_N, survival_N, 1 - survival_N)
        # d log a / du = 1 - s, and d log(1 - a) / du = -a (1 - s) / (1 - a).
        pull_N = np.where(event_N, -1.0, survival_N / np.maximum(1 - survival_N, _TINY)) * (1 - here_N)
        value = -np.log(np.maximum(likelihood_N, _TINY)).sum() + 0.5 * float(parameters @ parameters)
        gradient = np.array([(pull_N * logit_N).sum() * slope, pull_N.sum()]) + parameters
        return float(value) / count, gradient / count

    return loss


def fit_curves(logits_NB: Array, events_NB: NDArray[np.bool_]) -> Curves:
    """Monotone curves by pooling adjacent violators, each position on its raw cumulative survival.

    Blocks go first into bins of equal counts, whose frequencies are smoothed by
    half an acceptance and half a rejection (Krichevsky and Trofimov 1981), so no
    curve promises certainty. A curve is linear between the centres of the pooled
    bins (Oron and Flournoy 2017): steps would tie blocks that confidences tell
    apart.

    Args:
        logits_NB: Confidence logits of whole verified blocks.
        events_NB: Whether the first k drafts were all accepted.
    """
    raw_NB = Temperatures((1.0,) * logits_NB.shape[1]).survival(logits_NB)
    curves = [_curve(raw_N, event_N) for raw_N, event_N in zip(raw_NB.T, events_NB.T, strict=True)]
    return Curves(tuple(xs for xs, _ in curves), tuple(ys for _, ys in curves))


def _curve(raw_N: Array, event_N: NDArray[np.bool_]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    from scipy.optimize import isotonic_regression

    order = np.argsort(raw_N, kind="stable")
    # Blocks of one prediction stay in one bin: cut apart they would differ by chance alone.
    ranked_N = raw_N[order]
    num_bins = max(1, min(_MAX_KNOTS, len(raw_N) // _KNOT_SAMPLES))
    wanted = np.arange(1, num_bins) * len(raw_N) // num_bins
    starts = np.unique(np.searchsorted(ranked_N, ranked_N[wanted], side="left"))
    parts = np.split(order, starts[starts > 0])
    counts = np.array([len(part) for part in parts], dtype=np.float64)
    frequencies = (np.array([event_N[part].sum() for part in parts]) + 0.5) / (counts + 1)
    pooled = isotonic_regression(frequencies, weights=counts + 1)
    centres: dict[float, float] = {}
    for start, end in zip(pooled.blocks[:-1], pooled.blocks[1:], strict=True):
        inside = np.concatenate(parts[start:end])
        centres[float(raw_N[inside].mean())] = float(np.clip(pooled.x[start], 0, 1))
    return tuple(centres), tuple(centres.values())


FITS: Mapping[Method, Callable[[Array, NDArray[np.bool_]], SurvivalMap]] = {
    "raw": lambda logits_NB, _: Temperatures((1.0,) * logits_NB.shape[1]),
    "sts": fit_temperatures,
    "bias": fit_slopes_and_biases,
    "isotonic": fit_curves,
}
"""By method, the simplest first."""
