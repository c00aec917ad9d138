"""Closed-loop users of an OpenAI endpoint: each sends its next prompt as soon as an answer has ended."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx


@dataclass(frozen=True)
class Answer:
    """What a user saw of one request.

    Attributes:
        started_s: When it was sent.
        first_s: When the first text arrived.
        ended_s: When the stream ended.
        num_tokens: Of the answer.
    """

    started_s: float
    first_s: float
    ended_s: float
    num_tokens: int

    @property
    def ttft_s(self) -> float:
        """Time to the first token."""
        return self.first_s - self.started_s

    @property
    def tokens_per_s(self) -> float:
        """Speed after the first token, which is what a reader sees."""
        return (self.num_tokens - 1) / max(self.ended_s - self.first_s, 1e-9)


@dataclass(frozen=True)
class Window:
    """One measured stretch of time under constant load.

    Attributes:
        seconds: Its length.
        totals: What the engine added up in it, see ``benchmarks.load_server.Totals``; of another server's, ``emitted``.
        answers: Requests that ended in it.
    """

    seconds: float
    totals: dict[str, float]
    answers: list[Answer] = field(default_factory=list)


async def under_load(
    base_url: str,
    model: str,
    prompts: Sequence[list[dict[str, str]]],
    *,
    users: int,
    seconds: float,
    max_tokens: int,
    has_totals: bool = True,
) -> Window:
    """Keep ``users`` requests in flight and measure once every user has had its first token.

    Args:
        base_url: Root of the server.
        model: Its model's name.
        prompts: Conversations, used in turn.
        users: Concurrent requests.
        seconds: Length of the window.
        max_tokens: Of each answer.
        has_totals: Whether the server is ours. Of another one, pieces of text that arrived are counted as emitted
            tokens: right where each token is sent in a piece of its own, as llama.cpp's server does.
    """
    turn = itertools.count()
    answers: list[Answer] = []
    warm = [asyncio.Event() for _ in range(users)]
    pieces_s: list[float] = []
    async with httpx.AsyncClient(base_url=base_url, timeout=600.0, limits=_limits(users)) as client:

        async def user(index: int) -> None:
            while True:
                messages = prompts[next(turn) % len(prompts)]
                answers.append(await _ask(client, model, messages, max_tokens, warm[index], pieces_s))

        async def totals() -> dict[str, float]:
            if not has_totals:
                return {"emitted": float(len(pieces_s))}
            found: dict[str, float] = (await client.get("/benchmark/totals")).json()
            return found

        tasks = [asyncio.create_task(user(index)) for index in range(users)]
        try:
            await _unless_one_fails(tasks, asyncio.gather(*(event.wait() for event in warm)))
            before = await totals()
            started_s = time.monotonic()
            await _unless_one_fails(tasks, asyncio.ensure_future(asyncio.sleep(seconds)))
            after = await totals()
            ended_s = time.monotonic()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    seen = [answer for answer in answers if answer.ended_s >= started_s]
    return Window(ended_s - started_s, {name: after[name] - before[name] for name in before}, seen)


async def one_after_another(
    base_url: str, model: str, prompts: Sequence[list[dict[str, str]]], *, max_tokens: int
) -> list[Answer]:
    """One user and nobody else; arguments as :func:`under_load`."""
    async with httpx.AsyncClient(base_url=base_url, timeout=600.0, limits=_limits(1)) as client:
        return [await _ask(client, model, messages, max_tokens, asyncio.Event(), []) for messages in prompts]


def _limits(users: int) -> httpx.Limits:
    """A connection a request: llama.cpp's server may close one after a stream without saying so."""
    return httpx.Limits(max_connections=users + 2, max_keepalive_connections=0)


async def _unless_one_fails(tasks: Sequence[asyncio.Task[None]], wanted: asyncio.Future[Any]) -> None:
    await asyncio.wait([*tasks, wanted], return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        if task.done():
            task.result()


async def _ask(
    client: httpx.AsyncClient,
    model: str,
    messages: list[dict[str, str]],
    max_tokens: int,
    warm: asyncio.Event,
    pieces_s: list[float],
) -> Answer:
    document = {
        "model": model,
        "messages": messages,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started_s = time.monotonic()
    first_s = 0.0
    num_tokens = 0
    async with client.stream("POST", "/v1/chat/completions", json=document) as response:
        if response.status_code != 200:
            raise SystemExit(f"the endpoint answered {response.status_code}: {(await response.aread())[:300]!r}")
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line[len("data: ") :])
            if "error" in chunk:
                raise SystemExit(f"the endpoint broke off: {chunk['error']}")
            if any(choice["delta"].get("content") for choice in chunk["choices"]):
                pieces_s.append(time.monotonic())
                first_s = first_s or pieces_s[-1]
                warm.set()
            if chunk.get("usage"):
                num_tokens = chunk["usage"]["completion_tokens"]
    ended_s = time.monotonic()
    warm.set()
    return Answer(started_s, first_s or ended_s, ended_s, num_tokens)
