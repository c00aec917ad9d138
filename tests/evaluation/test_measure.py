"""What the evaluation says is what the engine did."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from draftline.calibration.measures import measure_confidences, survival_events
from draftline.calibration.survival import Calibration
from draftline.engine.engine import Engine
from draftline.engine.requests import EngineRequest, TokenEvent
from draftline.evaluation import measure, throughput
from draftline.evaluation.measure import Bench, compare_greedy, measure_acceptance, measure_speed
from draftline.evaluation.prompt import SuitePrompt
from draftline.evaluation.throughput import ROUNDS, measure_load
from draftline.evaluation.turns import Decoding, EvaluationPrompt, tokenised
from draftline.responses.generate import prompt_ids
from draftline.scheduling.policies import FixedPolicy, OffPolicy, ThresholdPolicy
from draftline.target.load import Target
from tests.engine.runs import answer, one_too_many
from tests.servers.tiny_target import bigram_draft, grammar_pair, random_draft, tiny_draft_config


@pytest.fixture(scope="module")
def bench(loaded_target: Target) -> Bench:
    draft = bigram_draft(loaded_target)
    return Bench(loaded_target, draft, Calibration.identity(4), ThresholdPolicy(0.3), 24, 400)


@pytest.fixture(scope="module")
def prompts(loaded_target: Target) -> list[EvaluationPrompt]:
    questions = [grammar_pair(random.Random(seed))[0] for seed in range(10)]
    suite = [SuitePrompt(f"p{n}", "even" if n % 2 == 0 else "odd", None, (q,)) for n, q in enumerate(questions)]
    return [tokenised(loaded_target, prompt) for prompt in suite]


@pytest.fixture(scope="module")
def dialogues(loaded_target: Target) -> list[EvaluationPrompt]:
    """Four conversations of one to three turns."""
    turns = [grammar_pair(random.Random(seed))[0] for seed in range(9)]
    suite = [
        SuitePrompt("a", "chat", "be kind", tuple(turns[:3])),
        SuitePrompt("b", "chat", None, tuple(turns[3:5])),
        SuitePrompt("c", "chat", None, (turns[5],)),
        SuitePrompt("d", "desk", None, tuple(turns[6:9])),
    ]
    return [tokenised(loaded_target, prompt) for prompt in suite]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_acceptance_is_counted_over_whole_blocks(
    bench: Bench, prompts: list[EvaluationPrompt], temperature: float
) -> None:
    # So few tokens that requests end in the middle of a block, which is then no whole one.
    bench = replace(bench, max_new_tokens=8)
    seen: list[float] = []
    found = measure_acceptance(bench, prompts, temperature, seen.append)
    assert seen == list(range(1, 11))
    engine = bench.engine(FixedPolicy(), 8, 64)
    engine.traces = []
    decoding = bench.decoding(temperature)
    answers = answer(engine, [decoding.request(p.id, p.ids, n) for n, p in enumerate(prompts)])
    assert found.total.num_tokens == sum(len(one.token_ids) for one in answers.values())
    assert (found.total.num_prompts, found.total.num_turns, found.num_dropped_turns) == (10, 10, 0)
    steps = sum(one.stats.num_steps for one in answers.values())
    emitted = sum(len(one.token_ids) - 1 for one in answers.values())
    assert found.total.accepted_length == pytest.approx(emitted / steps)
    for domain, parity in (("even", 0), ("odd", 1)):
        stats = [answers[f"p{n}"].stats for n in range(parity, 10, 2)]
        length = sum(s.num_output_tokens for s in stats) / sum(s.num_steps for s in stats)
        assert found.domains[domain].accepted_length == pytest.approx(length)
        assert found.domains[domain].num_prompts == 5
    traces = [t for t in engine.traces if t.num_verified == 4]
    assert 0 < len(traces) < len(engine.traces)
    survived = [sum(t.num_accepted > k for t in traces) / len(traces) for k in range(4)]
    assert found.total.survival == pytest.approx(survived)
    reached = 1.0
    for conditional, total in zip(found.total.by_position, survived, strict=True):
        assert conditional * reached == pytest.approx(total)
        reached = total
    assert 1 < found.total.accepted_length < 5
    assert json.loads(json.dumps(found.to_json(), allow_nan=False)) == found.to_json()


def test_confidences_are_measured_raw_and_scaled(bench: Bench, prompts: list[EvaluationPrompt]) -> None:
    scaled = replace(bench, calibration=Calibration((0.5, 2.0, 1.0, 3.0)))
    found = measure_acceptance(scaled, prompts, 0.0, lambda done: None)
    engine = bench.engine(FixedPolicy(), 8, 64)
    engine.traces = []
    answer(engine, [bench.decoding(0.0).request(p.id, p.ids, n) for n, p in enumerate(prompts)])
    whole = [t for t in engine.traces if t.num_verified == 4]
    logits = np.array([t.confidence_B for t in whole])
    events = survival_events([t.num_accepted for t in whole], 4)
    confidence = found.to_json()["confidence"]
    assert confidence["before"] == measure_confidences(Calibration.identity(4).survival(logits), events).to_json()
    assert confidence["after"] == measure_confidences(scaled.calibration.survival(logits), events).to_json()
    assert confidence["after"] != confidence["before"]
    assert found.ece == pytest.approx(np.mean(confidence["after"]["ece"]))
    assert [point.threshold for point in found.sweep] == pytest.approx([0.1 * n for n in range(9)])
    assert found.sweep[0].verified_length == 4
    assert found.sweep[0].acceptance_rate == pytest.approx(np.mean([t.num_accepted for t in whole]) / 4)


def test_the_sweep_comes_near_a_real_run_at_the_threshold(bench: Bench, prompts: list[EvaluationPrompt]) -> None:
    """An estimate: a real run starts its blocks elsewhere. The tolerance says how far that goes here."""
    found = measure_acceptance(bench, prompts, 0.0, lambda done: None)
    point = next(point for point in found.sweep if point.threshold == 0.3)
    policy = ThresholdPolicy(0.3)
    engine = bench.engine(policy, 8, 64)
    engine.traces = []
    answer(engine, [bench.decoding(0.0).request(p.id, p.ids, n) for n, p in enumerate(prompts)])
    verified = np.array([t.num_verified for t in engine.traces])
    accepted = np.array([t.num_accepted for t in engine.traces])
    assert 0 < verified.mean() < 4
    assert point.verified_length == pytest.approx(verified.mean(), rel=0.2)
    assert point.acceptance_rate == pytest.approx(accepted.sum() / verified.sum(), rel=0.2)


def test_bytes_per_call_are_those_of_the_text_that_decode_steps_wrote(
    bench: Bench, prompts: list[EvaluationPrompt]
) -> None:
    found = measure_acceptance(bench, prompts, 0.0, lambda done: None)
    decode = bench.target.tokenizer.decode
    written = steps = 0
    for turn in found.turns:
        text, first = (str(decode(list(ids), skip_special_tokens=True)) for ids in (turn.answer, turn.answer[:1]))
        assert text.startswith("your ") and text.isascii()
        written += len(text) - len(first)
        steps += turn.stats.num_steps
    assert found.total.bytes_per_call == pytest.approx(written / steps)
    assert found.total.bytes_per_call > 2 * found.total.accepted_length


def test_later_turns_follow_the_targets_own_answers(bench: Bench, dialogues: list[EvaluationPrompt]) -> None:
    decode = bench.target.tokenizer.decode
    found = measure_acceptance(bench, dialogues, 0.0, lambda done: None)
    turns = {(turn.prompt.id, turn.turn): turn for turn in found.turns}
    assert set(turns) == {(p.id, t) for p in dialogues for t in range(p.num_turns)} and len(turns) == 9
    plain = bench.engine(OffPolicy(), 1, 400)
    for prompt in dialogues:
        messages = [{"role": role, "content": content} for role, content in prompt.opening]
        for place, follow_up in enumerate((*prompt.follow_ups, "")):
            turn = turns[prompt.id, place]
            assert turn.ids == prompt_ids(bench.target, messages)
            alone = answer(plain, [Decoding(24).request("x", turn.ids, 0)])["x"].token_ids
            assert turn.answer == tuple(alone)
            text = str(decode(list(turn.answer), skip_special_tokens=True))
            messages += [{"role": "assistant", "content": text}, {"role": "user", "content": follow_up}]
    assert (found.total.num_prompts, found.total.num_turns) == (4, 9)
    assert {name: figures.num_turns for name, figures in found.domains.items()} == {"chat": 6, "desk": 3}
    assert found.total.num_tokens == sum(len(turn.answer) for turn in found.turns)
    last = turns["a", 2].as_prompt()
    assert (last.id, last.ids, last.num_turns) == ("a, turn 3", turns["a", 2].ids, 1)


def test_turns_that_do_not_fit_are_left_out_and_counted(bench: Bench, dialogues: list[EvaluationPrompt]) -> None:
    whole = measure_acceptance(bench, dialogues, 0.0, lambda done: None)
    lengths = {(turn.prompt.id, turn.turn): len(turn.ids) for turn in whole.turns}
    # Everything but the last turn of the longest conversation fits.
    limit = lengths["a", 2] + bench.max_new_tokens - 1
    found = measure_acceptance(replace(bench, max_context=limit), dialogues, 0.0, lambda done: None)
    assert found.num_dropped_turns == 1 and found.total.num_turns == 8


def test_a_draft_without_confidences_has_no_ece(
    bench: Bench, prompts: list[EvaluationPrompt], loaded_target: Target
) -> None:
    config = replace(
        tiny_draft_config(loaded_target.config), enable_confidence_head=False, confidence_with_markov=False
    )
    poor = replace(bench, draft=random_draft(config, 0), calibration=Calibration.identity(3))
    found = measure_acceptance(poor, prompts[:3], 0.0, lambda done: None)
    assert found.ece is None and found.sweep == [] and found.to_json()["confidence"] is None
    assert len(found.total.survival) == 3 and found.total.accepted_length >= 1


def test_a_lossless_engine_is_called_lossless(
    bench: Bench, prompts: list[EvaluationPrompt], dialogues: list[EvaluationPrompt]
) -> None:
    seen: list[float] = []
    found = compare_greedy(bench, prompts, 20, seen.append)
    assert (found.verdict, found.num_prompts, found.num_equal, found.first_difference) == ("lossless", 10, 10, None)
    assert seen == sorted(seen) and seen[-1] == pytest.approx(10)
    found = compare_greedy(bench, dialogues, 20, seen.append)
    assert (found.verdict, found.num_prompts) == ("lossless", 4) and seen[-1] == pytest.approx(4)


def test_a_changed_token_is_found_and_placed(
    bench: Bench, prompts: list[EvaluationPrompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that accepts one draft too many, as a wrong verification would."""
    verify = Engine._verify

    def lenient(self, output, chunks, ready, drafts):  # type: ignore[no-untyped-def]
        verdicts = verify(self, output, chunks, ready, drafts)
        for request, _ in chunks:
            if request.request.request_id == "p3" and len(request.output_ids) >= 5:
                verdicts[request.slot] = one_too_many(verdicts[request.slot], drafts.ids(request.slot))
        return verdicts

    monkeypatch.setattr(Engine, "_verify", lenient)
    found = compare_greedy(bench, prompts, 20, lambda done: None)
    assert (found.verdict, found.num_prompts, found.num_equal) == ("diverged", 10, 9)
    assert found.first_difference is not None and found.first_difference.startswith("prompt p3, token ")
    assert int(found.first_difference.rsplit(" ", 1)[1]) >= 5


