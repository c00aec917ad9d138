"""What a scheduling step costs, against the rule written out with a heap.

Usage: ``python -m benchmarks.scheduler_step [--requests 256] [--block 7]``

Deciding is what a step waits for: who drafts, the budget, the slots. Learning from what was accepted comes after it.
The aim is at most 200 microseconds for both, for 256 requests with blocks of 7. The heap does less: it gives out the
slots of Algorithm 1 and nothing else.
"""

from __future__ import annotations

import argparse
import heapq
import statistics
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from benchmarks.timing import alternating_medians_ms
from draftline.scheduling.costs import CostTable
from draftline.scheduling.policies import AsyncPolicy, LengthPolicy, SyncPolicy, ThresholdPolicy
from draftline.scheduling.scheduler import Scheduler, StepShape

_STEPS = 50


def main() -> None:
    """Print microseconds a step, and the ratio to the heap."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--block", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    requests, block = arguments.requests, arguments.block
    random = np.random.default_rng(0)
    survival = np.cumprod(random.uniform(0.4, 1, (_STEPS, requests, block)), axis=2)
    accepted = (random.random((_STEPS, requests, 1)) < survival).sum(axis=2)
    costs = _costs(requests, block)
    policies = {"async": AsyncPolicy(), "sync": SyncPolicy(), "threshold": ThresholdPolicy(0.3)}
    runs = {name: _Scheduled(policy, costs, survival, accepted) for name, policy in policies.items()}
    contenders: dict[str, Callable[[], object]] = {name: run.steps for name, run in runs.items()}
    curve = [
        costs.verify_cost(requests + k, requests) + costs.draft_cost(requests) for k in range(requests * block + 1)
    ]
    contenders["heap"] = lambda: [heap_step(blocks, curve) for blocks in survival]
    heap_us = 1000 * alternating_medians_ms(contenders, arguments.repeats)["heap"] / _STEPS
    print(f"{requests} requests, blocks of {block}: median microseconds a step")
    for name, run in runs.items():
        decide, learn = (statistics.median(times) / 1000 for times in (run.decide_ns, run.learn_ns))
        print(
            f"  {name:<10} decide {decide:6.1f}, learn {learn:6.1f}, together {decide + learn:6.1f}; "
            f"deciding is {heap_us / decide:.1f}x as quick as the heap"
        )
    print(f"  {'heap':<10} decide {heap_us:6.1f}")


def _costs(requests: int, block: int) -> CostTable:
    """Of an accelerator: flat at first, then by tokens; every draft token pays if it is likely enough."""
    counts = sorted({1, 16, 64, requests})
    verify = {(r, r * q): 12 + 0.004 * r * q + 0.002 * r for r in counts for q in (1, 4, block + 1)}
    return CostTable.from_points(verify, {r: 1 + 0.002 * r for r in counts})


class _Scheduled:
    """Steps of one scheduler, each part timed by itself."""

    def __init__(
        self, policy: LengthPolicy, costs: CostTable, survival: NDArray[np.float64], accepted: NDArray[np.int64]
    ) -> None:
        _, requests, block = survival.shape
        self._scheduler = Scheduler(policy, requests, block, costs)
        self._rows = np.array([self._scheduler.admit() for _ in range(requests)])
        self._place = np.argsort(self._rows)
        self._survival, self._accepted = survival, accepted
        self.decide_ns: list[int] = []
        self.learn_ns: list[int] = []

    def steps(self) -> None:
        """All steps once; drafting itself is not timed."""
        scheduler, shape = self._scheduler, StepShape(len(self._rows), mean_context=500)
        for survival, accepted in zip(self._survival, self._accepted, strict=True):
            started = time.perf_counter_ns()
            plan = scheduler.plan(self._rows, shape)
            planned = time.perf_counter_ns()
            drafting = self._place[plan.rows_M]
            blocks, outcome = survival[drafting], accepted[drafting]
            caps = np.full(len(drafting), survival.shape[1])
            drafted = time.perf_counter_ns()
            lengths = scheduler.lengths(blocks, caps)
            decided = time.perf_counter_ns()
            outcome = np.minimum(outcome, lengths)
            verified = time.perf_counter_ns()
            scheduler.observe(lengths, outcome)
            self.learn_ns.append(time.perf_counter_ns() - verified)
            self.decide_ns.append(planned - started + decided - drafted)


def heap_step(survival: NDArray[np.float64], cost: list[float]) -> list[int]:
    """Algorithm 1 as it reads: the likeliest next slot from a heap, until throughput does not rise."""
    rows = survival.tolist()
    lengths = [0] * len(rows)
    heap = [(-row[0], 0, request) for request, row in enumerate(rows)]
    heapq.heapify(heap)
    expected = float(len(rows))
    best, slots = expected / cost[0], 0
    while heap:
        negative, position, request = heapq.heappop(heap)
        throughput = (expected - negative) / cost[slots + 1]
        if throughput <= best:
            break
        best, slots, expected = throughput, slots + 1, expected - negative
        lengths[request] += 1
        if position + 1 < len(rows[request]):
            heapq.heappush(heap, (-rows[request][position + 1], position + 1, request))
    return lengths


if __name__ == "__main__":
    main()
