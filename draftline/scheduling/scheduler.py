"""A step's decisions in order: who drafts, how much is verified, what was learned; without torch.

The engine and the simulator run this same code. A step is

1. :meth:`Scheduler.plan`, before anything is drafted: which requests draft, and
   the budget, from costs and from survivals at least two steps old;
2. :meth:`Scheduler.lengths`, after drafting: the policy's choice;
3. :meth:`Scheduler.observe`, after verifying: what was accepted.

Dimension letters: R decoding requests, E of them that may draft, M that do,
B positions, K draft tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from draftline.scheduling.allocation import allocate, best_budget, gain_curve, price_floor
from draftline.scheduling.costs import CostTable
from draftline.scheduling.estimate import HISTORY_BLOCKS, AcceptanceEstimate, CalibrationError, Survival
from draftline.scheduling.loops import falling_up_to
from draftline.scheduling.policies import AsyncPolicy, LengthPolicy, StepView, SyncPolicy

Array = NDArray[np.float64]
Rows = NDArray[np.int64]

POOLED_BLOCKS = 16
"""Past blocks that a budget is computed from at least: one request's last block says little of its next."""
PROBE_SHARE = 0.01
"""Of the time that may go into trying drafts which are not expected to pay."""
PROBE_LENGTH = 2
_MOST_PROBES = 4
_FIRST_BLOCKS = 64
_FIRST_PROBE_SHARE = 0.1
"""Until so many blocks of a new draft have been seen."""
_LEAST_ADVANTAGE = 1.005
_MOST_CREDIT_STEPS = 1.0
_SCALE_WEIGHT = 0.05
_NO_ROWS: Rows = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class StepShape:
    """What is known of a step before drafting.

    Attributes:
        num_requests: Decoding requests, R.
        num_prefill_tokens: Prompt tokens in the same step.
        num_prefilling: Requests they belong to.
        mean_context: Mean context of the decoding requests, ``None`` when not known.
    """

    num_requests: int
    num_prefill_tokens: int = 0
    num_prefilling: int = 0
    mean_context: float | None = None


@dataclass(frozen=True)
class Plan:
    """Who drafts in a step, and what may be spent on it.

    Attributes:
        rows_M: Rows of the drafting requests, in the order given.
        is_probe_M: Those that draft to find out whether it pays.
        budget: Slots, from survivals that are two steps old.
        floor: Survival below which no slot pays.
        cost_K: Milliseconds of the step by draft tokens; empty where costs are not known.
        shape: Of the step.
        fair_M: Which of them speak for all requests, since they were not chosen
            for how well their drafts do; ``None`` for all.
    """

    rows_M: Rows
    is_probe_M: NDArray[np.bool_]
    budget: int
    floor: float
    cost_K: Array
    shape: StepShape
    fair_M: NDArray[np.bool_] | None = None


@dataclass
class Segments:
    """Milliseconds a step took: drafting, the target, and all the rest."""

    draft_ms: float = 0.0
    verify_ms: float = 0.0
    other_ms: float = 0.0

    @property
    def total_ms(self) -> float:
        """All of it."""
        return self.draft_ms + self.verify_ms + self.other_ms