def test_a_difference_in_a_later_turn_is_placed_there() -> None:
    prompt = EvaluationPrompt("p", "d", (1,), (), ("more?",))
    found = measure.compare_answers([prompt], {"p": ((1, 2), (3, 4, 5))}, {"p": ((1, 2), (3, 4, 6))})
    assert found.first_difference == "prompt p, turn 2, token 2"
    found = measure.compare_answers([prompt], {"p": ((1, 2), (3,))}, {"p": ((1,), (3,))})
    assert found.first_difference == "prompt p, turn 1, token 1"


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
    found = measure_speed(bench, prompts[:3], 0.0, 2, lambda done: None)
    assert order == ["plain", "speculative", "speculative", "plain", "plain", "speculative"]
    # Speculative 30, 20, 50 against plain 10, 10, 10.
    assert found.speedup_over_plain == 3.0
    assert found.speedup_over_transformers == pytest.approx((6.0 + 4.0) / 2)
    assert found.tokens_per_s == {"plain": 10.0, "speculative": 30.0, "transformers": 5.0}
    assert found.serving_accepted_length == 2.5


def test_speed_is_measured_for_real(bench: Bench, prompts: list[EvaluationPrompt]) -> None:
    found = measure_speed(bench, prompts[:2], 0.0, 1, lambda done: None)
    assert set(found.tokens_per_s) == {"plain", "speculative", "transformers"}
    assert min(found.tokens_per_s.values()) > 0
    assert found.speedup_over_plain > 0 and found.speedup_over_transformers is not None
    assert 1 <= found.serving_accepted_length <= 5
    assert measure_speed(bench, prompts[:1], 1.0, 0, lambda done: None).speedup_over_transformers is None


