"""The engine's costs: measured where needed, stored ones used where they belong, and reports of what steps took."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest

from draftline.calibration.survival import Calibration
from draftline.draft.checkpoint import DraftModel
from draftline.engine.build import find_costs
from draftline.engine.engine import Engine, EngineLimits
from draftline.engine.requests import StepReport
from draftline.scheduling.costs import CostTable
from draftline.scheduling.policies import AsyncPolicy, FixedPolicy
from draftline.target.load import Target
from tests.engine.runs import answer, greedy, questions
from tests.servers.tiny_target import bigram_draft


@pytest.fixture(scope="module")
def draft(loaded_target: Target) -> DraftModel:
    return bigram_draft(loaded_target)


def engine_of(target: Target, draft: DraftModel | None, slots: int = 2) -> Engine:
    engine = Engine(target, EngineLimits(slots, 160), AsyncPolicy())
    engine.swap_draft(draft)
    return engine


@pytest.fixture(scope="module")
def measured(loaded_target: Target, draft: DraftModel) -> CostTable:
    return engine_of(loaded_target, draft).profile()


def test_an_adaptive_policy_has_costs_measured_at_the_latest_when_it_needs_them(
    loaded_target: Target, draft: DraftModel
) -> None:
    engine = engine_of(loaded_target, draft)
    assert engine.costs is None
    found = answer(engine, greedy(questions(loaded_target, 3), 8))
    assert engine.costs is not None and engine.costs.draft_ms
    plain = answer(engine_of(loaded_target, None), greedy(questions(loaded_target, 3), 8))
    assert {n: a.token_ids for n, a in found.items()} == {n: a.token_ids for n, a in plain.items()}


def test_a_stored_table_is_used_where_it_was_measured(
    loaded_target: Target, draft: DraftModel, measured: CostTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "profile", lambda self: pytest.fail("measured again"))
    engine = engine_of(loaded_target, draft)
    stored = json.loads(json.dumps(measured.to_json()))
    find_costs(engine, Calibration((1.0,) * 4, extra={"cost_table": stored}))
    assert engine.costs == measured


@pytest.mark.parametrize(
    ("facts", "slots", "said"),
    [
        ({"machine": "another"}, 2, "machine: another there"),
        ({"dtype": "float16"}, 2, "dtype: float16 there, float32 here"),
        ({}, 3, "it ends at 2 requests"),
    ],
)
def test_a_table_of_elsewhere_is_not_used_and_the_log_says_why(
    loaded_target: Target,
    draft: DraftModel,
    measured: CostTable,
    caplog: pytest.LogCaptureFixture,
    facts: dict[str, str],
    slots: int,
    said: str,
) -> None:
    other = replace(measured, facts={**measured.facts, **facts})
    engine = engine_of(loaded_target, draft, slots)
    with caplog.at_level(logging.INFO):
        find_costs(engine, Calibration((1.0,) * 4, extra={"cost_table": other.to_json()}))
    assert said in caplog.text
    assert engine.costs is not None and engine.costs.covers(slots, slots * 5)
    assert engine.costs.facts == measured.facts


def test_another_drafts_part_is_measured_again(loaded_target: Target, draft: DraftModel, measured: CostTable) -> None:
    engine = engine_of(loaded_target, draft)
    assert engine.use_costs(replace(measured, draft_ms=(500.0, 500.0), facts={**measured.facts, "draft": "x"})) == []
    assert engine.costs is not None
    assert engine.costs.verify_ms == measured.verify_ms and engine.costs.draft_cost(1) < 400
    # A swap forgets what the old draft cost, and keeps what the target does.
    engine.swap_draft(bigram_draft(loaded_target, block_size=2))
    assert engine.costs.verify_ms == measured.verify_ms and engine.costs.draft_ms == ()
    answer(engine, greedy(questions(loaded_target, 1), 8))
    assert engine.costs.draft_ms


def test_the_last_steps_report_adds_up(loaded_target: Target, draft: DraftModel) -> None:
    engine = engine_of(loaded_target, draft)
    assert engine.load().step == StepReport()
    engine.policy = FixedPolicy(2)
    engine.profile()
    for request in greedy(questions(loaded_target, 2), 30):
        engine.submit(request)
    engine.step()
    first = engine.load().step
    assert first.num_requests == 0 and first.num_tokens == first.num_prefill_tokens > 0
    for _ in range(5):
        engine.step()
    report = engine.load().step
    assert (report.num_requests, report.num_drafting, report.budget, report.num_tokens) == (2, 2, 4, 6)
    assert 0 <= report.num_accepted <= 4
    assert 0 < report.draft_ms + report.verify_ms < report.measured_ms
    assert report.predicted_ms > 0
    assert 0 < report.calibration_ece <= 1 and 0 < report.calibration_brier <= 1