class Scheduler:
    """Decides for one engine; owns what was learned about its draft and its requests.

    Args:
        policy: May be exchanged between steps.
        num_rows: Requests at a time.
        block_size: B.
        costs: What steps cost; needed by adaptive policies.
        prior_B: Mean survival by position, as evaluated.
    """

    def __init__(
        self,
        policy: LengthPolicy,
        num_rows: int,
        block_size: int,
        costs: CostTable | None = None,
        prior_B: Sequence[float] | None = None,
    ) -> None:
        self.policy = policy
        self.costs = costs
        self.block_size = block_size
        self.estimate = AcceptanceEstimate(num_rows, block_size, prior_B)
        self.calibration_error = CalibrationError()
        self.num_probes = 0
        self._free = list(range(num_rows - 1, -1, -1))
        self._last_drafted = np.full(num_rows, -1, dtype=np.int64)
        self._is_hot = np.zeros(num_rows, dtype=np.bool_)
        self._step = 0
        self._credit_ms = 0.0
        self._scale = Segments(1.0, 1.0, 0.0)
        self._plan: Plan | None = None
        self._predicted_MB: Survival = np.zeros((0, block_size), dtype=np.float32)
        self._is_estimate = True

    def admit(self) -> int:
        """A row for a new request."""
        row = self._free.pop()
        self.estimate.admit(row)
        self._last_drafted[row] = -1
        self._is_hot[row] = False
        return row

    def release(self, row: int) -> None:
        """The request is over."""
        self._free.append(row)

    @property
    def current_plan(self) -> Plan:
        """Of the step that is under way."""
        assert self._plan is not None
        return self._plan

    # -- before drafting ----------------------------------------------------------------------------------------

    def plan(self, rows_E: Rows, shape: StepShape) -> Plan:
        """Choose who drafts.

        Args:
            rows_E: Rows of the requests that may draft, in slot order.
            shape: Of the step.
        """
        self._plan = self._planned(rows_E, shape)
        return self._plan

    def _planned(self, rows_E: Rows, shape: StepShape) -> Plan:
        nobody = np.zeros(0, dtype=np.bool_)
        if not self.policy.wants_draft or not len(rows_E):
            cost_K = self._cost_curve(0, shape) if self.costs is not None and shape.num_requests else np.zeros(0)
            return Plan(_NO_ROWS, nobody, 0, 0.0, cost_K, shape)
        if not self.policy.is_adaptive or self.costs is None:
            cost_K = self._cost_curve(len(rows_E), shape) if self.costs is not None else np.zeros(0)
            return Plan(rows_E, np.zeros(len(rows_E), dtype=np.bool_), 0, 0.0, cost_K, shape)
        plain_K = self._cost_curve(0, shape)
        plain = shape.num_requests / plain_K[0]
        chosen_E, budget, throughput = self._choose(rows_E, shape, plain_K, plain)
        probes_E = self._choose_probes(rows_E, chosen_E, shape, plain_K)
        drafting_E = chosen_E | probes_E
        if not drafting_E.any():
            return Plan(_NO_ROWS, nobody, 0, 0.0, plain_K, shape)
        cost_K = plain_K + self._draft_ms(int(np.count_nonzero(drafting_E)))
        floor = price_floor(budget, throughput, cost_K)
        fair_M = None
        if not drafting_E.all():
            fair_M = (probes_E & ~self._is_hot[rows_E])[drafting_E]
        return Plan(rows_E[drafting_E], probes_E[drafting_E], budget, floor, cost_K, shape, fair_M)

    def _choose(
        self, rows_E: Rows, shape: StepShape, plain_K: Array, plain: float
    ) -> tuple[NDArray[np.bool_], int, float]:
        """Requests whose drafts are worth their time, the budget, and tokens per millisecond with it.

        A request is worth drafting for if the slots that pay, in its last
        blocks, bring more than its share of drafting takes. What time
        is worth is what plain decoding makes of it, and then what the first
        choice does.
        """
        most = len(rows_E) * self.block_size
        slope = (plain_K[most] - plain_K[0]) / most
        draft_slope = self._draft_slope(len(rows_E))
        chosen_E, budget, throughput = np.zeros(len(rows_E), dtype=np.bool_), 0, plain
        outlook = self.estimate.outlook(rows_E)
        for _ in range(2):
            worthy_E = outlook.exceed(throughput * slope, throughput * draft_slope)
            if (worthy_E == chosen_E).all():
                break
            count = int(np.count_nonzero(worthy_E))
            if not count:
                break
            pooled = min(HISTORY_BLOCKS, max(1, POOLED_BLOCKS // count))
            gain_K = gain_curve(outlook.history(worthy_E, pooled), pooled)
            cost_K = plain_K[: len(gain_K)] + self._draft_ms(count)
            best = best_budget(gain_K, cost_K, shape.num_requests)
            reached = float((shape.num_requests + gain_K[best]) / cost_K[best])
            if reached < max(throughput, plain * _LEAST_ADVANTAGE):
                break
            chosen_E, budget, throughput = worthy_E, best, reached
        return chosen_E, budget, throughput

    def _choose_probes(
        self, rows_E: Rows, chosen_E: NDArray[np.bool_], shape: StepShape, plain_K: Array
    ) -> NDArray[np.bool_]:
        """Requests that draft although it is not expected to pay, while time for that has been saved up.

        The longest without a draft come first. A request whose last probe was
        accepted goes on at once: its text has changed.
        """
        probes_E = np.zeros(len(rows_E), dtype=np.bool_)
        share = PROBE_SHARE if self.estimate.num_blocks >= _FIRST_BLOCKS else _FIRST_PROBE_SHARE
        self._credit_ms = min(self._credit_ms + share * plain_K[0], _MOST_CREDIT_STEPS * plain_K[0])
        idle = np.flatnonzero(~chosen_E)
        if not len(idle):
            return probes_E
        hot = idle[self._is_hot[rows_E[idle]]]
        wanted = hot if len(hot) else idle[np.argsort(self._last_drafted[rows_E[idle]], kind="stable")][:_MOST_PROBES]
        drafted = int(chosen_E.sum())
        extra = self._draft_ms(drafted + len(wanted)) - self._draft_ms(drafted)
        extra += plain_K[min(len(wanted) * PROBE_LENGTH, len(plain_K) - 1)] - plain_K[0]
        if self._credit_ms < extra and not len(hot):
            return probes_E
        self._credit_ms = max(self._credit_ms - extra, -extra)
        self.num_probes += len(wanted)
        probes_E[wanted] = True
        return probes_E

    # -- costs --------------------------------------------------------------------------------------------------

    def _cost_curve(self, num_drafting: int, shape: StepShape) -> Array:
        """Milliseconds by draft tokens, 0 to whole blocks of all requests.

        Prompt tokens of the step are work that is to be done anyway: they make
        draft tokens cheaper or dearer, but do not make time worth less.
        """
        costs = self.costs
        assert costs is not None
        rows = shape.num_requests + shape.num_prefilling
        first = shape.num_requests + shape.num_prefill_tokens
        most = shape.num_requests * self.block_size
        tokens = costs.verify_curve(rows, first + most)[first : first + most + 1]
        if shape.num_prefill_tokens:
            alone = costs.verify_curve(shape.num_requests, shape.num_requests)[shape.num_requests]
            tokens = tokens - (tokens[0] - alone)
        extra = costs.context_extra(shape.num_requests, shape.mean_context, float(tokens[0]))
        fixed = self._draft_ms(num_drafting) + costs.overhead_ms + self._scale.other_ms
        return (tokens + extra) * self._scale.verify_ms + fixed

    def _draft_ms(self, num_requests: int) -> float:
        assert self.costs is not None
        return self.costs.draft_cost(num_requests) * self._scale.draft_ms

    def _draft_slope(self, num_requests: int) -> float:
        """Milliseconds of drafting for one request more."""
        if num_requests <= 1:
            return self._draft_ms(1)
        return (self._draft_ms(num_requests) - self._draft_ms(1)) / (num_requests - 1)

    def predicted_ms(self, plan: Plan, num_draft_tokens: int) -> float:
        """What the whole step should take, prompt tokens included; 0 where costs are not known."""
        if self.costs is None:
            return 0.0
        shape = plan.shape
        rows = shape.num_requests + shape.num_prefilling
        tokens = shape.num_requests + shape.num_prefill_tokens + num_draft_tokens
        verify = self.costs.verify_cost(tokens, rows, shape.mean_context) * self._scale.verify_ms
        return verify + self._draft_ms(len(plan.rows_M)) + self.costs.overhead_ms + self._scale.other_ms

    # -- after drafting -----------------------------------------------------------------------------------------

    def lengths(self, survival_MB: Array | None, caps_M: Rows) -> Rows:
        """Drafts to verify of each block of the step's :class:`Plan`, at most ``caps_M``.

        Args:
            survival_MB: Calibrated survivals; ``None`` without a confidence
                head, for which past acceptance stands in.
            caps_M: See :class:`~draftline.scheduling.policies.StepView`.
        """
        plan = self.current_plan
        self._is_estimate = survival_MB is None
        if not len(caps_M):
            return _NO_ROWS
        if survival_MB is None:
            survival_MB = np.broadcast_to(self.estimate.survival_B, (len(caps_M), self.block_size))
        predicted_MB = falling_up_to(np.ascontiguousarray(survival_MB, dtype=np.float64), caps_M)
        self._predicted_MB = predicted_MB
        view = StepView(
            predicted_MB,
            self.estimate.corrected(plan.rows_M, predicted_MB),
            caps_M,
            plan.shape.num_requests,
            plan.cost_K,
            plan.budget,
            plan.floor,
            self._step,
        )
        lengths = self.policy.lengths(view)
        if plan.is_probe_M.any():
            lengths = np.where(plan.is_probe_M, np.maximum(lengths, PROBE_LENGTH), lengths)
        return np.minimum(lengths, caps_M)

    # -- after verifying ----------------------------------------------------------------------------------------

    def observe(self, lengths_M: Rows, accepted_M: Rows, took: Segments | None = None) -> None:
        """Learn from a step.

        Args:
            lengths_M: Drafts verified of each block.
            accepted_M: Of those, accepted.
            took: What it took, where that was measured.
        """
        plan = self.current_plan
        rows_M = plan.rows_M
        if len(rows_M):
            predicted_MB = self._predicted_MB
            self.calibration_error.note(predicted_MB, lengths_M, accepted_M)
            self.estimate.note_verified(rows_M, predicted_MB, lengths_M, accepted_M, is_estimate=self._is_estimate)
            self._last_drafted[rows_M] = self._step
            self._is_hot[rows_M] = plan.is_probe_M & (accepted_M > 0)
            self.estimate.note_drafted(rows_M, predicted_MB, plan.fair_M)
        else:
            self.estimate.note_drafted(_NO_ROWS, np.zeros((0, self.block_size), dtype=np.float32))
        if took is not None and self.costs is not None and self.costs.is_measured:
            self._learn_scales(plan, int(lengths_M.sum()), took)
        self.estimate.end_step()
        self._step += 1

    def _learn_scales(self, plan: Plan, num_draft_tokens: int, took: Segments) -> None:
        """A machine that is busy with something else is slower than its table."""
        costs, shape, scale = self.costs, plan.shape, self._scale
        assert costs is not None
        rows = shape.num_requests + shape.num_prefilling
        tokens = shape.num_requests + shape.num_prefill_tokens + num_draft_tokens
        expected = costs.verify_cost(tokens, rows, shape.mean_context)
        if expected > 0 and took.verify_ms > 0:
            scale.verify_ms += _SCALE_WEIGHT * (np.clip(took.verify_ms / expected, 0.2, 5.0) - scale.verify_ms)
        expected = costs.draft_cost(len(plan.rows_M))
        if expected > 0 and took.draft_ms > 0:
            scale.draft_ms += _SCALE_WEIGHT * (np.clip(took.draft_ms / expected, 0.2, 5.0) - scale.draft_ms)
        scale.other_ms += _SCALE_WEIGHT * (max(0.0, took.other_ms - costs.overhead_ms) - scale.other_ms)


@cache
def compile_loops() -> None:
    """Compile what runs in every step, so that no request waits for it: seconds on a new machine, later a moment."""
    costs = CostTable.from_points({(1, 1): 1.0, (1, 8): 1.1, (4, 4): 1.2, (4, 32): 2.0}, {1: 0.01, 4: 0.02})
    survival_MB = np.cumprod(np.full((4, 2), 0.9), axis=1)
    for policy in (AsyncPolicy(), SyncPolicy()):
        scheduler = Scheduler(policy, 4, 2, costs)
        rows = np.array([scheduler.admit() for _ in range(4)])
        # From the third step on there is history, and a budget below all slots.
        for _ in range(4):
            plan = scheduler.plan(rows, StepShape(4))
            lengths = scheduler.lengths(survival_MB[: len(plan.rows_M)], np.full(len(plan.rows_M), 2))
            scheduler.observe(lengths, np.minimum(lengths, 1))
    allocate(survival_MB.astype(np.float32), 1)
