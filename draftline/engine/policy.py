"""How many drafted tokens each request verifies; bookkeeping without torch.

A length may depend on a token's predecessors but never on the token itself:
the confidence at position k is computed from x_1..x_{k-1}, and a prefix rule
that stops at the first low survival reads nothing later. So every policy here
is non-anticipating and leaves the output law unchanged (paper section 3.2.2).
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from draftline.spec import ServingSpec


class LengthPolicy(Protocol):
    """Chooses how much of each block is verified."""

    @property
    def wants_draft(self) -> bool:
        """Whether drafting is of any use."""
        ...

    @property
    def backs_off(self) -> bool:
        """Whether requests pause drafting while it brings nothing."""
        ...

    def lengths(self, survival_RB: NDArray[np.float64] | None, block_size: int, num_requests: int) -> list[int]:
        """Tokens to verify per request, 0 to ``block_size``.

        Args:
            survival_RB: Calibrated cumulative survival, or ``None`` without a
                confidence head.
            block_size: gamma.
            num_requests: R.
        """
        ...


class OffPolicy:
    """Plain decoding."""

    wants_draft = False
    backs_off = False

    def lengths(self, survival_RB: NDArray[np.float64] | None, block_size: int, num_requests: int) -> list[int]:
        """See :class:`LengthPolicy`."""
        return [0] * num_requests


class FixedPolicy:
    """The whole block, or its first ``length`` tokens."""

    wants_draft = True
    backs_off = False

    def __init__(self, length: int | None = None) -> None:
        self._length = length

    def lengths(self, survival_RB: NDArray[np.float64] | None, block_size: int, num_requests: int) -> list[int]:
        """See :class:`LengthPolicy`."""
        length = block_size if self._length is None else min(self._length, block_size)
        return [length] * num_requests


class ThresholdPolicy:
    """Stops a request's prefix at the first cumulative survival below ``threshold``."""

    wants_draft = True
    backs_off = True

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold

    def lengths(self, survival_RB: NDArray[np.float64] | None, block_size: int, num_requests: int) -> list[int]:
        """See :class:`LengthPolicy`."""
        if survival_RB is None:
            return [block_size] * num_requests
        is_low = survival_RB < self._threshold
        first_low = np.where(is_low.any(axis=1), is_low.argmax(axis=1), block_size)
        return [int(n) for n in first_low]


def policy_from_spec(serving: ServingSpec) -> LengthPolicy:
    """The policy that a serving spec names."""
    if serving.policy == "off":
        return OffPolicy()
    if serving.policy == "fixed":
        return FixedPolicy()
    return ThresholdPolicy(serving.threshold)
