"""Prefix sharing: what is planned, put together again, is the samples; and nothing common is stored twice."""

from __future__ import annotations

import random

import numpy as np
import pytest
from numpy.typing import NDArray

from draftline.cache.prefixes import PrefixPlan, Segment, common_prefix, plan_prefixes, shared_needs

Ids = NDArray[np.int32]


def arrays(*samples: str) -> list[Ids]:
    """A sample a letter a token."""
    return [np.array([ord(letter) for letter in sample], dtype=np.int32) for sample in samples]


def rebuilt(plan: PrefixPlan, samples: list[Ids], index: int) -> list[int]:
    tokens: list[int] = []
    for number in plan.paths[index]:
        segment = plan.segments[number]
        assert segment.start == len(tokens), "segments of a path follow each other"
        tokens += samples[segment.sample][segment.start : segment.end].tolist()
    return tokens


def check(plan: PrefixPlan, samples: list[Ids]) -> None:
    assert sorted(plan.order) == list(range(len(samples)))
    for index, sample in enumerate(samples):
        assert rebuilt(plan, samples, index) == sample.tolist()
    assert {number for path in plan.paths for number in path} == set(range(len(plan.segments)))
    assert all(segment.start < segment.end for segment in plan.segments)
    # A segment belongs to the first sample in computing order that has it.
    for number, segment in enumerate(plan.segments):
        users = [place for place, sample in enumerate(plan.order) if number in plan.paths[sample]]
        assert plan.order[users[0]] == segment.sample


def num_distinct_prefixes(samples: list[Ids]) -> int:
    return len({tuple(sample[:end].tolist()) for sample in samples for end in range(1, len(sample) + 1)})


def test_a_common_opening_is_stored_once() -> None:
    samples = arrays("systemA1", "systemB22", "systemA3")
    plan = plan_prefixes(samples, min_saved_tokens=1)
    check(plan, samples)
    assert plan.segments == (Segment(0, 0, 6), Segment(0, 6, 7), Segment(0, 7, 8), Segment(2, 7, 8), Segment(1, 6, 9))
    assert plan.paths == ((0, 1, 2), (0, 4), (0, 1, 3))
    assert plan.num_rows == num_distinct_prefixes(samples) == 12


def test_a_small_gain_is_left_alone() -> None:
    samples = arrays("systemA1", "systemB22", "systemA3")
    plan = plan_prefixes(samples, min_saved_tokens=8)
    check(plan, samples)
    # Three samples share six tokens: twelve rows saved. The two that share one more would save one row.
    assert plan.segments == (Segment(0, 0, 6), Segment(0, 6, 8), Segment(2, 6, 8), Segment(1, 6, 9))


def test_repetitions_and_beginnings_store_nothing_of_their_own() -> None:
    samples = arrays("abcdefghij", "abcdefghijkl", "abcdefghij", "abcdefghijkl")
    plan = plan_prefixes(samples, min_saved_tokens=1)
    check(plan, samples)
    assert plan.num_rows == 12 and plan.paths == ((0,), (0, 1), (0,), (0, 1))
    assert plan.order == (0, 2, 1, 3) and plan.shared == (0, 10, 10, 12)


def test_without_sharing_every_sample_is_one_segment() -> None:
    samples = arrays("same opening one", "same opening two", "same opening one")
    plan = plan_prefixes(samples, dedupe=False)
    check(plan, samples)
    assert sorted(plan.paths) == [(0,), (1,), (2,)] and plan.num_rows == 48


@pytest.mark.parametrize("seed", range(60))
def test_any_samples_are_put_together_again(seed: int) -> None:
    source = random.Random(seed)
    letters = "ab" if seed % 2 else "abcdefgh"
    samples = arrays(*("".join(source.choices(letters, k=source.randint(1, 14))) for _ in range(source.randint(1, 25))))
    exact = plan_prefixes(samples, min_saved_tokens=1)
    check(exact, samples)
    assert exact.num_rows == num_distinct_prefixes(samples)
    usual = plan_prefixes(samples)
    check(usual, samples)
    assert exact.num_rows <= usual.num_rows <= sum(len(sample) for sample in samples)
    # Computing in this order, reusing what the one before had, does every distinct prefix once.
    for place, (before, sample) in enumerate(zip(usual.order, usual.order[1:], strict=False)):
        best = max(common_prefix(samples[other], samples[sample]) for other in usual.order[: place + 1])
        assert usual.shared[place + 1] == common_prefix(samples[before], samples[sample]) == best


def test_a_chain_deeper_than_pythons_stack() -> None:
    samples = [np.arange(9 * (n + 1), dtype=np.int32) for n in range(1500)]
    plan = plan_prefixes(samples)
    assert plan.num_rows == 13500 and len(plan.paths[1499]) == 1500


def test_what_a_later_sample_needs_is_known_when_the_first_is_computed() -> None:
    samples = arrays("abcd", "abce", "abx")
    plan = plan_prefixes(samples, min_saved_tokens=1)
    needs = [np.array([letter == "1" for letter in bits]) for bits in ("0001", "0100", "001")]
    joined = dict(zip(plan.order, shared_needs(plan, needs), strict=True))
    assert joined[0].tolist() == [False, True, False, True]
    assert joined[1].tolist() == [False, True, False, False]
    assert joined[2].tolist() == [False, False, True]
