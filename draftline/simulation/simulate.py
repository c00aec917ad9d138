"""An engine's steps in simulated time, with the engine's own scheduler; numpy only.

What is simulated is the machine and the text: the clock moves by the cost
table, drafts are accepted as :mod:`draftline.simulation.traffic` draws them.
Who drafts, how much is verified and what is learned from it is
:class:`~draftline.scheduling.scheduler.Scheduler`, called as the engine calls it.

Prompts are read in chunks inside the decoding steps, as in the engine.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from draftline.scheduling.costs import CostTable
from draftline.scheduling.policies import AsyncPolicy, FixedPolicy, LengthPolicy, OffPolicy, SyncPolicy, ThresholdPolicy
from draftline.scheduling.scheduler import Scheduler, Segments, StepShape
from draftline.simulation.machines import BLOCK_SIZE
from draftline.simulation.traffic import Drafts, RequestFacts, Traffic

POLICIES: Mapping[str, LengthPolicy] = {
    "off": OffPolicy(),
    "fixed 1": FixedPolicy(1),
    "fixed 7": FixedPolicy(),
    "threshold": ThresholdPolicy(0.3),
    "sync": SyncPolicy(),
    "async": AsyncPolicy(),
}
"""Compared ones; ``fixed 1`` is a one-token drafter."""


@dataclass(frozen=True)
class Load:
    """How requests come, and for how long.

    Attributes:
        num_users: Closed loop: each asks again as soon as it is answered. 0 for an open one.
        requests_per_s: Open loop: Poisson arrivals.
        num_steps: Measured steps.
        warmup_steps: Steps before them.
        max_requests: In the engine at a time; others wait.
        prefill_tokens: Prompt tokens of a step at most.
    """

    num_users: int = 0
    requests_per_s: float = 0.0
    num_steps: int = 400
    warmup_steps: int = 100
    max_requests: int = 1024
    prefill_tokens: int = 2048


@dataclass(frozen=True)
class Outcome:
    """What came out of one policy at one load.

    Attributes:
        policy: Its name.
        concurrency: Requests decoding at a time, mean.
        tokens_per_s: Output tokens of all.
        tokens_per_s_per_user: While decoding, mean over decoding requests.
        mean_budget: Drafts verified per decoding request and step.
        accepted_length: Tokens per decoding request and step.
        step_ms: Mean.
        first_token_ms: Median from arrival, NaN where no request arrived.
        num_finished: Requests.
    """

    policy: str
    concurrency: float
    tokens_per_s: float
    tokens_per_s_per_user: float
    mean_budget: float
    accepted_length: float
    step_ms: float
    first_token_ms: float
    num_finished: int


@dataclass
class _Running:
    facts: RequestFacts
    row: int
    arrived_ms: float
    prompt_left: int
    output_left: int
    context: int


@dataclass
class _Counts:
    steps: int = 0
    tokens: int = 0
    decoding: int = 0
    verified: int = 0
    finished: int = 0
    elapsed_ms: float = 0.0
    decoding_ms: float = 0.0
    first_token_ms: list[float] = field(default_factory=list)


class Simulation:
    """One engine under one load.

    Args:
        policy: How much is verified.
        costs: What the scheduler believes.
        traffic: Who asks for what.
        load: How requests come.
        machine: What steps take; what the scheduler believes unless given.
    """

    def __init__(
        self, policy: LengthPolicy, costs: CostTable, traffic: Traffic, load: Load, machine: CostTable | None = None
    ) -> None:
        self._machine = machine or costs
        self._traffic, self._load = traffic, load
        rows = load.max_requests if not load.num_users else min(load.num_users, load.max_requests)
        self._scheduler = Scheduler(policy, rows, BLOCK_SIZE, costs)
        self._drafts = Drafts(traffic, rows, BLOCK_SIZE)
        self._num_rows = rows
        self._running: list[_Running] = []
        self._waiting: deque[tuple[RequestFacts, float]] = deque()
        self._next_number = 0
        self._now_ms = 0.0
        self._arrivals = np.random.default_rng([traffic.seed, 2**31 + 1])
        self._next_arrival_ms = self._gap_ms() if load.requests_per_s else np.inf
        self._counts = _Counts()
        for _ in range(load.num_users):
            self._ask(0.0)
        self._start_in_the_middle()

    def run(self, name: str) -> Outcome:
        """Warm up, measure, report."""
        for _ in range(self._load.warmup_steps):
            self._step()
        self._counts = _Counts()
        for _ in range(self._load.num_steps):
            self._step()
        counts = self._counts
        seconds = counts.elapsed_ms / 1000
        return Outcome(
            policy=name,
            concurrency=counts.decoding / max(1, counts.steps),
            tokens_per_s=counts.tokens / seconds,
            tokens_per_s_per_user=1000 * counts.tokens / max(counts.decoding_ms, 1e-9),
            mean_budget=counts.verified / max(1, counts.decoding),
            accepted_length=counts.tokens / max(1, counts.decoding),
            step_ms=counts.elapsed_ms / max(1, counts.steps),
            first_token_ms=float(np.median(counts.first_token_ms)) if counts.first_token_ms else float("nan"),
            num_finished=counts.finished,
        )

    # -- arrivals -----------------------------------------------------------------------------------------------

    def _ask(self, now_ms: float) -> None:
        self._waiting.append((self._traffic.request(self._next_number), now_ms))
        self._next_number += 1

    def _gap_ms(self) -> float:
        return float(self._arrivals.exponential(1000 / self._load.requests_per_s))

    def _admit(self) -> None:
        while self._next_arrival_ms <= self._now_ms:
            self._ask(self._next_arrival_ms)
            self._next_arrival_ms += self._gap_ms()
        if not self._waiting and not self._running and np.isfinite(self._next_arrival_ms):
            idle_ms = self._next_arrival_ms - self._now_ms
            self._counts.elapsed_ms += idle_ms
            self._now_ms = self._next_arrival_ms
            self._admit()
            return
        while self._waiting and len(self._running) < self._num_rows:
            facts, arrived_ms = self._waiting.popleft()
            row = self._scheduler.admit()
            self._drafts.reset(row, facts.level)
            self._running.append(
                _Running(facts, row, arrived_ms, facts.prompt_tokens, facts.output_tokens, facts.prompt_tokens)
            )

    def _start_in_the_middle(self) -> None:
        """A closed loop begins as it goes on: prompts read, answers at any point."""
        self._admit()
        random = np.random.default_rng([self._traffic.seed, 2**31 + 2])
        for request in self._running:
            request.prompt_left = 0
            written = int(random.random() * request.output_left)
            request.output_left -= written
            request.context += written

    # -- a step -------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        self._admit()
        decoding = [r for r in self._running if not r.prompt_left]
        prefilling, prompt_tokens = self._chunks()
        shape = StepShape(
            len(decoding),
            prompt_tokens,
            len(prefilling),
            float(np.mean([r.context for r in decoding])) if decoding else None,
        )
        rows_E = np.array([r.row for r in decoding if r.output_left > 1], dtype=np.int64)
        plan = self._scheduler.plan(rows_E, shape)
        by_row = {r.row: r for r in decoding}
        drafting = [by_row[int(row)] for row in plan.rows_M]
        caps_M = np.array([min(BLOCK_SIZE, r.output_left - 1) for r in drafting], dtype=np.int64)
        lengths_M = accepted_M = np.zeros(0, dtype=np.int64)
        if drafting:
            logits_MB, would_accept_M = self._drafts.draw(plan.rows_M)
            survival_MB = (1 / (1 + np.exp(-logits_MB))).cumprod(axis=1)
            lengths_M = self._scheduler.lengths(survival_MB, caps_M)
            accepted_M = np.minimum(lengths_M, would_accept_M)
        took = self._took(shape, len(drafting), int(lengths_M.sum()))
        self._scheduler.observe(lengths_M, accepted_M, took)
        self._now_ms += took.total_ms
        accepted = dict(zip(plan.rows_M.tolist(), accepted_M.tolist(), strict=True))
        self._count(decoding, int(lengths_M.sum()), took.total_ms)
        self._advance(decoding, accepted)
        self._finish_prompts(prefilling)

    def _chunks(self) -> tuple[list[tuple[_Running, int]], int]:
        budget, chunks = self._load.prefill_tokens, []
        for request in self._running:
            if request.prompt_left and budget:
                size = min(budget, request.prompt_left)
                chunks.append((request, size))
                budget -= size
        return chunks, self._load.prefill_tokens - budget

    def _took(self, shape: StepShape, num_drafting: int, num_drafts: int) -> Segments:
        rows = shape.num_requests + shape.num_prefilling
        tokens = shape.num_requests + shape.num_prefill_tokens + num_drafts
        verify_ms = self._machine.verify_cost(tokens, rows, shape.mean_context)
        return Segments(self._machine.draft_cost(num_drafting), verify_ms, self._machine.overhead_ms)

    def _count(self, decoding: Sequence[_Running], num_drafts: int, took_ms: float) -> None:
        counts = self._counts
        counts.steps += 1
        counts.decoding += len(decoding)
        counts.verified += num_drafts
        counts.elapsed_ms += took_ms
        counts.decoding_ms += took_ms * len(decoding)

    def _advance(self, decoding: Sequence[_Running], accepted: Mapping[int, int]) -> None:
        over = False
        for request in decoding:
            written = min(request.output_left, 1 + accepted.get(request.row, 0))
            request.output_left -= written
            request.context += written
            self._counts.tokens += written
            over = over or not request.output_left
        if over:
            self._release()

    def _finish_prompts(self, prefilling: Sequence[tuple[_Running, int]]) -> None:
        for request, size in prefilling:
            request.prompt_left -= size
            if not request.prompt_left:
                # The prompt's forward gives the first token.
                request.output_left -= 1
                self._counts.first_token_ms.append(self._now_ms - request.arrived_ms)
        self._release()

    def _release(self) -> None:
        ended = [r for r in self._running if not r.prompt_left and r.output_left <= 0]
        if not ended:
            return
        self._running = [r for r in self._running if r.prompt_left or r.output_left > 0]
        for request in ended:
            self._counts.finished += 1
            self._scheduler.release(request.row)
            if self._load.num_users:
                self._ask(self._now_ms)


def simulate(policy: str, costs: CostTable, traffic: Traffic, load: Load, machine: CostTable | None = None) -> Outcome:
    """One policy at one load; arguments as of :class:`Simulation`, ``policy`` a name of :data:`POLICIES`."""
    return Simulation(POLICIES[policy], costs, traffic, load, machine).run(policy)
