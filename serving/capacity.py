"""How many requests one replica holds within its latency target, and how it does now."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Protocol

from serving.autoscaling import requests_within

StepCost = Callable[[int], float]
"""Predicted milliseconds of a step with that many requests and one token each."""


class DecayingMean:
    """A mean that forgets with a half-life, so that it speaks of the last seconds whatever the rate; thread-safe.

    Args:
        half_life_s: After this long a value counts half.
        clock: Seconds that only grow.
    """

    def __init__(self, half_life_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._decay = math.log(2) / half_life_s
        self._clock = clock
        self._lock = threading.Lock()
        self._sum = self._weight = 0.0
        self._last_s = clock()

    def add(self, value: float, weight: float = 1.0) -> None:
        """Take one value in."""
        with self._lock:
            now_s = self._clock()
            kept = math.exp(-self._decay * (now_s - self._last_s))
            self._sum = self._sum * kept + value * weight
            self._weight = self._weight * kept + weight
            self._last_s = now_s

    @property
    def mean(self) -> float:
        """Of what was taken in; NaN before the first."""
        with self._lock:
            return self._sum / self._weight if self._weight > 0 else math.nan


class LatencyTarget:
    """R_slo and the measured time per token against the target.

    Args:
        target_tpot_ms: Most milliseconds per output token of one request.
        max_requests: Decoding slots.
    """

    def __init__(self, target_tpot_ms: float = math.inf, max_requests: int = 0) -> None:
        self._target_ms = target_tpot_ms
        self._max_requests = max_requests
        self._bound_ms = target_tpot_ms
        self.slo_requests = max_requests

    def use(self, step_cost: StepCost | None) -> None:
        """Take the costs that belong to the draft in use; without any, every slot counts as within the target.

        Where the table says that not even one request alone meets the target,
        its cost takes the target's place: replicas cannot make a step faster,
        and asking for more of them would never end.
        """
        if step_cost is None:
            self.slo_requests, self._bound_ms = self._max_requests, self._target_ms
            return
        self.slo_requests = requests_within(step_cost, self._target_ms, self._max_requests)
        self._bound_ms = max(self._target_ms, step_cost(1))

    def ratio(self, tpot_s: float) -> float:
        """Measured time per output token over the target; 0 when nothing was measured."""
        return 1000 * tpot_s / self._bound_ms if math.isfinite(tpot_s) else 0.0


class StepCosts(Protocol):
    """The scheduler's cost table, as far as it is read here."""

    @property
    def overhead_ms(self) -> float:
        """Of a step whatever its size."""
        ...

    def verify_cost(self, tokens: int, requests: int, mean_context: float | None = None, /) -> float:
        """Milliseconds of the target's forward."""
        ...


def plain_step_cost(costs: StepCosts | None) -> StepCost | None:
    """Cost of plain steps, from the table that the scheduler goes by; ``None`` without one."""
    if costs is None:
        return None
    return lambda requests: costs.verify_cost(requests, requests) + costs.overhead_ms
