"""In fp32, greedy output with any draft under any policy is the target's own, token for token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from draftline.draft.checkpoint import DraftModel
from draftline.draft.prompt_lookup import PromptLookup
from draftline.engine.engine import READ_AGAIN_TOKENS, Engine
from draftline.engine.requests import EngineRequest, SamplingParams
from draftline.scheduling.policies import (
    AsyncPolicy,
    FixedPolicy,
    LengthPolicy,
    OffPolicy,
    StepView,
    SyncPolicy,
    ThresholdPolicy,
)
from draftline.target.load import Target
from tests.counted_forward import count_rows
from tests.engine.runs import Answer, answer, check_dense, finish, gather, greedy, make_engine, questions
from tests.servers.tiny_target import bigram_draft, random_draft, tiny_draft_config, tiny_eagle3_config

POLICIES = [
    OffPolicy(),
    FixedPolicy(),
    FixedPolicy(1),
    FixedPolicy(2),
    ThresholdPolicy(0.3),
    SyncPolicy(),
    AsyncPolicy(),
]


@pytest.fixture(scope="module")
def requests(loaded_target: Target) -> list[EngineRequest]:
    return greedy(questions(loaded_target, 7))


@pytest.fixture(scope="module")
def plain(loaded_target: Target, requests: list[EngineRequest]) -> dict[str, Answer]:
    """Each request alone in a fresh engine without a draft."""
    return {r.request_id: answer(make_engine(loaded_target), [r])[r.request_id] for r in requests}


@pytest.fixture(scope="module")
def draft(loaded_target: Target) -> DraftModel:
    return bigram_draft(loaded_target)


def assert_equal(found: dict[str, Answer], plain: dict[str, Answer]) -> None:
    assert found.keys() == plain.keys()
    for name, one in found.items():
        assert one.token_ids == plain[name].token_ids, name
        assert one.reasons == plain[name].reasons
        assert one.logprobs == pytest.approx(plain[name].logprobs, abs=2e-4)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("slots", "prefill_tokens"), [(1, 512), (3, 9), (8, 20)])
def test_speculation_changes_no_token(
    loaded_target: Target,
    requests: list[EngineRequest],
    plain: dict[str, Answer],
    draft: DraftModel,
    policy: LengthPolicy,
    slots: int,
    prefill_tokens: int,
) -> None:
    engine = make_engine(loaded_target, draft, policy, slots=slots, prefill_tokens=prefill_tokens)
    found = answer(engine, requests)
    assert_equal(found, plain)
    accepted = sum(one.stats.num_accepted_tokens for one in found.values())
    drafted = sum(one.stats.num_draft_tokens for one in found.values())
    # The test means something only where drafts are both accepted and rejected.
    assert (0 < accepted < drafted) == policy.wants_draft


@pytest.mark.parametrize("head", ["vanilla", "gated", "rnn", "none"])
def test_hopeless_and_pruned_drafts_change_no_token(
    loaded_target: Target, requests: list[EngineRequest], plain: dict[str, Answer], head: str
) -> None:
    config = tiny_draft_config(loaded_target.config)
    if head == "none":
        config = replace(config, markov_rank=0, enable_confidence_head=False, confidence_with_markov=False)
    else:
        config = replace(config, markov_head=head)
    vocab = torch.arange(250, loaded_target.vocab_size, 2)
    engine = make_engine(loaded_target, random_draft(config, 1, vocab=vocab), ThresholdPolicy(0.2), slots=4)
    assert_equal(answer(engine, requests), plain)


@pytest.mark.parametrize("policy", [ThresholdPolicy(0.3), SyncPolicy(), AsyncPolicy()])
def test_lengths_are_ragged(
    loaded_target: Target, requests: list[EngineRequest], draft: DraftModel, policy: LengthPolicy
) -> None:
    found = answer(make_engine(loaded_target, draft, policy, slots=4), requests)
    drafted = sum(one.stats.num_draft_tokens for one in found.values())
    steps = sum(one.stats.num_steps for one in found.values())
    assert 0.2 < drafted / steps / draft.config.block_size < 0.9


class RandomPolicy:
    """Lengths at random: whatever a policy chooses, greedy output is the target's."""

    wants_draft = True
    is_adaptive = False

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)

    def lengths(self, view: StepView) -> NDArray[np.int64]:
        return self._random.integers(0, view.caps_M + 1)


@pytest.mark.parametrize("seed", range(3))
def test_random_ragged_lengths_and_policies_that_change_change_no_token(
    loaded_target: Target, requests: list[EngineRequest], plain: dict[str, Answer], draft: DraftModel, seed: int
) -> None:
    random = np.random.default_rng(seed)
    engine = make_engine(loaded_target, draft, RandomPolicy(seed), slots=3 + seed, prefill_tokens=11)
    answers: dict[str, Answer] = {}
    for request in random.permutation(np.array(requests, dtype=object)):
        engine.submit(request)
        gather(engine.step(), answers)
    while engine.has_work:
        engine.policy = [RandomPolicy(seed), *POLICIES][random.integers(len(POLICIES) + 1)]
        gather(engine.step(), answers)
        check_dense(engine)
    assert_equal(answers, plain)


