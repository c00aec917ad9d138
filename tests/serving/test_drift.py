"""Acceptance while serving: unbiased whatever the scheduler verifies, alarms for bad drafts and only for them.

The simulated world: a block's confidences are what its drafts' acceptance is
drawn from, so its head is perfectly calibrated, and its blocks differ.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from draftline.engine.requests import DraftedBlocks
from draftline.spec import DriftSpec
from serving.drift import (
    AcceptanceMonitor,
    DriftEvent,
    cluster_p_value,
    evaluated_survival,
    whole_block_outcomes,
)

B = 7
SPEC = DriftSpec(window_blocks=8_000, min_blocks=1_000, min_requests=20)
Verify = Callable[[NDArray[np.float64]], NDArray[np.int64]]


def whole(survival_RB: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.full(len(survival_RB), B, dtype=np.int64)


def threshold(survival_RB: NDArray[np.float64]) -> NDArray[np.int64]:
    return (survival_RB >= 0.5).sum(axis=1).astype(np.int64)


def nothing(survival_RB: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.zeros(len(survival_RB), dtype=np.int64)


class World:
    """Requests whose blocks are accepted as a quality and the head's own word say."""

    def __init__(self, quality: float, *, overconfidence: float = 0.0, seed: int = 0) -> None:
        self._random = np.random.default_rng(seed)
        self._quality = quality
        self._overconfidence = overconfidence
        self.trials = np.zeros(B)
        self.successes = np.zeros(B)

    def steps(self, num_steps: int, verify: Verify, requests: int = 16) -> list[DraftedBlocks]:
        made = []
        nature = self._random.normal(size=requests)
        for step in range(num_steps):
            if step % 5 == 0:
                # A request stays what it is for its five steps: its blocks resemble one another.
                nature = self._random.normal(size=requests)
            logit_RB = nature[:, None] + self._random.normal(size=(requests, B)) + self._quality
            conditional = 1 / (1 + np.exp(-logit_RB))
            survival_RB = np.cumprod(1 / (1 + np.exp(-(logit_RB + self._overconfidence))), axis=1)
            hits = self._random.random((requests, B)) < conditional
            would = np.cumprod(hits, axis=1).sum(axis=1)
            verified = verify(survival_RB)
            accepted = np.minimum(would, verified)
            for r in range(requests):
                reached = min(accepted[r] + 1, verified[r])
                self.trials[:reached] += 1
                self.successes[: accepted[r]] += 1
            ids = [f"{step // 5}-{r}" for r in range(requests)]
            made.append(DraftedBlocks(ids, B, survival_RB, verified, accepted))
        return made


@pytest.fixture(scope="module")
def evaluated() -> tuple[float, ...]:
    """The evaluation: whole blocks of the good draft, on traffic of its own."""
    outcomes = [b.num_accepted_R[:, None] > np.arange(B) for b in World(1.0, seed=9).steps(1500, whole)]
    return tuple(np.concatenate(outcomes).mean(axis=0))


def watch(
    world: World, evaluated: tuple[float, ...], verify: Verify, num_steps: int = 700, spec: DriftSpec = SPEC
) -> tuple[AcceptanceMonitor, list[DriftEvent]]:
    monitor = AcceptanceMonitor(spec, B, evaluated, ("smol", "desk/3"))
    found = [monitor.record(blocks) for blocks in world.steps(num_steps, verify)]
    return monitor, [event for event in found if event is not None]


@pytest.mark.parametrize("verify", [whole, threshold, nothing])
def test_a_matched_draft_measures_as_evaluated_whatever_is_verified(
    evaluated: tuple[float, ...], verify: Verify
) -> None:
    monitor, events = watch(World(1.0, seed=1), evaluated, verify)
    assert monitor.live_length == pytest.approx(monitor.evaluated_length, rel=0.04)
    assert abs(monitor.drop) < 0.04 and events == [] and not monitor.is_drifted


def test_the_conditional_share_at_verified_positions_would_not_do(evaluated: tuple[float, ...]) -> None:
    """The negative control: what is verified is what the head believes in, so its acceptance flatters the draft."""
    world = World(1.0, seed=1)
    watch(world, evaluated, threshold)
    naive = world.successes / world.trials
    conditional = np.array(evaluated) / np.array([1.0, *evaluated[:-1]])
    assert (naive[:4] > conditional[:4] + 0.03).all()


