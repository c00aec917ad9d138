"""OpenAI documents out of pieces: whole answers, chunks, and the final usage chunk."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Protocol

from draftline.engine.requests import TopLogprobs
from serving.generation import Piece
from serving.schema import (
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprobs,
    ChatResponse,
    CompletionChoice,
    CompletionLogprobs,
    CompletionResponse,
    Envelope,
    RequestMetrics,
    StreamOrigins,
    TokenLogprob,
    TokenOrigin,
    TopLogprob,
    Usage,
)
from serving.service import Job, TextModel
from serving.text import REPLACEMENT


class Renderer(Protocol):
    """Makes the documents of one response."""

    def opening(self, num_choices: int) -> list[Envelope]:
        """Chunks sent before any text."""
        ...

    def chunk(self, piece: Piece) -> Envelope:
        """One piece as a chunk."""
        ...

    def closing(self, usage: Usage, metrics: RequestMetrics) -> Envelope:
        """The usage chunk, without choices."""
        ...

    def whole(self, pieces: Sequence[Piece], usage: Usage, metrics: RequestMetrics) -> Envelope:
        """The answer of a request that does not stream; one merged piece per choice."""
        ...


class ChatRenderer:
    """Documents of ``/v1/chat/completions``."""

    def __init__(self, job: Job, text: TextModel, *, with_logprobs: bool) -> None:
        self._job = job
        self._text = text
        self._with_logprobs = with_logprobs

    def opening(self, num_choices: int) -> list[Envelope]:
        """See :class:`Renderer`."""
        return [self._chunk(index, ChatDelta(role="assistant", content=""), None) for index in range(num_choices)]

    def chunk(self, piece: Piece) -> Envelope:
        """See :class:`Renderer`."""
        return self._chunk(piece.index, ChatDelta(content=piece.text or None), piece)

    def closing(self, usage: Usage, metrics: RequestMetrics) -> Envelope:
        """See :class:`Renderer`."""
        job = self._job
        return ChatChunk(id=job.id, created=job.created, model=job.model, choices=[], usage=usage, metrics=metrics)

    def whole(self, pieces: Sequence[Piece], usage: Usage, metrics: RequestMetrics) -> Envelope:
        """See :class:`Renderer`."""
        job = self._job
        choices = [
            ChatChoice(
                index=piece.index,
                message=ChatAnswer(content=piece.text),
                logprobs=self._logprobs(piece),
                finish_reason=piece.finish_reason or "stop",
            )
            for piece in pieces
        ]
        return ChatResponse(
            id=job.id, created=job.created, model=job.model, choices=choices, usage=usage, metrics=metrics
        )

    def _chunk(self, index: int, delta: ChatDelta, piece: Piece | None) -> ChatChunk:
        choice = ChatChunkChoice(
            index=index,
            delta=delta,
            logprobs=self._logprobs(piece) if piece else None,
            finish_reason=piece.finish_reason if piece else None,
        )
        return ChatChunk(id=self._job.id, created=self._job.created, model=self._job.model, choices=[choice])

    def _logprobs(self, piece: Piece) -> ChatLogprobs | None:
        if not self._with_logprobs:
            return None
        content = []
        for (token_id, logprob), others in zip_longest(piece.tokens, piece.alternatives[: len(piece.tokens)]):
            content.append(
                TokenLogprob(
                    **self._alternative(token_id, logprob).model_dump(),
                    top_logprobs=[self._alternative(*other) for other in others or ()],
                )
            )
        return ChatLogprobs(content=content)

    def _alternative(self, token_id: int, logprob: float) -> TopLogprob:
        token = self._text.token_text(token_id)
        return TopLogprob(token=token, logprob=logprob, bytes=None if REPLACEMENT in token else list(token.encode()))


class CompletionRenderer:
    """Documents of ``/v1/completions``."""

    def __init__(self, job: Job, text: TextModel, *, with_logprobs: bool) -> None:
        self._job = job
        self._text = text
        self._with_logprobs = with_logprobs
        self._offsets: dict[int, int] = {}

    def opening(self, num_choices: int) -> list[Envelope]:
        """See :class:`Renderer`; completions open with their text."""
        return []

    def chunk(self, piece: Piece) -> Envelope:
        """See :class:`Renderer`."""
        return self._response([self._choice(piece)], None, None)

    def closing(self, usage: Usage, metrics: RequestMetrics) -> Envelope:
        """See :class:`Renderer`."""
        return self._response([], usage, metrics)

    def whole(self, pieces: Sequence[Piece], usage: Usage, metrics: RequestMetrics) -> Envelope:
        """See :class:`Renderer`."""
        return self._response([self._choice(piece) for piece in pieces], usage, metrics)

    def _response(
        self, choices: list[CompletionChoice], usage: Usage | None, metrics: RequestMetrics | None
    ) -> CompletionResponse:
        job = self._job
        return CompletionResponse(
            id=job.id, created=job.created, model=job.model, choices=choices, usage=usage, metrics=metrics
        )

    def _choice(self, piece: Piece) -> CompletionChoice:
        return CompletionChoice(
            index=piece.index, text=piece.text, logprobs=self._logprobs(piece), finish_reason=piece.finish_reason
        )

    def _logprobs(self, piece: Piece) -> CompletionLogprobs | None:
        if not self._with_logprobs:
            return None
        tokens = [self._text.token_text(token_id) for token_id, _ in piece.tokens]
        offset, offsets = self._offsets.get(piece.index, 0), []
        for token in tokens:
            offsets.append(offset)
            offset += len(token)
        self._offsets[piece.index] = offset
        others = [self._by_text(alternatives) for alternatives in piece.alternatives[: len(tokens)]]
        return CompletionLogprobs(
            tokens=tokens,
            token_logprobs=[logprob for _, logprob in piece.tokens],
            top_logprobs=others or None,
            text_offset=offsets,
        )

    def _by_text(self, alternatives: TopLogprobs) -> dict[str, float]:
        # Of several tokens with one text (parts of characters), the likeliest stands.
        return {self._text.token_text(token_id): logprob for token_id, logprob in reversed(alternatives)}


def origins(piece: Piece) -> StreamOrigins | None:
    """Where a piece's tokens came from; ``None`` for a piece without any."""
    if not piece.tokens:
        return None
    tokens = [
        TokenOrigin(
            text=origin.text,
            origin="draft" if origin.is_drafted else "target",
            position=origin.position,
            num_drafted=origin.num_drafted,
            logprob=token[1],
        )
        for token, origin in zip(piece.tokens, piece.origins, strict=True)
    ]
    return StreamOrigins(tokens=tokens)


def merge(pieces: Sequence[Piece], num_choices: int) -> list[Piece]:
    """One piece per choice, in order of index."""
    merged = [Piece(index) for index in range(num_choices)]
    for piece in pieces:
        target = merged[piece.index]
        target.text += piece.text
        target.tokens += piece.tokens
        target.alternatives += piece.alternatives
        target.finish_reason = piece.finish_reason or target.finish_reason
    return merged
