"""The table of contenders says what each engine did."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import pytest

from draftline.engine.engine import Engine, EngineLimits, StepTrace
from draftline.engine.requests import SpeculationStats
from draftline.errors import InputError
from draftline.evaluation import baselines
from draftline.evaluation.baselines import (
    PLAIN,
    BaselineSettings,
    EngineFactory,
    acceptance_by_position,
    measure_baselines,
)
from draftline.evaluation.prompt import SuitePrompt
from draftline.evaluation.turns import Decoding, EvaluationPrompt, tokenised
from draftline.scheduling.policies import FixedPolicy, OffPolicy
from draftline.target.load import Target
from tests.engine.runs import answer, one_too_many
from tests.servers.tiny_target import bigram_draft, grammar_pair, random_draft, tiny_draft_config

SETTINGS = BaselineSettings(20, 400, timing_prompts=3, lossless_prompts=4)


@pytest.fixture(scope="module")
def prompts(loaded_target: Target) -> list[EvaluationPrompt]:
    questions = [grammar_pair(random.Random(seed))[0] for seed in range(8)]
    suite = [SuitePrompt(f"p{n}", "desk", None, (q,)) for n, q in enumerate(questions[:6])]
    return [tokenised(loaded_target, p) for p in [*suite, SuitePrompt("two", "desk", None, tuple(questions[6:]))]]


@pytest.fixture(scope="module")
def contenders(loaded_target: Target) -> dict[str, EngineFactory]:
    good = bigram_draft(loaded_target)
    poor = random_draft(replace(tiny_draft_config(loaded_target.config), block_size=3), 0)

    def plain(slots: int, context: int) -> Engine:
        return Engine(loaded_target, EngineLimits(slots, context), OffPolicy())

    def drafting(draft: Any) -> EngineFactory:
        def make(slots: int, context: int) -> Engine:
            engine = Engine(loaded_target, EngineLimits(slots, context), FixedPolicy())
            engine.swap_draft(draft)
            return engine

        return make

    return {PLAIN: plain, "good": drafting(good), "poor": drafting(poor)}


def test_rows_are_what_each_engine_did(
    loaded_target: Target, contenders: dict[str, EngineFactory], prompts: list[EvaluationPrompt]
) -> None:
    seen: list[str] = []
    table = measure_baselines(
        loaded_target, contenders, prompts, SETTINGS, on_progress=lambda what, done: seen.append(what)
    )
    assert list(table.rows) == list(contenders) and (table.num_prompts, table.num_timed) == (7, 3)
    plain, good, poor = table.rows.values()
    assert plain.accepted_length == (1.0, 1.0) and plain.acceptance_by_position == ()
    assert plain.speedup == 1.0
    assert good.accepted_length[0] > poor.accepted_length[0] >= 1
    assert good.bytes_per_call[0] > plain.bytes_per_call[0]
    assert good.bytes_per_call[0] / plain.bytes_per_call[0] == pytest.approx(good.accepted_length[0])
    assert len(good.acceptance_by_position) == 4 and len(poor.acceptance_by_position) == 3
    first_turns = [p for p in prompts if p.num_turns == 1]
    table = measure_baselines(loaded_target, contenders, first_turns, replace(SETTINGS, temperatures=(1.0,)))
    requests = [Decoding(20, 1.0).request(p.id, p.ids, n) for n, p in enumerate(first_turns)]
    stats = SpeculationStats()
    for one in answer(contenders["good"](8, 200), requests).values():
        stats.add(one.stats)
    assert table.rows["good"].accepted_length == (pytest.approx(stats.tokens_per_step),)
    assert {what.rpartition(", ")[2] for what in seen} == {"temperature 0", "temperature 1", "speed", "losslessness"}


def test_every_contender_is_proven_against_plain_decoding(
    loaded_target: Target,
    contenders: dict[str, EngineFactory],
    prompts: list[EvaluationPrompt],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table = measure_baselines(loaded_target, contenders, prompts, SETTINGS)
    assert {row.lossless.verdict for row in table.rows.values()} == {"lossless"}
    assert {row.lossless.num_equal for row in table.rows.values()} == {4}
    verify = Engine._verify

    def lenient(self, output, chunks, ready, drafts):  # type: ignore[no-untyped-def]
        verdicts = verify(self, output, chunks, ready, drafts)
        return {slot: one_too_many(verdict, drafts.ids(slot)) for slot, verdict in verdicts.items()}

    monkeypatch.setattr(Engine, "_verify", lenient)
    table = measure_baselines(loaded_target, contenders, prompts, SETTINGS)
    assert [row.lossless.verdict for row in table.rows.values()] == ["lossless", "diverged", "diverged"]


def test_contenders_take_turns_and_speed_is_a_median_of_ratios(
    loaded_target: Target,
    contenders: dict[str, EngineFactory],
    prompts: list[EvaluationPrompt],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = {PLAIN: [10.0, 20.0, 10.0], "good": [20.0, 60.0, 50.0], "poor": [5.0, 20.0, 9.0]}
    monkeypatch.setattr(baselines, "time_alternately", lambda *_: (found, {}))
    table = measure_baselines(
        loaded_target, contenders, prompts, replace(SETTINGS, lossless_prompts=0, temperatures=(0.0,))
    )
    assert {name: row.speedup for name, row in table.rows.items()} == {PLAIN: 1.0, "good": 3.0, "poor": 0.9}
    assert table.rows["good"].tokens_per_s == 50.0
    assert {row.lossless.verdict for row in table.rows.values()} == {"not-checked"}
    assert json.loads(json.dumps(table.to_json(), allow_nan=False)) == table.to_json()
    lines = table.to_markdown().splitlines()
    assert lines[0] == (
        "|  | accepted length, T=0 | bytes per call, T=0 | tokens/s | over no speculation | greedy output equal |"
    )
    assert lines[3].startswith("| good | ") and lines[3].endswith("| 50.0 | 3.00x | not checked |")


def test_conditional_acceptance_of_ragged_blocks() -> None:
    traces = [StepTrace("r", (), verified, accepted) for verified, accepted in ((3, 3), (2, 1), (1, 0), (1, 1), (0, 0))]
    assert acceptance_by_position(traces) == pytest.approx((3 / 4, 1 / 2, 1.0))
    assert acceptance_by_position([]) == ()


def test_nothing_to_compare_with_is_refused(
    loaded_target: Target, contenders: dict[str, EngineFactory], prompts: list[EvaluationPrompt]
) -> None:
    with pytest.raises(InputError, match="one named 'no speculation'"):
        measure_baselines(loaded_target, {"good": contenders["good"]}, prompts, SETTINGS)
    with pytest.raises(InputError, match="no prompt"):
        measure_baselines(loaded_target, contenders, [], SETTINGS)
