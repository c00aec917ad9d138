"""Which drafted tokens a step verifies: five rules over one view of the step; without torch.

A rule may use a position's confidence for that position and later ones of the
same block, never for earlier ones: the confidence at k is computed from
x_1..x_{k-1}, so a length that depends on later confidences depends on the token
it decides about, and the output would no longer follow the target's law
(paper section 3.2.2 and appendix A).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from draftline.scheduling.allocation import allocate, first_stop, gain_curve
from draftline.spec import ServingSpec

Array = NDArray[np.float64]
Survival = NDArray[np.floating]
Lengths = NDArray[np.int64]


@dataclass(frozen=True)
class StepView:
    """A step after drafting, as a policy sees it. M requests have a block of B drafts.

    Attributes:
        predicted_MB: Calibrated survivals, or the running estimate for a draft
            without a confidence head; 0 where nothing may be verified.
        survival_MB: The same as corrected by each request's past steps.
        caps_M: Drafts that may be verified at most: a request near its end
            needs fewer, and a proposer may have drafted fewer.
        num_requests: All decoding requests, R; each gets the target's own token.
        cost_K: Milliseconds of the step by draft tokens, drafting included;
            empty where costs are not known.
        budget: Slots of the step, from survivals that are two steps old.
        floor: Survival below which no slot pays at that budget.
        first_request: Ties of a position start here; turns with the step's number.
    """

    predicted_MB: Survival
    survival_MB: Survival
    caps_M: Lengths
    num_requests: int
    cost_K: Array
    budget: int = 0
    floor: float = 0.0
    first_request: int = 0


class LengthPolicy(Protocol):
    """Chooses how much of each block is verified; keeps no state, so one object serves many engines."""

    @property
    def wants_draft(self) -> bool:
        """Whether drafting is of any use."""
        ...

    @property
    def is_adaptive(self) -> bool:
        """Whether drafting is left out where it would cost more than it brings; needs the costs of steps."""
        ...

    def lengths(self, view: StepView) -> Lengths:
        """Drafts to verify of each block, 0 to the block size; the caller applies ``caps_M``."""
        ...


class OffPolicy:
    """Plain decoding."""

    wants_draft = False
    is_adaptive = False

    def lengths(self, view: StepView) -> Lengths:
        """See :class:`LengthPolicy`."""
        return np.zeros(len(view.caps_M), dtype=np.int64)


class FixedPolicy:
    """The whole block, or its first ``length`` tokens; 1 is a one-token drafter (the paper's MTP-1 baseline)."""

    wants_draft = True
    is_adaptive = False

    def __init__(self, length: int | None = None) -> None:
        self._length = length

    def lengths(self, view: StepView) -> Lengths:
        """See :class:`LengthPolicy`."""
        return view.caps_M if self._length is None else np.minimum(view.caps_M, self._length)


class ThresholdPolicy:
    """Stops a request's prefix at the first survival below ``threshold``; knows neither load nor costs."""

    wants_draft = True
    is_adaptive = False

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold

    def lengths(self, view: StepView) -> Lengths:
        """See :class:`LengthPolicy`."""
        is_low = view.predicted_MB < self._threshold
        block = is_low.shape[1]
        lengths: Lengths = np.where(is_low.any(axis=1), is_low.argmax(axis=1), block)
        return lengths


class SyncPolicy:
    """Algorithm 1: this step's survivals, admitted one by one until throughput no longer rises.

    The stop at the first step that does not raise it is what keeps the output
    right; it is also what a jagged cost can trap.
    """

    wants_draft = True
    is_adaptive = True

    def lengths(self, view: StepView) -> Lengths:
        """See :class:`LengthPolicy`."""
        gain_K = gain_curve(view.survival_MB)
        budget = first_stop(gain_K, view.cost_K, view.num_requests)
        return allocate(view.survival_MB, budget, first_request=view.first_request)


class AsyncPolicy:
    """The budget comes from survivals two steps old, its slots go to the highest of this step (paper section 5.2).

    The budget is the best over all, so no jag of the cost curve traps it, and
    it cannot see this step. Slots that do not pay at the budget's price are
    left empty.
    """

    wants_draft = True
    is_adaptive = True

    def lengths(self, view: StepView) -> Lengths:
        """See :class:`LengthPolicy`."""
        return allocate(view.survival_MB, view.budget, floor=view.floor, first_request=view.first_request)


def policy_from_spec(serving: ServingSpec) -> LengthPolicy:
    """The policy that a serving spec names."""
    if serving.policy == "off":
        return OffPolicy()
    if serving.policy == "fixed":
        return FixedPolicy(serving.fixed_length)
    if serving.policy == "threshold":
        return ThresholdPolicy(serving.threshold)
    return SyncPolicy() if serving.policy == "sync" else AsyncPolicy()
