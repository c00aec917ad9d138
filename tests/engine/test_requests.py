"""What a request may ask for, and how it ends."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from draftline.draft.checkpoint import DraftModel
from draftline.engine.requests import EngineRequest, SamplingParams, SpeculationStats
from draftline.errors import InputError, TargetError
from draftline.scheduling.policies import FixedPolicy
from draftline.target.batch import Chunk, build_batch
from draftline.target.load import Target
from tests.engine.runs import answer, finish, gather, greedy, make_engine, questions
from tests.servers.tiny_target import bigram_draft, random_draft, tiny_draft_config


@pytest.fixture(scope="module")
def draft(loaded_target: Target) -> DraftModel:
    return bigram_draft(loaded_target)


@pytest.fixture(scope="module")
def prompt(loaded_target: Target) -> tuple[int, ...]:
    return questions(loaded_target, 2)[1]


@pytest.fixture(scope="module")
def text(loaded_target: Target, prompt: tuple[int, ...]) -> list[int]:
    """What the target says, greedily, past its end tokens."""
    return answer(make_engine(loaded_target), greedy([prompt]))["r0"].token_ids


def test_a_stop_token_ends_at_its_first_occurrence_even_inside_a_block(
    loaded_target: Target, draft: DraftModel, prompt: tuple[int, ...], text: list[int]
) -> None:
    inside = 0
    for token in dict.fromkeys(text):
        request = greedy([prompt], stop_token_ids=(token,))
        one = answer(make_engine(loaded_target, draft), request)["r0"]
        end = text.index(token) + 1
        assert (one.token_ids, one.reasons) == (text[:end], ["stop"])
        stats = one.stats
        assert stats.num_output_tokens + 1 == end
        inside += stats.num_accepted_tokens + stats.num_steps > stats.num_output_tokens
    assert inside > 0, "no stop token fell inside an accepted block"


def test_the_targets_own_end_token_stops_unless_ignored(
    loaded_target: Target, draft: DraftModel, prompt: tuple[int, ...], text: list[int]
) -> None:
    (end,) = loaded_target.eos_token_ids
    assert end in text
    one = answer(make_engine(loaded_target, draft), greedy([prompt], ignore_eos=False))["r0"]
    assert (one.token_ids, one.reasons) == (text[: text.index(end) + 1], ["stop"])


def test_min_tokens_lets_early_end_tokens_pass(
    loaded_target: Target, draft: DraftModel, prompt: tuple[int, ...], text: list[int]
) -> None:
    stop = max(set(text), key=text.count)
    assert text.count(stop) > 1
    for minimum in range(len(text)):
        request = greedy([prompt], stop_token_ids=(stop,), min_tokens=minimum)
        one = answer(make_engine(loaded_target, draft), request)["r0"]
        ends = [place for place, token in enumerate(text) if token == stop and place + 1 > minimum]
        assert one.token_ids == (text[: ends[0] + 1] if ends else text)
        assert one.reasons == (["stop"] if ends else ["length"])


@pytest.mark.parametrize("max_tokens", range(1, 13))
def test_max_tokens_is_exact(
    loaded_target: Target, draft: DraftModel, prompt: tuple[int, ...], text: list[int], max_tokens: int
) -> None:
    one = answer(make_engine(loaded_target, draft), greedy([prompt], max_tokens))["r0"]
    assert (one.token_ids, one.reasons) == (text[:max_tokens], ["length"])


def test_a_request_may_fill_the_context_to_the_last_token(
    loaded_target: Target, draft: DraftModel, prompt: tuple[int, ...]
) -> None:
    size = len(prompt) + 40
    request = greedy([prompt], 40)[0]
    one = answer(make_engine(loaded_target, draft, context=size), [request])["r0"]
    assert len(one.token_ids) == 40
    with pytest.raises(InputError, match="does not fit the context"):
        make_engine(loaded_target, draft, context=size - 1).submit(request)


@pytest.mark.parametrize(
    ("prompt_ids", "sampling", "message"),
    [
        ((), SamplingParams(5), "prompt is empty"),
        ((1, 99999), SamplingParams(5), "99999"),
        ((-1,), SamplingParams(5), "-1"),
        ((1,), SamplingParams(0), "max_tokens"),
        ((1,), SamplingParams(5, temperature=-0.1), "temperature"),
        ((1,), SamplingParams(5, temperature=float("nan")), "temperature"),
        ((1,), SamplingParams(5, top_p=0.0), "top_p"),
        ((1,), SamplingParams(5, top_p=1.5), "top_p"),
        ((1,), SamplingParams(5, top_k=-1), "top_k"),
        ((1,), SamplingParams(5, seed=-1), "seed"),
        ((1,), SamplingParams(5, num_top_logprobs=21), "num_top_logprobs"),
    ],
)
def test_impossible_requests_are_refused_and_leave_the_engine_well(
    loaded_target: Target, prompt_ids: tuple[int, ...], sampling: SamplingParams, message: str
) -> None:
    engine = make_engine(loaded_target)
    with pytest.raises(InputError, match=message):
        engine.submit(EngineRequest("bad", prompt_ids, sampling))
    assert not engine.has_work


def sampled(prompt: tuple[int, ...], name: str, seed: int | None) -> EngineRequest:
    return EngineRequest(name, prompt, SamplingParams(25, 1.0, top_p=0.95, top_k=40, seed=seed, ignore_eos=True))


def test_a_seed_repeats_alone_and_in_company(loaded_target: Target, draft: DraftModel, prompt: tuple[int, ...]) -> None:
    alone = answer(make_engine(loaded_target, draft), [sampled(prompt, "a", 7)])["a"]
    company = [sampled(prompt, "b", 8), sampled(prompt, "a", 7), *greedy([prompt])]
    together = answer(make_engine(loaded_target, draft, slots=3), company)
    assert together["a"].token_ids == alone.token_ids
    assert together["b"].token_ids != alone.token_ids
    unseeded = answer(make_engine(loaded_target, draft, slots=2), [sampled(prompt, n, None) for n in "cd"])
    assert unseeded["c"].token_ids != unseeded["d"].token_ids


def test_greedy_is_undisturbed_by_sampled_company(
    loaded_target: Target, draft: DraftModel, prompt: tuple[int, ...], text: list[int]
) -> None:
    company = [sampled(prompt, "a", 1), *greedy([prompt]), sampled(prompt, "b", 2)]
    assert answer(make_engine(loaded_target, draft, slots=3), company)["r0"].token_ids == text


def test_stats_account_for_every_token(loaded_target: Target, draft: DraftModel, prompt: tuple[int, ...]) -> None:
    one = answer(make_engine(loaded_target, draft), greedy([prompt]))["r0"]
    stats = one.stats
    assert stats.num_output_tokens == len(one.token_ids) - 1
    assert sum(stats.accepted_histogram) == stats.num_spec_steps <= stats.num_steps
    assert sum(n * count for n, count in enumerate(stats.accepted_histogram)) == stats.num_accepted_tokens
    # The last step may have accepted more than the answer had room for.
    surplus = stats.num_accepted_tokens + stats.num_steps - stats.num_output_tokens
    assert 0 <= surplus <= draft.config.block_size
    assert stats.mean_accepted_length == 1 + stats.num_accepted_tokens / stats.num_spec_steps
    doubled = SpeculationStats()
    doubled.add(stats)
    doubled.add(stats)
    assert doubled.num_output_tokens == 2 * stats.num_output_tokens
    assert doubled.accepted_histogram == [2 * n for n in stats.accepted_histogram]
    assert doubled.mean_accepted_length == stats.mean_accepted_length


def test_events_carry_copies_of_the_counters(loaded_target: Target, draft: DraftModel, prompt: tuple[int, ...]) -> None:
    engine = make_engine(loaded_target, draft)
    engine.submit(greedy([prompt])[0])
    events = []
    while engine.has_work:
        events += engine.step()
    steps = [event.stats.num_steps for event in events]
    assert steps == list(range(len(events)))
    histograms = [sum(event.stats.accepted_histogram) for event in events]
    assert histograms == sorted(histograms) and histograms[0] == 0 < histograms[-1]


def test_cancelling_waiting_and_unknown_requests(loaded_target: Target, prompt: tuple[int, ...]) -> None:
    engine = make_engine(loaded_target)
    requests = greedy([prompt, prompt, prompt], 5)
    engine.cancel("never heard of")
    for request in requests:
        engine.submit(request)
    engine.step()
    engine.cancel("r1")
    answers = finish(engine, gather(engine.step()))
    assert answers["r1"].reasons == ["cancelled"] and answers["r1"].token_ids == []
    assert answers["r2"].reasons == ["length"]


def test_a_cancelled_id_may_be_used_again(loaded_target: Target, prompt: tuple[int, ...]) -> None:
    engine = make_engine(loaded_target)
    engine.cancel("r0")
    assert answer(engine, greedy([prompt], 3))["r0"].reasons == ["length"]


def test_load_counts_slots_and_positions(loaded_target: Target, draft: DraftModel, prompt: tuple[int, ...]) -> None:
    engine = make_engine(loaded_target, draft, slots=2, context=100)
    assert (engine.load().num_running, engine.load().num_waiting, engine.load().kv_cache_usage) == (0, 0, 0.0)
    for request in greedy([prompt] * 3, 10):
        engine.submit(request)
    assert engine.load().num_waiting == 3
    engine.step()
    load = engine.load()
    assert (load.num_running, load.num_waiting) == (2, 1)
    assert load.kv_cache_usage == pytest.approx(2 * len(prompt) / 200)
    engine.step()
    assert engine.load().mean_budget > 0
    finish(engine)
    assert engine.load().num_running == 0


def test_a_misfit_is_refused_and_the_old_draft_stays(
    loaded_target: Target, draft: DraftModel, prompt: tuple[int, ...]
) -> None:
    config = tiny_draft_config(loaded_target.config)
    misfits = {
        "vocabulary": replace(config, vocab_size=config.vocab_size + 1, draft_vocab_size=config.vocab_size + 1),
        "target layers": replace(config, num_target_layers=9),
        "hidden size": replace(config, hidden_size=32),
        "mask_token_id": replace(config, mask_token_id=config.vocab_size),
        "target_layer_ids": replace(config, target_layer_ids=(config.num_target_layers - 1,)),
        "block_size": replace(config, block_size=65),
    }
    engine = make_engine(loaded_target, draft, FixedPolicy())
    for what, misfit in misfits.items():
        with pytest.raises(TargetError, match=what):
            engine.swap_draft(random_draft(misfit, 0))
    assert answer(engine, greedy([prompt]))["r0"].stats.num_draft_tokens > 0


def test_slots_stay_dense_whichever_order_requests_end(loaded_target: Target, draft: DraftModel) -> None:
    """Every order of ending among four; ``finish`` checks the slots after each step."""
    prompts = questions(loaded_target, 4)
    full = answer(make_engine(loaded_target), greedy(prompts, 14))
    for order in itertools.islice(itertools.permutations((2, 6, 10, 14)), 0, 24, 5):
        requests = [
            EngineRequest(f"r{i}", prompt, SamplingParams(n, 0.0, ignore_eos=True))
            for i, (prompt, n) in enumerate(zip(prompts, order, strict=True))
        ]
        found = answer(make_engine(loaded_target, draft, slots=4), requests)
        for i, n in enumerate(order):
            assert found[f"r{i}"].token_ids == full[f"r{i}"].token_ids[:n]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_alternatives_are_the_targets_likeliest_tokens(
    loaded_target: Target, draft: DraftModel, prompt: tuple[int, ...], temperature: float
) -> None:
    """Asked for by some of a batch, at accepted drafts and at the target's own tokens alike."""
    params = SamplingParams(20, temperature, ignore_eos=True, has_logprobs=True)
    requests = [EngineRequest(f"r{n}", prompt, replace(params, seed=n, num_top_logprobs=n)) for n in (0, 3, 5)]
    engine = make_engine(loaded_target, draft, slots=3)
    for request in requests:
        engine.submit(request)
    events = []
    while engine.has_work:
        events += engine.step()
    for request in requests:
        own = [event for event in events if event.request_id == request.request_id]
        ids = [token for event in own for token in event.token_ids]
        found = [top for event in own for top in event.top_logprobs]
        count = request.sampling.num_top_logprobs
        assert len(found) == (20 if count else 0)
        cache = loaded_target.model.new_cache(1, 200)
        batch = build_batch([Chunk(0, 0, [*prompt, *ids])], 200, torch.float32)
        logits = loaded_target.model.logits(loaded_target.model.forward(batch, cache).hidden_ND)
        expected = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        for place, top in enumerate(found):
            values, tokens = expected[place].topk(count)
            assert [token for token, _ in top] == tokens.tolist()
            assert [value for _, value in top] == pytest.approx(values.tolist(), abs=2e-4)
        chosen = [logprob for event in own for logprob in event.logprobs]
        assert chosen == pytest.approx([float(expected[place, token]) for place, token in enumerate(ids)], abs=2e-4)


