"""No policy lets a length depend on the token it decides about; the paper's examples catch one that does."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from draftline.scheduling.allocation import best_budget, gain_curve
from draftline.scheduling.policies import (
    AsyncPolicy,
    FixedPolicy,
    LengthPolicy,
    OffPolicy,
    StepView,
    SyncPolicy,
    ThresholdPolicy,
)
from draftline.scheduling.scheduler import Scheduler, StepShape
from tests.scheduling.cases import Array, linear_costs

POLICIES = [OffPolicy(), FixedPolicy(), FixedPolicy(1), ThresholdPolicy(0.4), SyncPolicy(), AsyncPolicy()]
TARGET = (0.7, 0.3)
DRAFT = (0.5, 0.5)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: type(p).__name__)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(2, 5))
def test_later_confidences_of_a_block_never_change_its_admitted_prefix(
    policy: LengthPolicy, seed: int, num_requests: int, block: int
) -> None:
    """Two schedulers of equal past meet blocks that differ only behind position j of one request.

    Whether its drafts up to j are verified must be the same in both: at that time nothing behind j is drafted. The
    past is random steps, so corrections, budgets, probes and the turn of ties take part. Confidences of 1 make ties.
    """
    random = np.random.default_rng(seed)
    rows = np.arange(num_requests)

    def block_of(count: int) -> Array:
        confidence = np.where(random.random((count, block)) < 0.3, 1.0, random.uniform(0.2, 1, (count, block)))
        return np.cumprod(confidence, axis=1)

    costs = linear_costs(base=random.uniform(1, 20), token=random.uniform(0.1, 4))
    pair = [Scheduler(policy, num_requests, block, costs) for _ in range(2)]
    for scheduler in pair:
        for _ in range(num_requests):
            scheduler.admit()
    for _ in range(int(random.integers(0, 5))):
        survival, accepted = block_of(num_requests), random.integers(0, block + 1, num_requests)
        for scheduler in pair:
            drafting = scheduler.plan(rows, StepShape(num_requests)).rows_M
            caps = np.full(len(drafting), block)
            lengths = scheduler.lengths(survival[drafting], caps)
            scheduler.observe(lengths, np.minimum(accepted[drafting], lengths))
    plans = [scheduler.plan(rows, StepShape(num_requests)) for scheduler in pair]
    drafting = plans[0].rows_M
    assert drafting.tolist() == plans[1].rows_M.tolist()
    if not len(drafting):
        return
    survival = block_of(len(drafting))
    request, position = int(random.integers(len(drafting))), int(random.integers(block - 1))
    other = survival.copy()
    later = random.uniform(0, 1, block - position - 1) * (random.random() < 0.7) + (random.random() < 0.3)
    other[request, position + 1 :] = survival[request, position] * np.minimum.accumulate(np.minimum(later, 1))
    caps = np.full(len(drafting), block)
    one, two = (s.lengths(blocks, caps)[request] for s, blocks in zip(pair, (survival, other), strict=True))
    assert [one > j for j in range(position + 1)] == [two > j for j in range(position + 1)]


def first_token_law(lengths_of: Callable[[Array], list[NDArray[np.int64]]], num_requests: int, after: Array) -> float:
    """Exact probability that request 0's first token is 0, over all drafts and over equally likely choices.

    The draft's two tokens are drawn from (0.5, 0.5), each survives first with 0.8, and the second draft's confidence
    is ``after[x_1]``. A verified draft is accepted with probability min(1, p / q), else the residual, which is token
    0, is drawn; without verification the token comes from the target's (0.7, 0.3).
    """
    total = 0.0
    for drafts in itertools.product((0, 1), repeat=num_requests):
        survival = np.array([[0.8, 0.8 * after[x]] for x in drafts])
        choices = lengths_of(survival)
        for lengths in choices:
            weight = np.prod([DRAFT[x] for x in drafts]) / len(choices)
            accept = min(1.0, TARGET[drafts[0]] / DRAFT[drafts[0]])
            zero = (accept if drafts[0] == 0 else 1 - accept) if lengths[0] > 0 else TARGET[0]
            total += float(weight) * zero
    return total


SPS = np.array([1.0, 0.5, 0.45])
"""Steps a second at one, two and three tokens: the example of appendix A."""


def paper_view(survival: Array, budget: int = 0) -> StepView:
    return StepView(survival, survival, np.full(len(survival), 2), len(survival), 1 / SPS, budget)


def test_the_retrospective_scheduler_of_appendix_a_is_biased() -> None:
    """The control: the best budget over *this* step's confidences gives (0.85, 0.15) instead of (0.7, 0.3)."""

    def retrospective(survival: Array) -> list[NDArray[np.int64]]:
        view = paper_view(survival)
        budget = best_budget(gain_curve(survival), view.cost_K, 1)
        return [AsyncPolicy().lengths(paper_view(survival, budget))]

    assert first_token_law(retrospective, 1, np.array([0.9, 0.0])) == pytest.approx(0.85)


@pytest.mark.parametrize("budget", [0, 1, 2])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: type(p).__name__)
def test_ours_pass_appendix_a(policy: LengthPolicy, budget: int) -> None:
    """Whatever budget earlier steps have led to."""
    found = first_token_law(lambda s: [policy.lengths(paper_view(s, budget))], 1, np.array([0.9, 0.0]))
    assert found == pytest.approx(0.7)


def test_ties_in_an_order_that_knows_values_are_biased() -> None:
    """The control: with c_2 = 1 exactly, a slot given to any of the tied candidates gives (0.725, 0.275).

    A request whose second draft is certain has two tied candidates and so draws twice.
    """

    def any_of_the_tied(survival: Array) -> list[NDArray[np.int64]]:
        tied = [request for request, row in enumerate(survival) for a in row if a == survival.max()]
        return [np.eye(len(survival), dtype=np.int64)[request] for request in tied]

    assert first_token_law(any_of_the_tied, 2, np.array([1.0, 0.0])) == pytest.approx(0.725)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("budget", [1, 2, 3])
def test_our_order_of_ties_knows_no_values(budget: int, first: int) -> None:
    def ours(survival: Array) -> list[NDArray[np.int64]]:
        view = StepView(survival, survival, np.full(2, 2), 2, np.ones(5), budget=budget, first_request=first)
        return [AsyncPolicy().lengths(view)]

    assert first_token_law(ours, 2, np.array([1.0, 0.0])) == pytest.approx(0.7)
