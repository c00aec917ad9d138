"""Policies: prefixes chosen without looking at what is chosen about."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from draftline.scheduling.policies import (
    AsyncPolicy,
    FixedPolicy,
    OffPolicy,
    StepView,
    SyncPolicy,
    ThresholdPolicy,
    policy_from_spec,
)
from draftline.spec import ServingSpec

SURVIVAL = np.array([[0.9, 0.5, 0.2], [0.1, 0.05, 0.01], [0.99, 0.98, 0.97], [0.3, 0.3, 0.3]])


def view(survival: NDArray[np.float64], **facts: object) -> StepView:
    """A step of these requests alone, at a cost of 10 ms and 1 ms a draft."""
    count, block = survival.shape
    known: dict[str, object] = {
        "caps_M": np.full(count, block),
        "num_requests": count,
        "cost_K": 10.0 + np.arange(count * block + 1),
    }
    return StepView(survival, survival, **{**known, **facts})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("threshold", "lengths"),
    [(0.0, [3, 3, 3, 3]), (0.3, [2, 0, 3, 3]), (0.301, [2, 0, 3, 0]), (0.95, [0, 0, 3, 0]), (0.999, [0, 0, 0, 0])],
)
def test_threshold_stops_at_the_first_low_survival(threshold: float, lengths: list[int]) -> None:
    assert ThresholdPolicy(threshold).lengths(view(SURVIVAL)).tolist() == lengths


@pytest.mark.parametrize(("length", "expected"), [(None, 3), (1, 1), (2, 2), (9, 3), (0, 0)])
def test_fixed(length: int | None, expected: int) -> None:
    assert FixedPolicy(length).lengths(view(SURVIVAL)).tolist() == [expected] * 4


def test_off() -> None:
    assert OffPolicy().lengths(view(SURVIVAL)).tolist() == [0] * 4
    assert not OffPolicy().wants_draft


def test_sync_stops_where_throughput_would_not_rise() -> None:
    # Four tokens in 10 ms: a first draft at 1 ms pays above 0.4, a fifth only above the 7.84 / 14 of four.
    assert SyncPolicy().lengths(view(SURVIVAL)).tolist() == [1, 0, 3, 0]
    # A cliff after one draft that the whole step would be worth crossing: Algorithm 1 is trapped before it.
    cliff = np.array([10.0, 11.0, *[15.0] * 11])
    assert SyncPolicy().lengths(view(np.full((4, 3), 0.9), cost_K=cliff)).tolist() == [1, 0, 0, 0]


def test_async_gives_its_budget_to_the_highest_survivals() -> None:
    policy = AsyncPolicy()
    assert policy.lengths(view(SURVIVAL, budget=4)).tolist() == [1, 0, 3, 0]
    assert policy.lengths(view(SURVIVAL, budget=6)).tolist() == [2, 0, 3, 1]
    assert policy.lengths(view(SURVIVAL, budget=6, first_request=3)).tolist() == [2, 0, 3, 1]
    assert policy.lengths(view(SURVIVAL, budget=12, floor=0.3)).tolist() == [2, 0, 3, 3]
    assert policy.lengths(view(SURVIVAL, budget=0)).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("off", OffPolicy),
        ("fixed", FixedPolicy),
        ("threshold", ThresholdPolicy),
        ("sync", SyncPolicy),
        ("async", AsyncPolicy),
    ],
)
def test_a_spec_names_its_policy(name: str, kind: type) -> None:
    spec = ServingSpec.model_validate({"policy": name, "threshold": 0.25, "fixed_length": 1})
    policy = policy_from_spec(spec)
    assert type(policy) is kind
    if isinstance(policy, ThresholdPolicy):
        assert policy.lengths(view(np.array([[0.26, 0.24]]))).tolist() == [1]
    if isinstance(policy, FixedPolicy):
        assert policy.lengths(view(np.array([[0.26, 0.24]]))).tolist() == [1]