def test_load_runs_as_many_requests_together_as_it_says(
    bench: Bench, prompts: list[EvaluationPrompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    together: list[int] = []
    run = throughput.run_to_completion

    def counted(engine: Engine, requests: list[EngineRequest]) -> Iterator[TokenEvent]:
        together.append(len({request.request_id for request in requests}))
        return run(engine, requests)

    monkeypatch.setattr(throughput, "run_to_completion", counted)
    told: list[float] = []
    found = measure_load(bench, prompts[:2], 3, 0.0, told.append)
    assert together == [3] * (2 + 2 * ROUNDS)
    assert told == list(range(1, ROUNDS + 1))
    assert found.concurrency == 3
    assert set(found.tokens_per_s) == {"plain", "speculative"} and min(found.tokens_per_s.values()) > 0
    assert found.speedup_over_plain > 0


def test_load_compares_within_each_round(
    bench: Bench, prompts: list[EvaluationPrompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    warm_up, rounds = [1.0, 1.0], [10.0, 20.0, 10.0, 30.0, 10.0, 50.0]
    # The order within a round alternates: plain first, speculative first, plain first.
    rates = iter([*warm_up, *rounds[:2], rounds[3], rounds[2], *rounds[4:]])
    monkeypatch.setattr(throughput, "_rate", lambda *_: next(rates))
    found = measure_load(bench, prompts[:2], 2, 0.0, lambda done: None)
    assert found.speedup_over_plain == 3.0
    assert found.tokens_per_s == {"plain": 10.0, "speculative": 30.0}
