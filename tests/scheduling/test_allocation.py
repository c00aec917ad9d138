"""The scheduler's arithmetic against brute force and against the rules as they are told."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from draftline.scheduling.allocation import allocate, best_budget, first_stop, gain_curve, price_floor
from tests.scheduling.cases import Array, heap_lengths, jagged_costs, survivals


@given(survivals(), st.integers(0, 25), st.sampled_from([0.0, 0.2, 0.5]))
def test_slots_go_as_from_a_heap(survival_RB: Array, budget: int, floor: float) -> None:
    lengths = allocate(survival_RB, budget, floor=floor)
    assert lengths.tolist() == heap_lengths(survival_RB, budget, floor)


@given(survivals(), st.integers(0, 25), st.integers(0, 9))
def test_turning_ties_gives_the_same_survivals_to_others(survival_RB: Array, budget: int, first: int) -> None:
    position_B = np.arange(survival_RB.shape[1])
    one, other = (
        np.sort(survival_RB[position_B < allocate(survival_RB, budget, first_request=n)[:, None]]) for n in (0, first)
    )
    assert one.tolist() == other.tolist()


def test_ties_turn_with_the_first_request() -> None:
    tied = np.full((4, 2), 0.5)
    assert allocate(tied, 2).tolist() == [1, 1, 0, 0]
    assert allocate(tied, 2, first_request=3).tolist() == [1, 0, 0, 1]
    assert allocate(tied, 6, first_request=6).tolist() == [1, 1, 2, 2]
    assert allocate(np.zeros((0, 2)), 3).tolist() == []


@given(st.data())
def test_the_budget_is_that_of_brute_force_on_jagged_costs(data: st.DataObject) -> None:
    """Every K is tried with the slots that the heap would give it."""
    survival_RB = data.draw(survivals())
    cost_K = data.draw(jagged_costs(survival_RB.size + 1))
    requests = len(survival_RB)
    tried = []
    for budget in range(survival_RB.size + 1):
        lengths = np.array(heap_lengths(survival_RB, budget))
        gain = survival_RB[np.arange(survival_RB.shape[1]) < lengths[:, None]].sum()
        tried.append((requests + gain) / cost_K[budget])
    found = best_budget(gain_curve(survival_RB), cost_K, requests)
    assert tried[found] == pytest.approx(max(tried), rel=1e-12)
    if found:
        assert tried[found] > max(tried[:found]) * (1 - 1e-12)


@given(st.data())
def test_the_stop_is_algorithm_1(data: st.DataObject) -> None:
    survival_RB = data.draw(survivals())
    cost_K = data.draw(jagged_costs(survival_RB.size + 1))
    expected, best = float(len(survival_RB)), len(survival_RB) / cost_K[0]
    budget = 0
    for survival in sorted((a for a in survival_RB.ravel() if a > 0), reverse=True):
        if (expected + survival) / cost_K[budget + 1] <= best:
            break
        budget, expected = budget + 1, expected + survival
        best = expected / cost_K[budget]
    assert first_stop(gain_curve(survival_RB), cost_K, len(survival_RB)) == budget


def test_a_cliff_traps_the_stop_and_not_the_budget() -> None:
    gain_K = gain_curve(np.full((4, 3), 0.9))
    cost_K = np.array([10.0, 11.0, *[15.0] * 11])
    assert first_stop(gain_K, cost_K, 4) == 1
    assert best_budget(gain_K, cost_K, 4) == 12


def test_pooled_blocks_stand_for_fewer_requests() -> None:
    block = np.array([[0.9, 0.5], [0.8, 0.0]])
    assert gain_curve(block).tolist() == pytest.approx([0, 0.9, 1.7, 2.2])
    # Eight copies pooled by eight are the two blocks themselves; eight blocks pooled by four are two.
    assert gain_curve(np.repeat(block, 8, axis=0), 8).tolist() == pytest.approx([0, 0.9, 1.7, 2.2])
    assert gain_curve(np.array([[0.9], [0.7], [0.5], [0.3]]), 2).tolist() == pytest.approx([0, 0.8, 1.2])
    assert gain_curve(np.zeros((3, 4))).tolist() == [0]


def test_the_floor_is_the_least_saving_at_the_price_of_time() -> None:
    rising = 10.0 + 2 * np.arange(9)
    assert price_floor(8, 0.25, rising) == pytest.approx(0.5)
    assert price_floor(0, 0.25, rising) == 0
    # The last two slots of a flat are free, so none of them is refused.
    assert price_floor(8, 0.25, np.array([10, 11, 12, 13, 14, 15, 20, 20, 20.0])) == 0
