"""How many replicas the work needs: one pure function, and its shape for Ray Serve.

Every term is a **sum over replicas**, so that a replica that has just started
and reports next to nothing changes nothing. A mean would fall at once when it
appears, and the deployment would flap. Accepted length is no term: the
scheduler lowers it on purpose when load is high, so it says nothing about how
much work there is.

Ray Serve carries this module to its controller by value, where it runs every
100 ms: nothing but the standard library may be imported here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

KV_TARGET = 0.8
"""Share of a replica's cache that may be full on average: above it, prompts begin to wait for room."""

SCALE_OUT_FILL = 1.05
"""Replicas are added when the ones there are would be filled beyond this: averages waver about what they measure."""

SCALE_IN_FILL = 0.85
"""A replica is given up only if the others would then be filled to at most this share: work wavers by more than 0."""

MAX_GROWTH = 2.0
"""Times the running replicas, the most that one decision asks for: what measures too much is asked again."""

RUNNING, WAITING, KV_USAGE = "running", "waiting", "kv_cache_usage"
SLO_REQUESTS, SLO_RATIO = "slo_requests", "slo_ratio"


@dataclass(frozen=True)
class ReplicaReport:
    """What one replica said about itself, averaged over the look-back period.

    Attributes:
        running: Sequences in a decoding slot.
        waiting: Sequences queued for one.
        kv_cache_usage: Share of its cache in use, 0 to 1.
        slo_requests: R_slo, the most sequences that it decodes within the latency target (see
            :func:`requests_within`).
        slo_ratio: Measured time per output token over the target, 0 while it decodes nothing.
    """

    running: float = 0.0
    waiting: float = 0.0
    kv_cache_usage: float = 0.0
    slo_requests: float = 1.0
    slo_ratio: float = 0.0


@dataclass(frozen=True)
class Fleet:
    """The deployment as the decision sees it.

    Attributes:
        reports: Of the replicas that have reported.
        num_running: Replicas that take requests, reported or not.
        num_wanted: Replicas that earlier decisions asked for.
        num_queued: Requests that no replica has taken yet.
    """

    reports: Sequence[ReplicaReport]
    num_running: int
    num_wanted: int
    num_queued: float = 0.0


@dataclass(frozen=True)
class Decision:
    """How many replicas, and why.

    Attributes:
        num_replicas: The wish, before Serve's delays and bounds.
        by_requests: sum(running + waiting) / R_slo.
        by_cache: sum(cache usage) / 0.8.
        by_latency: sum(time per token / target), 0 while nothing waits.
    """

    num_replicas: int
    by_requests: float
    by_cache: float
    by_latency: float


def decide(fleet: Fleet) -> Decision:
    """The replicas that the work needs.

    The latency term is *current x measured / target* with the mean over
    replicas written as a sum: an idle replica adds nothing to it. It counts
    only while something waits: slow tokens alone may come from a long prompt,
    and another replica would not help the requests that already decode.

    - More work never means fewer replicas.
    - More are asked for if those there are would be filled beyond 105 %, fewer
      if they would then be filled to at most 85 %.
    - While a running replica has not reported, its share of the work is
      unknown and nothing is given up.
    """
    reports = fleet.reports
    waiting = sum(r.waiting for r in reports) + fleet.num_queued
    requests = sum(r.running for r in reports) + waiting
    each = sum(max(r.slo_requests, 1.0) for r in reports) / len(reports) if reports else math.inf
    by_requests = requests / each
    by_cache = sum(r.kv_cache_usage for r in reports) / KV_TARGET
    by_latency = sum(r.slo_ratio for r in reports) if waiting > 0 else 0.0
    need = max(by_requests, by_cache, by_latency)
    num = max(1, math.ceil(min(need / SCALE_OUT_FILL, MAX_GROWTH * max(fleet.num_running, 1))))
    if num < fleet.num_wanted:
        is_known = len(reports) >= fleet.num_running > 0
        num = min(fleet.num_wanted, max(1, math.ceil(need / SCALE_IN_FILL))) if is_known else fleet.num_wanted
    return Decision(num, by_requests, by_cache, by_latency)


def requests_within(step_ms: Callable[[int], float], target_ms: float, most: int) -> int:
    """R_slo: the most requests whose predicted time per output token meets the target.

    Predicted without speculation, one token per request and step: the
    scheduler verifies more only where that pays, so this is an upper bound of
    the time per token, and it does not depend on how well the draft does.

    Args:
        step_ms: Predicted duration of a plain step with that many requests; not falling.
        target_ms: The most that a token may take.
        most: The replica's decoding slots, which no answer exceeds.

    Returns:
        1 to ``most``; 1 also where not even one request meets the target.
    """
    low, high = 1, max(most, 1)
    while low < high:
        middle = (low + high + 1) // 2
        if step_ms(middle) <= target_ms:
            low = middle
        else:
            high = middle - 1
    return low


class WorkPolicy:
    """The decision as a policy of Ray Serve, which applies delays and bounds to its wish.

    Args:
        max_requests: Decoding slots of a replica; stands for R_slo until a replica reports its own.
    """

    def __init__(self, max_requests: int) -> None:
        self._max_requests = max_requests

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """The wish.

        Args:
            context: ``ray.serve.config.AutoscalingContext``.

        Returns:
            Replicas, and what to keep until the next decision (nothing).
        """
        reports = reports_from(context.aggregated_metrics or {}, self._max_requests)
        fleet = Fleet(
            reports, context.current_num_replicas, context.target_num_replicas, context.total_queued_requests or 0.0
        )
        return decide(fleet).num_replicas, {}


def reports_from(metrics: Mapping[str, Mapping[Any, float]], max_requests: int) -> list[ReplicaReport]:
    """Reports by replica from Serve's metrics by name; a replica that reported no load yet is left out."""
    defaults = {SLO_REQUESTS: float(max_requests)}
    names = (RUNNING, WAITING, KV_USAGE, SLO_REQUESTS, SLO_RATIO)
    return [
        ReplicaReport(*(metrics.get(name, {}).get(replica, defaults.get(name, 0.0)) for name in names))
        for replica in metrics.get(RUNNING, {})
    ]
