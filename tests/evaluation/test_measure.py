"""What the evaluation says is what the engine did."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from draftline.calibration.survival import Calibration
from draftline.engine.engine import Engine
from draftline.engine.policy import FixedPolicy, OffPolicy, ThresholdPolicy
from draftline.evaluation import measure
from draftline.evaluation.measure import (
    Bench,
    EvaluationPrompt,
    compare_greedy,
    measure_acceptance,
    measure_speed,
)
from draftline.responses.generate import prompt_ids
from draftline.target.load import Target
from tests.engine.runs import answer
from tests.servers.tiny_target import bigram_draft, grammar_pair, random_draft, tiny_draft_config


@pytest.fixture(scope="module")
def bench(loaded_target: Target) -> Bench:
    draft = bigram_draft(loaded_target)
    return Bench(loaded_target, draft, Calibration.identity(4), ThresholdPolicy(0.3), 24)


@pytest.fixture(scope="module")
def prompts(loaded_target: Target) -> list[EvaluationPrompt]:
    questions = [grammar_pair(random.Random(seed))[0] for seed in range(10)]
    return [
        EvaluationPrompt(
            f"p{n}", "even" if n % 2 == 0 else "odd", prompt_ids(loaded_target, [{"role": "user", "content": q}])
        )
        for n, q in enumerate(questions)
    ]


def test_acceptance_is_counted_over_whole_blocks(bench: Bench, prompts: list[EvaluationPrompt]) -> None:
    # So few tokens that requests end in the middle of a block, which is then no whole one.
    bench = replace(bench, max_new_tokens=8)
    seen: list[float] = []
    found = measure_acceptance(bench, prompts, seen.append)
    assert seen == list(range(1, 11))
    engine = bench.engine(FixedPolicy(), 8, 64, keep_traces=True)
    answers = answer(engine, [bench.request(p, n) for n, p in enumerate(prompts)])
    assert found.num_tokens == sum(len(one.token_ids) for one in answers.values())
    steps = sum(one.stats.num_spec_steps for one in answers.values())
    accepted = sum(one.stats.num_accepted_tokens for one in answers.values())
    assert found.accepted_length == pytest.approx(1 + accepted / steps)
    for domain, parity in (("even", 0), ("odd", 1)):
        stats = [answers[f"p{n}"].stats for n in range(parity, 10, 2)]
        length = 1 + sum(s.num_accepted_tokens for s in stats) / sum(s.num_spec_steps for s in stats)
        assert found.domains[domain] == pytest.approx(length)
    traces = [t for t in engine.traces or [] if t.num_verified == 4]
    assert 0 < len(traces) < len(engine.traces or [])
    survived = [sum(t.num_accepted > k for t in traces) / len(traces) for k in range(4)]
    assert found.survival == pytest.approx(survived)
    reached = 1.0
    for conditional, total in zip(found.by_position, survived, strict=True):
        assert conditional * reached == pytest.approx(total)
        reached = total
    assert 1 < found.accepted_length < 5 and 0 <= found.ece <= 1


def test_a_draft_without_confidences_has_no_ece(
    bench: Bench, prompts: list[EvaluationPrompt], loaded_target: Target
) -> None:
    config = replace(
        tiny_draft_config(loaded_target.config), enable_confidence_head=False, confidence_with_markov=False
    )
    poor = replace(bench, draft=random_draft(config, 0), calibration=Calibration.identity(3))
    found = measure_acceptance(poor, prompts[:3], lambda done: None)
    assert math.isnan(found.ece)
    assert len(found.survival) == 3 and found.accepted_length >= 1


def test_a_lossless_engine_is_called_lossless(bench: Bench, prompts: list[EvaluationPrompt]) -> None:
    seen: list[float] = []
    found = compare_greedy(bench, prompts, 20, seen.append)
    assert (found.verdict, found.num_prompts, found.num_equal, found.first_difference) == ("lossless", 10, 10, None)
    assert seen == sorted(seen) and seen[-1] == pytest.approx(10)


def test_a_changed_token_is_found_and_placed(
    bench: Bench, prompts: list[EvaluationPrompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that accepts one draft too many, as a wrong verification would."""
    verify = Engine._verify

    def lenient(self, request, law, best, drafted, proposal, row):  # type: ignore[no-untyped-def]
        ids, accepted = verify(self, request, law, best, drafted, proposal, row)
        if request.request.request_id == "p3" and len(request.output_ids) >= 5 and accepted < len(drafted):
            return [*drafted[: accepted + 1], best[accepted + 1]], accepted + 1
        return ids, accepted

    monkeypatch.setattr(Engine, "_verify", lenient)
    found = compare_greedy(bench, prompts, 20, lambda done: None)
    assert (found.verdict, found.num_prompts, found.num_equal) == ("diverged", 10, 9)
    assert found.first_difference is not None and found.first_difference.startswith("prompt p3, token ")
    assert int(found.first_difference.rsplit(" ", 1)[1]) >= 5


def test_speed_alternates_and_takes_medians_of_ratios(
    bench: Bench, prompts: list[EvaluationPrompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = iter([10.0, 30.0, 20.0, 10.0, 10.0, 50.0])
    order: list[str] = []

    def rate(engine: Engine, request: object) -> tuple[float, measure.SpeculationStats]:
        order.append("plain" if isinstance(engine.policy, OffPolicy) else "speculative")
        return next(rates), measure.SpeculationStats(
            num_spec_steps=1, num_accepted_tokens=3, num_steps=2, num_output_tokens=5
        )

    monkeypatch.setattr(measure, "_decode_rate", rate)
    monkeypatch.setattr(measure, "_transformers_rates", lambda bench, prompts: [5.0, 5.0])
    found = measure_speed(bench, prompts[:3], 2, lambda done: None)
    assert order == ["plain", "speculative", "speculative", "plain", "plain", "speculative"]
    # Speculative 30, 20, 50 against plain 10, 10, 10.
    assert found.speedup_over_plain == 3.0
    assert found.speedup_over_transformers == pytest.approx((6.0 + 4.0) / 2)
    assert found.tokens_per_s == {"plain": 10.0, "speculative": 30.0, "transformers": 5.0}
    assert found.serving_accepted_length == 2.5


def test_speed_is_measured_for_real(bench: Bench, prompts: list[EvaluationPrompt]) -> None:
    found = measure_speed(bench, prompts[:2], 1, lambda done: None)
    assert set(found.tokens_per_s) == {"plain", "speculative", "transformers"}
    assert min(found.tokens_per_s.values()) > 0
    assert found.speedup_over_plain > 0 and found.speedup_over_transformers is not None
    assert 1 <= found.serving_accepted_length <= 5
    assert measure_speed(bench, prompts[:1], 0, lambda done: None).speedup_over_transformers is None
