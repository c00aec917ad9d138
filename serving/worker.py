"""The engine loop: one thread owns the engine, everyone else sends it messages.

A step blocks for tens of milliseconds, so it runs beside the event loop, and
because only this thread touches the engine, the engine needs no locks.
Sequences wait here, in order of arrival, until a decoding slot is free.
Tokens of one step travel to the event loop in one callback.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn, Protocol

from draftline.engine.requests import (
    NO_STEP,
    DraftedBlocks,
    EngineLoad,
    EngineRequest,
    SpeculationStats,
    TokenEvent,
)
from draftline.errors import DraftlineError, InputError
from serving.capacity import StepCosts
from serving.errors import EngineFailed, NotReady, Overloaded
from serving.metrics import ServingMetrics
from serving.turnover import Turnover

logger = logging.getLogger(__name__)

IDLE_LOAD = EngineLoad(num_running=0, num_waiting=0, kv_cache_usage=0.0, mean_budget=0.0)


class ServingEngine(Protocol):
    """What the loop needs of an engine; see ``draftline.engine.engine.Engine``."""

    def submit(self, request: EngineRequest) -> None:
        """Queue a sequence; InputError when it does not fit the context."""
        ...

    def cancel(self, request_id: str) -> None:
        """Free the slot at the next step; a ``cancelled`` event follows."""
        ...

    def step(self) -> list[TokenEvent]:
        """One batched forward of the target."""
        ...

    @property
    def has_work(self) -> bool:
        """Whether :meth:`step` has something to do."""
        ...

    def load(self) -> EngineLoad:
        """A snapshot."""
        ...

    calibration: Any
    """Maps the draft's confidences; exchanged together with it."""

    @property
    def costs(self) -> StepCosts | None:
        """What steps cost, with the draft in use."""
        ...

    def use_costs(self, costs: Any) -> list[str]:
        """Take a stored cost table if it was measured on such a machine; what differs, in words, if not."""
        ...

    def swap_draft(self, draft: Any) -> None:
        """Exchange the draft; requests in flight continue. Only the engine knows the draft's type."""
        ...


@dataclass
class Ticket:
    """A group of sequences of one HTTP request, and where their events go.

    The queue needs no bound of its own: a sequence produces at most
    ``max_tokens`` tokens, admission bounds the sequences, and so a slow
    reader holds no more than one context window and never stops the others.
    """

    requests: tuple[EngineRequest, ...]
    loop: asyncio.AbstractEventLoop
    arrived_s: float
    events: asyncio.Queue[TokenEvent | Exception] = field(default_factory=asyncio.Queue)


@dataclass
class _Sequence:
    """Bookkeeping of one sequence between admission and its last event."""

    request: EngineRequest
    ticket: Ticket
    is_running: bool = False
    is_cancelled: bool = False
    num_tokens: int = 0
    last_token_s: float | None = None


