"""One HTTP request's sequences on their way from engine events to text pieces."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from draftline.engine.requests import SpeculationStats, TokenEvent, TopLogprobs
from serving.errors import EngineFailed
from serving.text import Decoder, Detokenizer, StopCutter
from serving.worker import EngineWorker, Ticket

UNKNOWN = float("nan")
"""Stands for a log-probability that nobody asked for."""

AnswerEnd = Literal["stop", "length"]


@dataclass
class Origin:
    """Where one token came from, and the text it made visible.

    Attributes:
        is_drafted: Drafted and accepted; otherwise the target's own.
        position: Place in what its step emitted, from 0.
        num_drafted: Draft tokens that the step verified.
        text: What became visible with it. The texts of a piece's tokens add up to the piece's text: a token that
            completes a character, or shows that a stop string does not come, carries what was held back before.
    """

    is_drafted: bool
    position: int
    num_drafted: int
    text: str = ""


@dataclass
class Piece:
    """What became certain of one choice.

    Attributes:
        index: Which choice.
        text: New text; may be empty.
        tokens: New (token id, log-probability) pairs; the latter is :data:`UNKNOWN` unless asked for.
        origins: Of the tokens, one each.
        alternatives: The likeliest tokens at the place of each, where they were asked for. A stop string may leave
            some at the end without their token.
        finish_reason: Set on the last piece of the choice.
    """

    index: int
    text: str = ""
    tokens: list[tuple[int, float]] = field(default_factory=list)
    origins: list[Origin] = field(default_factory=list)
    alternatives: list[TopLogprobs] = field(default_factory=list)
    finish_reason: AnswerEnd | None = None

    def show(self, text: str) -> None:
        """Add visible text, as the doing of the newest token."""
        self.text += text
        if self.origins:
            self.origins[-1].text += text


@dataclass
class _Choice:
    """One sequence: its text state and its counters."""

    index: int
    request_id: str
    min_tokens: int
    detokenizer: Detokenizer
    cutter: StopCutter
    num_tokens: int = 0
    finish_reason: AnswerEnd | None = None
    stats: SpeculationStats = field(default_factory=SpeculationStats)

    def take(self, event: TokenEvent, piece: Piece) -> None:
        """Add an event's tokens to ``piece``; what follows a stop string is dropped."""
        before, self.stats = self.stats, event.stats
        # A step emits its accepted drafts and then the target's own token, unless the answer ends before that.
        num_accepted = event.stats.num_accepted_tokens - before.num_accepted_tokens
        num_drafted = event.stats.num_draft_tokens - before.num_draft_tokens
        piece.alternatives += event.top_logprobs
        logprobs = event.logprobs or (UNKNOWN,) * len(event.token_ids)
        for position, (token_id, logprob) in enumerate(zip(event.token_ids, logprobs, strict=True)):
            self.num_tokens += 1
            piece.tokens.append((token_id, logprob))
            piece.origins.append(Origin(position < num_accepted, position, num_drafted))
            piece.show(self._visible(self.detokenizer.push(token_id)))
            if self.cutter.is_hit:
                self._finish(piece, "stop")
                return
        if event.finish_reason is None:
            return
        if event.finish_reason not in ("stop", "length"):
            raise EngineFailed(f"The engine ended the request early ({event.finish_reason}); send it again")
        piece.show(self._visible(self.detokenizer.flush()))
        is_stopped = self.cutter.is_hit or event.finish_reason == "stop"
        piece.show(self.cutter.flush())
        self._finish(piece, "stop" if is_stopped else "length")

    def _visible(self, text: str) -> str:
        # Stop strings do not count before min_tokens tokens, just like end tokens.
        return text if self.num_tokens <= self.min_tokens else self.cutter.push(text)

    def _finish(self, piece: Piece, reason: AnswerEnd) -> None:
        self.finish_reason = piece.finish_reason = reason


class Generation:
    """The running answer to one request.

    Iterate once; :meth:`close` must be called afterwards in any case, it
    frees the slots of whatever is unfinished.

    Args:
        worker: Runs the sequences.
        ticket: Their admission.
        decoder: Turns ids into text.
        stops: Stop strings.
    """

    def __init__(self, worker: EngineWorker, ticket: Ticket, decoder: Decoder, stops: Sequence[str]) -> None:
        self._worker = worker
        self._ticket = ticket
        self._choices = {
            request.request_id: _Choice(
                index, request.request_id, request.sampling.min_tokens, Detokenizer(decoder), StopCutter(stops)
            )
            for index, request in enumerate(ticket.requests)
        }

    async def pieces(self) -> AsyncIterator[Piece]:
        """Pieces as they come; a slow consumer gets larger ones, at most one per choice at a time.

        Raises:
            EngineFailed: the engine died.
            NotReady: the server shuts down.
            DraftlineError: the engine refused the request.
        """
        while any(choice.finish_reason is None for choice in self._choices.values()):
            pieces: dict[int, Piece] = {}
            for event in await self._next_events():
                choice = self._choices[event.request_id]
                if choice.finish_reason is None:
                    choice.take(event, pieces.setdefault(choice.index, Piece(choice.index)))
                    if choice.finish_reason is not None and event.finish_reason is None:
                        self._worker.cancel(self._ticket, [choice.request_id])
            for piece in pieces.values():
                if piece.text or piece.tokens or piece.finish_reason:
                    yield piece

    async def _next_events(self) -> list[TokenEvent]:
        arrived = [await self._ticket.events.get()]
        while not self._ticket.events.empty():
            arrived.append(self._ticket.events.get_nowait())
        events: list[TokenEvent] = []
        for item in arrived:
            if isinstance(item, Exception):
                raise item
            events.append(item)
        return events

    def close(self) -> None:
        """Cancel what is unfinished; harmless when nothing is."""
        unfinished = [c.request_id for c in self._choices.values() if c.finish_reason is None]
        if unfinished:
            self._worker.cancel(self._ticket, unfinished)

    @property
    def num_choices(self) -> int:
        """Sequences of the request."""
        return len(self._choices)

    @property
    def num_completion_tokens(self) -> int:
        """Tokens of all choices so far, up to their stop strings."""
        return sum(choice.num_tokens for choice in self._choices.values())

    @property
    def speculation(self) -> SpeculationStats:
        """Counters of all choices together."""
        total = SpeculationStats()
        for choice in self._choices.values():
            total.add(choice.stats)
        return total