@pytest.mark.parametrize("verify", [whole, threshold, nothing])
def test_a_mismatched_draft_raises_one_event(evaluated: tuple[float, ...], verify: Verify) -> None:
    monitor, events = watch(World(-0.5, seed=2), evaluated, verify)
    assert monitor.is_drifted and len(events) == 1
    document = json.loads(events[0].to_json())
    assert (document["type"], document["reason"], document["draft"]) == ("Warning", "DraftAcceptanceDrift", "desk/3")
    assert document["drop"] > 0.2 and document["p_value"] < 0.001 and "desk/3" in document["message"]
    assert document["num_requests"] >= 20 and document["live_length"] == pytest.approx(events[0].live_length)


def test_an_overconfident_head_hides_nothing_that_is_verified(evaluated: tuple[float, ...]) -> None:
    world = World(-0.5, overconfidence=1.5, seed=3)
    monitor, events = watch(world, evaluated, threshold)
    assert len(events) == 1 and monitor.drop > 0.1


def test_a_recovered_draft_may_alarm_again(evaluated: tuple[float, ...]) -> None:
    monitor = AcceptanceMonitor(SPEC, B, evaluated)
    events = []
    for quality in (-0.5, 1.0, -0.5):
        for blocks in World(quality, seed=4).steps(600, whole):
            event = monitor.record(blocks)
            events += [] if event is None else [event]
    assert len(events) == 2


def test_too_little_is_not_judged(evaluated: tuple[float, ...]) -> None:
    few_blocks = replace_spec(min_blocks=7_999)
    assert watch(World(-2.0), evaluated, whole, 400, few_blocks)[1] == []
    few_requests = replace_spec(min_requests=3_000)
    assert watch(World(-2.0), evaluated, whole, 700, few_requests)[1] == []
    assert watch(World(-2.0), evaluated[:3], whole)[1] == [], "an evaluation of another block size"


def replace_spec(**changes: int) -> DriftSpec:
    return SPEC.model_copy(update=changes)


def test_resemblance_within_requests_is_not_taken_for_certainty() -> None:
    """Ten requests of a thousand equal blocks are ten observations, not ten thousand."""
    random = np.random.default_rng(0)
    false_alarms = 0
    for _ in range(300):
        means = random.normal(size=30)
        false_alarms += cluster_p_value(np.stack([means * 1000, np.full(30, 1000.0)], axis=1)) < 0.01
    assert false_alarms <= 15, "about 3 of 300 are expected, and 15 are reached with probability below 1e-5"
    assert cluster_p_value(np.array([[1.0, 1.0], [1.0, 1.0]])) == 0.0
    assert cluster_p_value(np.array([[0.0, 1.0], [0.0, 1.0]])) == 1.0


def test_known_outcomes_are_kept_and_the_rest_is_the_heads_word() -> None:
    survival = np.array([[0.8, 0.4, 0.2], [0.8, 0.4, 0.2], [0.5, 0.25, 0.1]])
    blocks = DraftedBlocks(["a", "b", "c"], 3, survival, np.array([2, 2, 0]), np.array([1, 2, 0]))
    np.testing.assert_allclose(whole_block_outcomes(blocks, np.ones(3)), [[1, 0, 0], [1, 1, 0.5], [0.5, 0.25, 0.1]])
    without_head = replace(blocks, survival_RB=None)
    np.testing.assert_allclose(
        whole_block_outcomes(without_head, np.array([0.6, 0.3, 0.1])), [[1, 0, 0], [1, 1, 1 / 3], [0.6, 0.3, 0.1]]
    )


def test_the_reference_is_the_lowest_curve_of_the_held_out_suite(tmp_path: Path) -> None:
    file = tmp_path / "metrics.json"
    other = {"survival_by_position": [0.1]}
    home = {
        "survival_by_position": [0.8, 0.6],
        "by_temperature": [{"survival_by_position": [0.8, 0.6]}, {"survival_by_position": [0.7, 0.5]}],
    }
    file.write_text(json.dumps({"suites": {"gsm8k": other, "held-out": home}}))
    assert evaluated_survival(file) == (0.7, 0.5)
    file.write_text(json.dumps({"suites": {"gsm8k": other}}))
    assert evaluated_survival(file) == (0.1,)
    for text in ("", "[]", '{"suites": {}}', '{"suites": {"held-out": {"survival_by_position": [null]}}}'):
        file.write_text(text)
        assert evaluated_survival(file) is None
    assert evaluated_survival(tmp_path / "absent.json") is None
