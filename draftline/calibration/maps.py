"""Maps from confidence logits to the probability that a prefix survives; numpy only.

Three kinds. Each reads at position k only the logits of positions up to k, so a
schedule made from it anticipates nothing (paper section 3.2.2); each rises with
every logit and never rises from one position to the next.

====================  ==========================================================
:class:`Temperatures` a_k = prod_{i<=k} sigmoid(logit_i / T_i), the paper's (3.2.1)
:class:`SlopesAndBiases` a_k = prod_{i<=k} sigmoid(w_i logit_i + b_i), after Platt
:class:`Curves`       a_k = min_{i<=k} f_i(prod_{j<=i} sigmoid(logit_j)), f_i monotone
====================  ==========================================================

A logit that is not a number counts as certain rejection: nothing is known, so
nothing behind it is worth verifying.

Dimension letters: R requests or recorded blocks, B positions of a block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_LIMIT = 60.0
"""Logits beyond this are certainties; exp stays finite."""


@runtime_checkable
class SurvivalMap(Protocol):
    """Maps confidence logits to cumulative survival."""

    @property
    def num_positions(self) -> int:
        """Positions it knows, B at most."""
        ...

    def survival(self, logits_RB: Array) -> Array:
        """Cumulative survival ``[R, B]``, in 0..1; arguments as :meth:`Calibration.survival`."""
        ...

    def to_json(self) -> dict[str, Any]:
        """The parameters."""
        ...


@dataclass(frozen=True)
class Temperatures:
    """Sequential temperature scaling.

    Attributes:
        temperatures: T_k divides the confidence logit at position k; 1 leaves it.

    Raises:
        ValueError: a temperature is not above 0 and finite, or there is none.
    """

    temperatures: tuple[float, ...]

    def __post_init__(self) -> None:
        """See the class."""
        _check(self.temperatures, "temperatures", lowest=0.0)

    @property
    def num_positions(self) -> int:
        """See :class:`SurvivalMap`."""
        return len(self.temperatures)

    def survival(self, logits_RB: Array) -> Array:
        """See :class:`SurvivalMap`."""
        scaled_BR = logits_RB.T / self._temperatures_B1[: logits_RB.shape[1]]
        return _products(scaled_BR).T

    def to_json(self) -> dict[str, Any]:
        """See :class:`SurvivalMap`."""
        return {"temperatures": list(self.temperatures)}

    @cached_property
    def _temperatures_B1(self) -> Array:
        return np.asarray(self.temperatures)[:, None]


@dataclass(frozen=True)
class SlopesAndBiases:
    """A slope and a bias per position (Platt 1999), on the cumulative product.

    Attributes:
        slopes: w_k, above 0, so that confidences keep their order.
        biases: b_k.

    Raises:
        ValueError: a slope is not above 0, a number is not finite, or their counts differ.
    """

    slopes: tuple[float, ...]
    biases: tuple[float, ...]

    def __post_init__(self) -> None:
        """See the class."""
        _check(self.slopes, "slopes", lowest=0.0)
        _check(self.biases, "biases")
        if len(self.slopes) != len(self.biases):
            raise ValueError(f"{len(self.slopes)} slopes but {len(self.biases)} biases")

    @property
    def num_positions(self) -> int:
        """See :class:`SurvivalMap`."""
        return len(self.slopes)

    def survival(self, logits_RB: Array) -> Array:
        """See :class:`SurvivalMap`."""
        positions = logits_RB.shape[1]
        slopes_B1, biases_B1 = self._columns
        return _products(logits_RB.T * slopes_B1[:positions] + biases_B1[:positions]).T

    def to_json(self) -> dict[str, Any]:
        """See :class:`SurvivalMap`."""
        return {"slopes": list(self.slopes), "biases": list(self.biases)}

    @cached_property
    def _columns(self) -> tuple[Array, Array]:
        return np.asarray(self.slopes)[:, None], np.asarray(self.biases)[:, None]


@dataclass(frozen=True)
class Curves:
    """A monotone curve per position, from the raw cumulative survival to the calibrated one.

    Linear between its knots, level outside them.

    Attributes:
        predicted: Knots' raw survival, rising strictly, a tuple a position.
        observed: Their calibrated survival, in 0..1, never falling.

    Raises:
        ValueError: a curve is empty, falls, leaves 0..1, or its counts differ.
    """

    predicted: tuple[tuple[float, ...], ...]
    observed: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        """See the class."""
        if not self.predicted or len(self.predicted) != len(self.observed):
            raise ValueError(f"{len(self.predicted)} positions predicted but {len(self.observed)} observed")
        for position, (xs, ys) in enumerate(zip(self.predicted, self.observed, strict=True), 1):
            _check(xs, f"predicted survival at position {position}")
            _check(ys, f"observed survival at position {position}")
            if len(xs) != len(ys) or any(b <= a for a, b in pairwise(xs)):
                raise ValueError(f"the knots at position {position} do not rise: {xs} to {ys}")
            if any(b < a for a, b in pairwise(ys)) or not 0 <= ys[0] <= ys[-1] <= 1:
                raise ValueError(f"the curve at position {position} falls or leaves 0..1: {ys}")

    @property
    def num_positions(self) -> int:
        """See :class:`SurvivalMap`."""
        return len(self.predicted)

    def survival(self, logits_RB: Array) -> Array:
        """See :class:`SurvivalMap`."""
        survival_BR = _products(logits_RB.T)
        for k, (xs, ys) in enumerate(self._knots[: len(survival_BR)]):
            survival_BR[k] = np.interp(survival_BR[k], xs, ys)
            if k:
                np.minimum(survival_BR[k], survival_BR[k - 1], out=survival_BR[k])
        # Level to the left of the first knot would promise something where nothing is known.
        unknown_RB = np.isnan(logits_RB)
        if unknown_RB.any():
            survival_BR[np.logical_or.accumulate(unknown_RB.T, axis=0)] = 0.0
        return survival_BR.T

    def to_json(self) -> dict[str, Any]:
        """See :class:`SurvivalMap`."""
        return {"predicted": [list(xs) for xs in self.predicted], "observed": [list(ys) for ys in self.observed]}

    @cached_property
    def _knots(self) -> list[tuple[Array, Array]]:
        return [(np.asarray(xs), np.asarray(ys)) for xs, ys in zip(self.predicted, self.observed, strict=True)]


def sigmoid(logits: Array) -> Array:
    """1 / (1 + exp(-x)); 0 of what is not a number."""
    # fmax and fmin pass over NaN where clip keeps it. In place from here: this runs in every engine step.
    out: Array = np.fmin(np.fmax(logits, -_LIMIT), _LIMIT)
    np.negative(out, out=out)
    np.exp(out, out=out)
    out += 1
    np.reciprocal(out, out=out)
    return out


def map_from_json(method: str, parameters: Mapping[str, Any]) -> SurvivalMap:
    """The map that a calibration file holds.

    Raises:
        KeyError: a parameter is missing.
        TypeError: a parameter is not of its kind.
        ValueError: the method is unknown, or a parameter impossible.
    """
    if method in ("raw", "sts"):
        return Temperatures(_numbers(parameters["temperatures"]))
    if method == "bias":
        return SlopesAndBiases(_numbers(parameters["slopes"]), _numbers(parameters["biases"]))
    if method == "isotonic":
        predicted, observed = parameters["predicted"], parameters["observed"]
        return Curves(tuple(_numbers(xs) for xs in predicted), tuple(_numbers(ys) for ys in observed))
    raise ValueError(f"unknown method {method!r}")


def _products(logits_BR: Array) -> Array:
    """Cumulative products over positions, ``[B, R]``; position first, where numpy is three times as fast."""
    survival_BR = sigmoid(logits_BR)
    for k in range(1, len(survival_BR)):
        survival_BR[k] *= survival_BR[k - 1]
    return survival_BR


def _numbers(values: Any) -> tuple[float, ...]:
    if isinstance(values, str):
        raise TypeError(f"text {values!r} where numbers belong")
    return tuple(float(value) for value in values)


def _check(values: tuple[float, ...], what: str, lowest: float = -np.inf) -> None:
    if not values or not all(np.isfinite(value) and value > lowest for value in values):
        raise ValueError(f"impossible {what}: {values}")