class EngineWorker:
    """Runs an engine in a thread of its own.

    Args:
        build: Makes the engine; called in the thread, so that thread-local
            settings (threads, inference mode) are the same as in its steps.
        max_running: Decoding slots.
        max_waiting: Sequences that may wait for a slot.
        model_name: Label of the metrics.
    """

    def __init__(
        self, build: Callable[[], ServingEngine], *, max_running: int, max_waiting: int, model_name: str
    ) -> None:
        self._build = build
        self._max_running = max_running
        self._capacity = max_running + max_waiting
        self._wake = threading.Condition()
        self._commands: deque[Callable[[ServingEngine], None]] = deque()
        self._num_admitted = 0
        self._turnover = Turnover()
        self._mean_limit = 0.0
        self._is_stopping = False
        self._failure: Exception | None = None
        self._sequences: dict[str, _Sequence] = {}
        self._waiting: deque[_Sequence] = deque()
        self._load = IDLE_LOAD
        self._ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._main, name="draftline-engine", daemon=True)
        self.metrics = ServingMetrics(model_name, self.load)
        self.max_running = max_running
        self._last_report = NO_STEP
        self.on_blocks: Callable[[DraftedBlocks], None] = lambda blocks: None
        """Called in the engine's thread with what each step drafted."""

    def start(self) -> Future[None]:
        """Start the thread; the future is done when the engine is built, or holds its error."""
        self._thread.start()
        return self._ready

    def stop(self, timeout_s: float = 30.0) -> None:
        """Finish the current step, fail what is in flight with :class:`NotReady`, end the thread."""
        with self._wake:
            self._is_stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    @property
    def is_healthy(self) -> bool:
        """Whether requests can be answered."""
        return self._failure is None and not self._is_stopping and self._ready.done()

    @property
    def failure(self) -> Exception | None:
        """What killed the engine, if anything did."""
        return self._failure

    def load(self) -> EngineLoad:
        """The load after the last step, with the sequences that wait here."""
        return self._load

    def submit(self, requests: Sequence[EngineRequest]) -> Ticket:
        """Admit a group of sequences, all or none; call from the event loop that will read the events.

        Raises:
            Overloaded: not enough free places.
            NotReady: the engine is stopped or dead.
        """
        if len(requests) > self._capacity:
            raise InputError(
                f"one request asks for {len(requests)} sequences, but the server holds {self._capacity}",
                remedy="Lower n, or send fewer prompts at once",
            )
        ticket = Ticket(tuple(requests), asyncio.get_running_loop(), time.monotonic())
        with self._wake:
            if not self.is_healthy:
                raise NotReady("The engine is not running; try again shortly")
            if self._num_admitted + len(requests) > self._capacity:
                self._refuse()
            self._num_admitted += len(requests)
            # Of the last few admissions: long enough a memory for what it is used for, before any answer has ended.
            self._mean_limit += (requests[0].sampling.max_tokens - self._mean_limit) / min(self._num_admitted, 10)
            self._enqueue(lambda engine: self._admit(ticket))
        for request in requests:
            self.metrics.record_admitted(len(request.prompt_ids))
        return ticket

    def check_room(self) -> None:
        """Refuse early what :meth:`submit` would refuse in any case: nothing is free.

        Raises:
            Overloaded: not one place is free.
        """
        with self._wake:
            if self._num_admitted >= self._capacity:
                self._refuse()

    def _refuse(self) -> NoReturn:
        # The caller holds the lock.
        self.metrics.record_refused()
        wait_s = self._turnover.retry_after_s(time.monotonic(), self._mean_limit)
        raise Overloaded(
            f"The server is full: {self._num_admitted} of {self._capacity} places are taken. "
            f"Try again in about {wait_s} s",
            retry_after_s=wait_s,
        )

    def cancel(self, ticket: Ticket, request_ids: Sequence[str] | None = None) -> None:
        """Give up a ticket's sequences (all, or the named ones); finished ones are left alone."""
        wanted = tuple(request_ids if request_ids is not None else (r.request_id for r in ticket.requests))
        with self._wake:
            self._enqueue(lambda engine: self._cancel(engine, wanted))

    def call(self, action: Callable[[ServingEngine], None]) -> Future[None]:
        """Run ``action`` with the engine between two steps, for example to swap its draft."""
        done: Future[None] = Future()

        def command(engine: ServingEngine) -> None:
            try:
                action(engine)
            except Exception as error:  # the caller's error, handed to the caller; the loop goes on
                done.set_exception(error)
            else:
                done.set_result(None)

        with self._wake:
            if not self.is_healthy:
                raise NotReady("The engine is not running")
            self._enqueue(command)
        return done

    def _enqueue(self, command: Callable[[ServingEngine], None]) -> None:
        self._commands.append(command)
        self._wake.notify()

    # The rest runs in the engine thread.

    def _main(self) -> None:
        try:
            engine = self._build()
        except Exception as error:  # thread boundary: the starter gets it
            self._failure = error
            self._ready.set_exception(error)
            return
        self._ready.set_result(None)
        reason: Exception = NotReady("The server is shutting down")
        try:
            while self._take_commands(engine):
                self._step(engine)
        except Exception as error:  # thread boundary: whatever broke, nobody may wait for ever
            logger.exception("the engine failed; all requests in flight are answered with an error")
            self._failure = error
            reason = EngineFailed(f"The engine failed while answering ({type(error).__name__}); send the request again")
        self._fail_everything(engine, reason)

    def _take_commands(self, engine: ServingEngine) -> bool:
        """Sleep until there is something to do; False means stop."""
        while True:
            with self._wake:
                while not (self._commands or engine.has_work or self._is_stopping):
                    self._wake.wait()
                commands, self._commands = self._commands, deque()
            if self._is_stopping:
                self._commands.extendleft(reversed(commands))
                return False
            for command in commands:
                command(engine)
            self._fill_slots(engine)
            self._refresh_load(engine)
            if engine.has_work:
                return True

    def _step(self, engine: ServingEngine) -> None:
        started_s = time.monotonic()
        events = engine.step()
        now_s = time.monotonic()
        self.metrics.record_step(events, now_s - started_s)
        with self._wake:
            self._turnover.record_step(sum(len(event.token_ids) for event in events), now_s - started_s)
        self._note_load(engine.load())
        by_ticket: dict[int, tuple[Ticket, list[TokenEvent | Exception]]] = {}
        for event in events:
            sequence = self._sequences.get(event.request_id)
            if sequence is None:
                continue
            sequence.num_tokens += len(event.token_ids)
            self._time(sequence, event, now_s)
            by_ticket.setdefault(id(sequence.ticket), (sequence.ticket, []))[1].append(event)
            if event.finish_reason is not None:
                self._release(event.request_id)
        self._fill_slots(engine)
        self._refresh_load(engine)
        _deliver(list(by_ticket.values()))

    def _note_load(self, load: EngineLoad) -> None:
        report = load.step
        self.metrics.record_prefixes(load.num_prompt_tokens, load.num_cached_tokens)
        if report is self._last_report:
            # A step that only dropped cancelled requests computed nothing.
            return
        self._last_report = report
        self.metrics.record_report(report)
        if report.blocks is not None:
            self.on_blocks(report.blocks)

    def _time(self, sequence: _Sequence, event: TokenEvent, now_s: float) -> None:
        if event.token_ids:
            if sequence.last_token_s is None:
                self.metrics.record_first_token(now_s - sequence.ticket.arrived_s)
            else:
                self.metrics.record_gap(now_s - sequence.last_token_s, len(event.token_ids))
            sequence.last_token_s = now_s
        if event.finish_reason is not None:
            self.metrics.record_finished(event.finish_reason, now_s - sequence.ticket.arrived_s)

    def _admit(self, ticket: Ticket) -> None:
        for request in ticket.requests:
            sequence = _Sequence(request, ticket)
            self._sequences[request.request_id] = sequence
            self._waiting.append(sequence)

    def _fill_slots(self, engine: ServingEngine) -> None:
        num_running = len(self._sequences) - len(self._waiting)
        while self._waiting and num_running < self._max_running:
            sequence = self._waiting.popleft()
            try:
                engine.submit(sequence.request)
            except DraftlineError as error:
                self._release(sequence.request.request_id)
                _deliver([(sequence.ticket, [error])])
                continue
            sequence.is_running = True
            num_running += 1
            self.metrics.record_queued(time.monotonic() - sequence.ticket.arrived_s)

    def _cancel(self, engine: ServingEngine, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            sequence = self._sequences.get(request_id)
            if sequence is None or sequence.is_cancelled:
                continue
            sequence.is_cancelled = True
            if sequence.is_running:
                engine.cancel(request_id)
                continue
            self._waiting.remove(sequence)
            self._release(request_id)
            event = TokenEvent(request_id, (), (), "cancelled", SpeculationStats())
            _deliver([(sequence.ticket, [event])])

    def _release(self, request_id: str) -> None:
        sequence = self._sequences.pop(request_id)
        with self._wake:
            self._num_admitted -= 1
            if sequence.is_running:
                self._turnover.record_finished(sequence.num_tokens)

    def _refresh_load(self, engine: ServingEngine) -> None:
        load = engine.load()
        self._load = replace(load, num_waiting=load.num_waiting + len(self._waiting))

    def _fail_everything(self, engine: ServingEngine, reason: Exception) -> None:
        with self._wake:
            self._is_stopping = True
            commands, self._commands = self._commands, deque()
        for command in commands:
            # Admissions among them register their tickets, so that they are failed below; so is a pending swap.
            try:
                command(engine)
            except Exception:  # a broken engine may refuse anything
                logger.exception("a command was lost while the engine stopped")
        failed = {id(s.ticket): s.ticket for s in self._sequences.values()}
        for request_id in list(self._sequences):
            self._release(request_id)
        self._waiting.clear()
        self._load = IDLE_LOAD
        _deliver([(ticket, [reason]) for ticket in failed.values()])


def _deliver(batch: list[tuple[Ticket, list[TokenEvent | Exception]]]) -> None:
    """Hand events to their event loops, one callback per loop; a closed loop has no reader left."""
    by_loop: dict[int, tuple[asyncio.AbstractEventLoop, list[tuple[Ticket, list[TokenEvent | Exception]]]]] = {}
    for ticket, events in batch:
        by_loop.setdefault(id(ticket.loop), (ticket.loop, []))[1].append((ticket, events))
    for loop, deliveries in by_loop.values():
        try:
            loop.call_soon_threadsafe(_put_all, deliveries)
        except RuntimeError:
            logger.debug("an event loop closed before its events arrived")


def _put_all(deliveries: list[tuple[Ticket, list[TokenEvent | Exception]]]) -> None:
    for ticket, events in deliveries:
        for event in events:
            ticket.events.put_nowait(event)