def test_requests_may_come_and_go_while_others_run(
    loaded_target: Target, requests: list[EngineRequest], plain: dict[str, Answer], draft: DraftModel
) -> None:
    engine = make_engine(loaded_target, draft, slots=3, prefill_tokens=8)
    answers: dict[str, Answer] = {}
    doomed = [replace(r, request_id=f"doomed-{r.request_id}") for r in requests]
    for number, (request, other) in enumerate(zip(requests, doomed, strict=True)):
        engine.submit(other)
        engine.submit(request)
        for _ in range(2 + number):
            gather(engine.step(), answers)
            check_dense(engine)
        engine.cancel(other.request_id)
    finish(engine, answers)
    assert_equal({name: one for name, one in answers.items() if not name.startswith("doomed")}, plain)
    cancelled = [answers[r.request_id] for r in doomed]
    assert all(one.reasons in (["cancelled"], ["length"]) for one in cancelled)
    assert sum(one.reasons == ["cancelled"] for one in cancelled) >= 4
    for one, request in zip(cancelled, requests, strict=True):
        assert one.token_ids == plain[request.request_id].token_ids[: len(one.token_ids)]


def test_drafts_may_be_swapped_while_requests_run(
    loaded_target: Target, requests: list[EngineRequest], plain: dict[str, Answer], draft: DraftModel
) -> None:
    other = bigram_draft(loaded_target, seed=5, block_size=2)
    engine = make_engine(loaded_target, draft, slots=3)
    for request in requests:
        engine.submit(request)
    answers: dict[str, Answer] = {}
    for next_draft in (other, None, draft, other):
        for _ in range(4):
            gather(engine.step(), answers)
            check_dense(engine)
        engine.swap_draft(next_draft)
    finish(engine, answers)
    assert_equal(answers, plain)


Exchange = Callable[[Engine], None]


@pytest.mark.parametrize("prefill_tokens", [512, 7])
@pytest.mark.parametrize("start", [1, 3, 9])
def test_requests_in_flight_regain_speculation_whoever_drafts_next(
    loaded_target: Target, draft: DraftModel, start: int, prefill_tokens: int
) -> None:
    """DSpark, Eagle3, prompt lookup, nothing and back, exchanged while prompts and answers are under way."""
    requests = greedy(questions(loaded_target, 4), 60)
    plain = {r.request_id: answer(make_engine(loaded_target), [r])[r.request_id] for r in requests}
    eagle3 = random_draft(tiny_eagle3_config(loaded_target.config), 3)
    exchanges: list[tuple[bool, Exchange]] = [
        (True, lambda engine: engine.swap_draft(eagle3)),
        (True, lambda engine: engine.swap_proposer(lambda room: PromptLookup(room, 4))),
        (False, lambda engine: engine.swap_draft(None)),
        (True, lambda engine: engine.swap_draft(draft)),
        (True, lambda engine: engine.swap_draft(bigram_draft(loaded_target, seed=5, block_size=2))),
    ]
    for first in range(len(exchanges)):
        engine = make_engine(loaded_target, draft, slots=3, prefill_tokens=prefill_tokens)
        for request in requests:
            engine.submit(request)
        answers: dict[str, Answer] = {}
        for _ in range(start):
            gather(engine.step(), answers)
        for drafts, exchange in exchanges[first : first + 2]:
            exchange(engine)
            before = drafted_tokens(engine)
            for _ in range(6 if prefill_tokens > 100 else 2):
                gather(engine.step(), answers)
                check_dense(engine)
            if prefill_tokens > 100 and start > 1:
                grown = {name: count > before[name] for name, count in drafted_tokens(engine).items() if name in before}
                assert set(grown.values()) == {drafts}, "requests draft, or do not, against what was exchanged"
        finish(engine, answers)
        assert_equal(answers, plain)


def drafted_tokens(engine: Engine) -> dict[str, int]:
    return {r.request.request_id: r.stats.num_draft_tokens for r in engine._slots.running}


