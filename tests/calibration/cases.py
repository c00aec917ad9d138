"""Confidences whose truth is known."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from draftline.calibration.choice import VerifiedBlocks

Array = NDArray[np.float64]


def sigmoid(x: Array) -> Array:
    """Plainly."""
    out: Array = 1 / (1 + np.exp(-x))
    return out


def drawn(right_NB: Array, seed: int) -> list[int]:
    """How many drafts are accepted when ``right_NB`` are the true logits."""
    is_accepted = np.random.default_rng(seed + 1000).random(right_NB.shape) < sigmoid(right_NB)
    return [int(row) for row in is_accepted.cumprod(axis=1).sum(axis=1)]


def normal_logits(count: int, block_size: int, seed: int) -> Array:
    """Around 1.5, three quarters accepted."""
    return np.random.default_rng(seed).normal(1.5, 1.2, (count, block_size))


def requests_of(count: int, each: int = 20) -> list[str]:
    """Request ids, ``each`` blocks a request."""
    return [f"request-{n // each}" for n in range(count)]


def blocks(reported_NB: Array, right_NB: Array, seed: int) -> VerifiedBlocks:
    """A draft that reports ``reported_NB`` where ``right_NB`` is right."""
    return VerifiedBlocks(reported_NB, drawn(right_NB, seed), requests_of(len(right_NB)))
