"""Whose content a prompt takes over: the index finds what a look at all texts finds."""

from __future__ import annotations

import random

import numpy as np
import pytest

from draftline.engine import slots as module
from draftline.engine.requests import EngineRequest, SamplingParams
from draftline.engine.slots import MIN_SHARED_AHEAD, RunningRequest, SlotTable, WaitingRequest, common_prefix

NUM_SLOTS = 5


def plain_best(texts: list[list[int]], prompt: tuple[int, ...]) -> int:
    """Length of the longest known beginning, by comparing all."""
    best = min(max(common_prefix(text, prompt) for text in texts), len(prompt) - 1)
    return best if best >= 16 else 0


def plain_worth(table: SlotTable, prompt: tuple[int, ...], cached: int) -> bool:
    """Whether some prompt under way shares enough beyond what is cached or computed."""
    return (
        any(
            request.is_prefilling
            and common_prefix(request.request.prompt_ids, prompt)
            >= max(cached, request.num_processed) + MIN_SHARED_AHEAD
            for request in table.running
        )
        and len(prompt) > cached + MIN_SHARED_AHEAD
    )


def prompt_from(source: random.Random, known: list[tuple[int, ...]]) -> tuple[int, ...]:
    """Something new, or an earlier prompt cut anywhere and continued."""
    own = tuple(source.randrange(3) for _ in range(source.randrange(1, 200)))
    if not known or source.random() < 0.3:
        return own
    earlier = source.choice(known)
    return (*earlier[: source.randrange(1, len(earlier) + 1)], *own)[:400]


@pytest.mark.parametrize("seed", range(4))
def test_the_index_finds_what_comparing_everything_finds(seed: int) -> None:
    source = random.Random(seed)
    table, prompts = SlotTable(NUM_SLOTS), list[tuple[int, ...]]()
    found, worth = 0, 0
    for number in range(1500):
        action = source.random()
        if action < 0.35:
            prompts.append(prompt_from(source, prompts[-20:]))
            waiting = WaitingRequest.of(EngineRequest(str(number), prompts[-1], SamplingParams(50)))
            slot, length = table.best_prefix(waiting)
            texts = [table.content(slot) for slot in range(NUM_SLOTS)]
            assert length == plain_best(texts, prompts[-1])
            assert tuple(table.content(slot)[:length]) == prompts[-1][:length]
            is_worth = table.is_worth_waiting(waiting, length)
            assert is_worth == plain_worth(table, prompts[-1], length) and is_worth == table.is_held(waiting)
            found, worth = found + (length > 0), worth + is_worth
            if table.has_room:
                place = len(table.running)
                table.admit(
                    RunningRequest(waiting.request, place, length, np.random.default_rng(0), blocks=waiting.blocks)
                )
        elif action < 0.9 and table.running:
            request = source.choice(table.running)
            added = request.request.prompt_ids[request.num_processed :][: source.randrange(1, 120)] or (7,)
            table.extend(request.slot, request.num_processed, added)
            request.num_processed += len(added)
        elif table.running:
            table.release(source.choice(table.running))
        if source.random() < 0.005:
            table.forget()
    assert found > 40 and worth > 5
    known: dict[int, set[int]] = {block: set() for blocks in table._blocks for block in blocks}
    for slot, blocks in enumerate(table._blocks):
        assert blocks == module.chain(table.content(slot))
        for block in blocks:
            known[block].add(slot)
    assert table._slots_by_block == known


def test_a_request_that_waits_is_not_looked_at_again_until_its_leader_is_done() -> None:
    table = SlotTable(2)
    prompt = tuple(range(300))
    leader = WaitingRequest.of(EngineRequest("leader", prompt, SamplingParams(5)))
    follower = WaitingRequest.of(EngineRequest("follower", (*prompt, 1), SamplingParams(5)))
    running = RunningRequest(leader.request, 0, 0, np.random.default_rng(0), blocks=leader.blocks)
    table.admit(running)
    assert not table.is_held(follower) and table.is_worth_waiting(follower, 0) and table.is_held(follower)
    table.extend(0, 0, prompt[:200])
    running.num_processed = 200
    assert table.is_held(follower)
    table.extend(0, 200, prompt[200:240])
    running.num_processed = 240
    assert not table.is_held(follower), "what is left is too little to wait for"
    running.num_processed = 0
    assert table.is_held(follower)
    table.release(running)
    assert not table.is_held(follower), "the leader has left"


def test_equal_hashes_are_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "next_block", lambda token_ids, blocks: len(blocks))
    table = SlotTable(1)
    first = WaitingRequest.of(EngineRequest("a", (1,) * 130, SamplingParams(5)))
    table.admit(RunningRequest(first.request, 0, 130, np.random.default_rng(0), blocks=first.blocks))
    assert table.best_prefix(WaitingRequest.of(EngineRequest("b", (*(2,) * 128, 1, 1, 1), SamplingParams(5)))) == (0, 0)