def test_a_cancelled_prompt_frees_its_slot_at_the_next_step(loaded_target: Target, prompt: tuple[int, ...]) -> None:
    engine = make_engine(loaded_target, prefill_tokens=4)
    first, second = greedy([prompt, prompt[::-1]], 5)
    engine.submit(first)
    engine.submit(second)
    engine.step()
    assert engine.load().num_waiting == 1, "the first prompt takes several steps"
    engine.cancel("r0")
    answers = gather(engine.step())
    assert answers["r0"].reasons == ["cancelled"]
    assert [r.request.request_id for r in engine._slots.running] == ["r1"]
    finish(engine, answers)
    alone = answer(make_engine(loaded_target), [second])["r1"]
    assert answers["r1"].token_ids == alone.token_ids


def test_logprobs_that_nobody_asked_for_are_not_computed(
    loaded_target: Target, draft: DraftModel, prompt: tuple[int, ...], text: list[int]
) -> None:
    without = greedy([prompt], has_logprobs=False, num_top_logprobs=3)[0]
    others = [replace(request, request_id="with") for request in greedy([prompt])]
    for company in ([], others):
        engine = make_engine(loaded_target, draft, slots=2)
        events = []
        for request in [without, *company]:
            engine.submit(request)
        while engine.has_work:
            events += engine.step()
        own = [event for event in events if event.request_id == "r0"]
        assert [token for event in own for token in event.token_ids] == text
        assert not any(event.logprobs or event.top_logprobs for event in own)
        assert all(len(event.logprobs) == len(event.token_ids) for event in events if event.request_id == "with")