def test_little_that_is_still_to_come_is_not_worth_reading_everything_again(
    loaded_target: Target, draft: DraftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = greedy([questions(loaded_target, 3)[2]], 12)[0]
    assert len(request.prompt_ids) > READ_AGAIN_TOKENS * 8
    engine = make_engine(loaded_target, draft, slots=2)
    engine.submit(request)
    answers = gather(engine.step())
    gather(engine.step(), answers)
    rows = count_rows(loaded_target, monkeypatch)
    engine.swap_draft(draft)
    finish(engine, answers)
    assert set(rows) == {1}


def test_a_prompt_with_a_known_beginning_takes_it_over(
    loaded_target: Target, draft: DraftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = questions(loaded_target, 3)[2]
    first, second = (*long, 11), (*long, 12, 13)
    requests = greedy([first, second])
    fresh = {r.request_id: answer(make_engine(loaded_target), [r])[r.request_id] for r in requests}
    engine = make_engine(loaded_target, draft, slots=2)
    processed = count_rows(loaded_target, monkeypatch)
    found = answer(engine, [requests[0]])
    assert processed[0] == len(first)
    processed.clear()
    found |= answer(engine, [requests[1]])
    assert processed[0] == 2
    assert_equal(found, fresh)
    # The same once more: only its last token, whose output is needed, is left to do.
    processed.clear()
    answer(engine, [requests[1]])
    assert processed[0] == 1
    # Another draft has no features of it.
    engine.swap_draft(draft)
    processed.clear()
    answer(engine, [requests[1]])
    assert processed[0] == len(second)
    # The draft's context came along: drafts are accepted as in an engine that computed it all.
    alone = answer(make_engine(loaded_target, draft), [requests[1]])["r1"]
    assert found["r1"].stats == alone.stats


def test_a_beginning_is_taken_over_from_a_request_that_still_runs(loaded_target: Target, draft: DraftModel) -> None:
    long = questions(loaded_target, 3)[2]
    requests = greedy([(*long, 11), (*long, 12, 13), (*long, 14)])
    fresh = {r.request_id: answer(make_engine(loaded_target), [r])[r.request_id] for r in requests}
    engine = make_engine(loaded_target, draft, slots=3)
    answers: dict[str, Answer] = {}
    for request in requests:
        engine.submit(request)
        gather(engine.step(), answers)
        gather(engine.step(), answers)
    finish(engine, answers)
    assert_equal(answers, fresh)


@pytest.fixture
def burst(loaded_target: Target) -> list[EngineRequest]:
    """Requests with one long system prompt, and in their midst one with a prompt of its own."""
    shared = [token for prompt in questions(loaded_target, 6, seed=3) for token in prompt][:100]
    assert len(shared) == 100
    prompts = [
        (*shared, *range(11, 16)),
        (*shared, 16, 17),
        (*questions(loaded_target, 2)[1],),
        (*shared, 18),
        (*shared, 19),
    ]
    return greedy(prompts, 20)


# In chunks of 40 the other three stop waiting once fewer than 64 shared tokens are left, and compute those 60 again.
@pytest.mark.parametrize(("prefill_tokens", "repeated"), [(512, 0), (40, 3 * 60)])
def test_a_burst_computes_its_common_beginning_once(
    loaded_target: Target,
    draft: DraftModel,
    burst: list[EngineRequest],
    monkeypatch: pytest.MonkeyPatch,
    prefill_tokens: int,
    repeated: int,
) -> None:
    fresh = {r.request_id: answer(make_engine(loaded_target), [r])[r.request_id] for r in burst}
    engine = make_engine(loaded_target, draft, slots=5, prefill_tokens=prefill_tokens)
    rows = count_rows(loaded_target, monkeypatch)
    found = answer(engine, burst)
    assert_equal(found, fresh)
    verified = sum(one.stats.num_draft_tokens + one.stats.num_steps for one in found.values())
    assert sum(rows) == 100 + 5 + 2 + len(burst[2].prompt_ids) + 1 + 1 + repeated + verified


def test_one_of_a_burst_does_not_hold_up_others_nor_take_them_along(
    loaded_target: Target, draft: DraftModel, burst: list[EngineRequest]
) -> None:
    fresh = {r.request_id: answer(make_engine(loaded_target), [r])[r.request_id] for r in burst}
    engine = make_engine(loaded_target, draft, slots=2, prefill_tokens=40)
    for request in burst:
        engine.submit(request)
    answers = gather(engine.step())
    assert [r.request.request_id for r in engine._slots.running] == ["r0", "r2"], "the stranger waits with the burst"
    engine.cancel("r0")
    finish(engine, answers)
    assert answers.pop("r0").reasons == ["cancelled"]
    del fresh["r0"]
    assert_equal(answers, fresh)


def test_a_short_beginning_is_not_worth_waiting_for(loaded_target: Target) -> None:
    engine = make_engine(loaded_target, slots=2)
    for request in greedy([(*range(11, 41), 1), (*range(11, 41), 2)]):
        engine.submit(request)
    engine.step()
    assert engine.load().num_running == 2


@pytest.mark.parametrize("new_draft", [False, True])
def test_text_made_after_a_swap_is_no_known_beginning(
    loaded_target: Target, draft: DraftModel, new_draft: bool
) -> None:
    """After a swap a request's record must not start in the middle of its text."""
    first = greedy(questions(loaded_target, 1), max_tokens=60)[0]
    text = answer(make_engine(loaded_target), [first])["r0"].token_ids
    engine = make_engine(loaded_target, draft, slots=2)
    engine.submit(first)
    answers: dict[str, Answer] = {}
    while len(answers.get("r0", Answer()).token_ids) < 5:
        gather(engine.step(), answers)
    seen = len(answers["r0"].token_ids)
    engine.swap_draft(draft if new_draft else None)
    while len(answers["r0"].token_ids) < 50:
        gather(engine.step(), answers)
    # The cache holds this text at later positions; it is not the beginning of anything.
    second = EngineRequest("second", tuple(text[seen - 1 : seen + 30]), SamplingParams(20, 0.0, ignore_eos=True))
    engine.submit(second)
    finish(engine, answers)
    assert answers["second"].token_ids == answer(make_engine(loaded_target), [second])["second"].token_ids
