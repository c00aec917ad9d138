"""The engine loop: one thread, admission by count, everyone told when it ends."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from draftline.engine.requests import EngineRequest, SamplingParams, TokenEvent
from draftline.errors import InputError, TargetError
from serving.errors import EngineFailed, NotReady, Overloaded
from serving.worker import EngineWorker, ServingEngine, Ticket
from tests.serving.scripted_engine import ScriptedEngine
from tests.serving.servers import wait_until


def request(name: str, max_tokens: int = 6, prompt: int = 3) -> EngineRequest:
    return EngineRequest(name, tuple(range(prompt)), SamplingParams(max_tokens=max_tokens, temperature=0))


def start(engine: ScriptedEngine, max_waiting: int = 4) -> EngineWorker:
    worker = EngineWorker(lambda: engine, max_running=engine.max_running, max_waiting=max_waiting, model_name="m")
    worker.start().result(5)
    return worker


async def collect(ticket: Ticket) -> list[TokenEvent]:
    """All events until each sequence of the ticket has ended."""
    events: list[TokenEvent] = []
    while sum(event.finish_reason is not None for event in events) < len(ticket.requests):
        item = await asyncio.wait_for(ticket.events.get(), 10)
        if isinstance(item, Exception):
            raise item
        events.append(item)
    return events


def test_many_requests_all_arrive_whole_from_one_thread() -> None:
    engine = ScriptedEngine(max_running=3)
    worker = start(engine, max_waiting=100)

    async def scenario() -> None:
        tickets = [worker.submit([request(f"r{i}", max_tokens=1 + i % 20)]) for i in range(60)]
        for i, events in enumerate(await asyncio.gather(*map(collect, tickets))):
            assert sum(len(e.token_ids) for e in events) == 1 + i % 20
            assert [e.finish_reason for e in events][-1] == "length"

    asyncio.run(scenario())
    worker.stop()
    assert len(engine.threads) == 1 and threading.get_ident() not in engine.threads
    assert [r.request_id for r in engine.seen] == [f"r{i}" for i in range(60)], "first come, first served"
    assert worker._num_admitted == 0 and worker._sequences == {}


def test_an_idle_loop_sleeps() -> None:
    engine = ScriptedEngine()
    worker = start(engine)
    wait_until(lambda: engine.num_polls > 0)
    time.sleep(0.05)
    before = engine.num_polls
    time.sleep(0.3)
    assert engine.num_polls == before
    worker.stop()


def test_a_group_is_admitted_whole_or_not_at_all() -> None:
    engine = ScriptedEngine(max_running=1)
    engine.gate.clear()
    worker = start(engine, max_waiting=2)

    async def scenario() -> None:
        first = worker.submit([request("a"), request("b")])
        with pytest.raises(Overloaded):
            worker.submit([request("c"), request("d")])
        second = worker.submit([request("e")])
        engine.gate.set()
        await asyncio.gather(collect(first), collect(second))
        with pytest.raises(InputError):
            worker.submit([request(str(i)) for i in range(4)])

    asyncio.run(scenario())
    worker.stop()
    assert [r.request_id for r in engine.seen] == ["a", "b", "e"]


def test_a_request_the_engine_refuses_ends_alone() -> None:
    worker = start(ScriptedEngine(max_context=50))

    async def scenario() -> None:
        bad, good = worker.submit([request("bad", prompt=100)]), worker.submit([request("good")])
        assert (await collect(good))[-1].finish_reason == "length"
        with pytest.raises(InputError):
            await collect(bad)

    asyncio.run(scenario())
    assert worker.is_healthy and worker._num_admitted == 0
    worker.stop()


def test_cancelling_twice_or_late_is_harmless() -> None:
    engine = ScriptedEngine(max_running=1, step_s=0.002, max_context=100_000)
    worker = start(engine)

    async def scenario() -> None:
        running, waiting = worker.submit([request("running", 50_000)]), worker.submit([request("waiting")])
        await running.events.get()
        for _ in range(2):
            worker.cancel(waiting)
            worker.cancel(running)
        assert (await collect(running))[-1].finish_reason == "cancelled"
        assert (await collect(waiting))[-1].finish_reason == "cancelled"
        worker.cancel(running)
        assert (await collect(worker.submit([request("next")])))[-1].finish_reason == "length"

    asyncio.run(scenario())
    worker.stop()
    assert engine.cancelled_ids == ["running"] and [r.request_id for r in engine.seen] == ["running", "next"]


def test_a_crash_reaches_every_request_in_flight_and_all_later_ones() -> None:
    engine = ScriptedEngine(max_running=2, step_s=0.01, max_context=100_000)
    worker = start(engine)

    async def scenario() -> None:
        tickets = [worker.submit([request(f"r{i}", 5_000)]) for i in range(4)]
        await tickets[0].events.get()
        engine.crash = RuntimeError("out of memory")
        results = await asyncio.gather(*map(collect, tickets), return_exceptions=True)
        assert [type(result) for result in results] == [EngineFailed] * 4
        with pytest.raises(NotReady):
            worker.submit([request("late")])

    asyncio.run(scenario())
    assert not worker.is_healthy and isinstance(worker.failure, RuntimeError)
    with pytest.raises(NotReady):
        worker.call(lambda engine: None)
    worker.stop()


def test_stopping_fails_what_is_in_flight_and_ends_the_thread() -> None:
    engine = ScriptedEngine(max_running=1, step_s=0.01, max_context=100_000)
    worker = start(engine)

    async def scenario() -> None:
        tickets = [worker.submit([request(f"r{i}", 5_000)]) for i in range(2)]
        await tickets[0].events.get()
        await asyncio.to_thread(worker.stop)
        for result in await asyncio.gather(*map(collect, tickets), return_exceptions=True):
            assert isinstance(result, NotReady)

    asyncio.run(scenario())
    assert not worker._thread.is_alive()


def test_an_engine_that_cannot_be_built_reports_why() -> None:
    def build() -> ServingEngine:
        raise TargetError("no such target")

    worker = EngineWorker(build, max_running=1, max_waiting=1, model_name="m")
    with pytest.raises(TargetError):
        worker.start().result(5)
    assert not worker.is_healthy


def test_a_call_runs_between_steps_and_its_error_is_the_callers() -> None:
    engine = ScriptedEngine(step_s=0.002, max_context=100_000)
    worker = start(engine)

    async def scenario() -> None:
        ticket = worker.submit([request("r", 600)])
        await asyncio.wrap_future(worker.call(lambda e: e.swap_draft("new")))

        def fail(_: ServingEngine) -> None:
            raise TargetError("does not fit")

        with pytest.raises(TargetError):
            await asyncio.wrap_future(worker.call(fail))
        assert sum(len(e.token_ids) for e in await collect(ticket)) == 600

    asyncio.run(scenario())
    assert engine.drafts == ["new"] and worker.is_healthy
    worker.stop()


def test_a_closed_event_loop_does_not_stop_the_engine() -> None:
    engine = ScriptedEngine(step_s=0.002, max_context=100_000)
    worker = start(engine)

    async def leave() -> None:
        worker.submit([request("orphan", 300)])

    asyncio.run(leave())
    wait_until(lambda: engine.num_steps > 0 and worker.load().num_running == 0)
    assert worker.is_healthy
    worker.stop()
