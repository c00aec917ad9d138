"""Policies: prefixes chosen without looking at what is chosen about."""

from __future__ import annotations

import numpy as np
import pytest

from draftline.engine.policy import FixedPolicy, OffPolicy, ThresholdPolicy, policy_from_spec
from draftline.spec import ServingSpec

SURVIVAL = np.array([[0.9, 0.5, 0.2], [0.1, 0.05, 0.01], [0.99, 0.98, 0.97], [0.3, 0.3, 0.3]])


@pytest.mark.parametrize(
    ("threshold", "lengths"),
    [(0.0, [3, 3, 3, 3]), (0.3, [2, 0, 3, 3]), (0.301, [2, 0, 3, 0]), (0.95, [0, 0, 3, 0]), (0.999, [0, 0, 0, 0])],
)
def test_threshold_stops_at_the_first_low_survival(threshold: float, lengths: list[int]) -> None:
    assert ThresholdPolicy(threshold).lengths(SURVIVAL, 3, 4) == lengths


def test_threshold_does_not_anticipate() -> None:
    """Whether draft k is verified depends on survivals up to k alone, which know only earlier drafts."""
    random = np.random.default_rng(0)
    policy = ThresholdPolicy(0.4)
    for _ in range(300):
        survival = np.cumprod(random.uniform(0.3, 1.0, (5, 7)), axis=1)
        lengths = policy.lengths(survival, 7, 5)
        for k in range(7):
            other = survival.copy()
            other[:, k + 1 :] = random.uniform(0, 1, other[:, k + 1 :].shape)
            changed = policy.lengths(other, 7, 5)
            assert [n > k for n in changed] == [n > k for n in lengths]
        # Nor does it depend on the company.
        assert [policy.lengths(survival[i : i + 1], 7, 1)[0] for i in range(5)] == lengths


def test_without_confidences_whole_blocks_are_verified() -> None:
    assert ThresholdPolicy(0.5).lengths(None, 4, 2) == [4, 4]


@pytest.mark.parametrize(("length", "expected"), [(None, 3), (2, 2), (9, 3), (0, 0)])
def test_fixed(length: int | None, expected: int) -> None:
    assert FixedPolicy(length).lengths(SURVIVAL, 3, 4) == [expected] * 4


def test_off() -> None:
    assert OffPolicy().lengths(SURVIVAL, 3, 4) == [0] * 4
    assert not OffPolicy().wants_draft


@pytest.mark.parametrize(("name", "kind"), [("off", OffPolicy), ("fixed", FixedPolicy), ("threshold", ThresholdPolicy)])
def test_a_spec_names_its_policy(name: str, kind: type) -> None:
    spec = ServingSpec.model_validate({"policy": name, "threshold": 0.25})
    policy = policy_from_spec(spec)
    assert type(policy) is kind
    if isinstance(policy, ThresholdPolicy):
        assert policy.lengths(np.array([[0.26, 0.24]]), 2, 1) == [1]
