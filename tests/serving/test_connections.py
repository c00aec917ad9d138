"""Clients that are many, slow, half gone or gone: the others go on, slots come back, memory stays bounded."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

import httpx
import openai
import psutil
import pytest

from tests.serving.scripted_engine import ScriptedEngine
from tests.serving.servers import MODEL, Running, serve_scripted, wait_until


def request_bytes(**fields: Any) -> bytes:
    """A completion request as it goes over the wire."""
    body = json.dumps({"model": MODEL, "prompt": "x", **fields}).encode()
    lines = ["POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json"]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


def running(server: Running) -> int:
    """What the metrics page says is in a slot."""
    text = httpx.get(f"{server.url}/metrics").text
    line = next(line for line in text.splitlines() if line.startswith("vllm:num_requests_running{"))
    return int(float(line.rsplit(" ", 1)[1]))


def leave(connection: socket.socket) -> None:
    """Hang up in the orderly way."""
    connection.close()


def vanish(connection: socket.socket) -> None:
    """Hang up with a reset: unread data is thrown away."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    connection.close()


def close_half(connection: socket.socket) -> None:
    """Say that no more will be sent; the server takes that for leaving, as uvicorn does."""
    connection.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("go", [leave, vanish, close_half])
@pytest.mark.parametrize("is_stream", [False, True])
def test_a_client_that_leaves_frees_its_slot_within_steps(is_stream: bool, go: Callable[[socket.socket], None]) -> None:
    engine = ScriptedEngine(max_context=100_000, step_s=0.05, max_running=1)
    with serve_scripted(engine) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(request_bytes(max_tokens=50_000, stream=is_stream))
            wait_until(lambda: server.service.worker.load().num_running == 1)
            left_at = engine.num_steps
            go(connection)
            wait_until(lambda: bool(engine.cancelled_ids))
            # One is under way, one takes the slot back, and a busy machine may be late by some.
            assert engine.num_steps - left_at <= 6
            wait_until(lambda: running(server) == 0)
        assert len(engine.cancelled_ids) == 1
        assert server.client().completions.create(model=MODEL, prompt="x", max_tokens=3).choices[0].text == "abc"


def test_a_client_that_leaves_the_queue_frees_its_place() -> None:
    engine = ScriptedEngine(max_running=1, step_s=0.005, max_context=100_000)
    with serve_scripted(engine, max_waiting=1) as server:
        with server.client().completions.create(model=MODEL, prompt="x", max_tokens=50_000, stream=True) as first:
            next(iter(first))
            with pytest.raises(openai.APITimeoutError):
                server.client().with_options(timeout=0.2).completions.create(model=MODEL, prompt="x")
            wait_until(lambda: server.service.worker.load().num_waiting == 0)
            assert server.service.worker._num_admitted == 1
    assert len(engine.seen) == 1, "a request that nobody waits for was computed"


async def read_stream(port: int, num_tokens: int) -> bool:
    """Read one streamed answer; whether it came whole."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request_bytes(max_tokens=num_tokens, stream=True))
        answer = await reader.readuntil(b"data: [DONE]\n\n")
    finally:
        writer.close()
        await writer.wait_closed()
    events = [line for line in answer.split(b"\n") if line.startswith(b"data: {")]
    text = "".join(json.loads(event[6:])["choices"][0]["text"] for event in events)
    return len(text) == num_tokens and text.startswith("abcdef")


def is_closed(connection: socket.socket) -> bool:
    """Whether the server ends the connection without a word."""
    with suppress(ConnectionResetError):
        return connection.recv(100) == b""
    return True


@pytest.mark.slow
def test_a_thousand_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that stream get all of it; those that send nothing, or their head for ever, are closed."""
    monkeypatch.setattr("serving.connections.HEAD_TIMEOUT_S", 5.0)
    engine = ScriptedEngine(max_running=64, tokens_per_step=16, max_context=1024)
    engine.gate.clear()

    async def load(server: Running) -> list[bool]:
        streams = [asyncio.create_task(read_stream(server.port, 300)) for _ in range(500)]
        while server.service.worker._num_admitted < 500:
            await asyncio.sleep(0.01)
        engine.gate.set()
        return await asyncio.gather(*streams)

    with serve_scripted(engine, max_waiting=1000) as server, ExitStack() as stack:
        before = psutil.Process().memory_info().rss
        idle = [stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 20)) for _ in range(500)]
        for connection in idle[:200]:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Slow: ")
        wait_until(lambda: len(server.connections) == 500)
        assert all(asyncio.run(load(server)))
        assert httpx.get(f"{server.url}/health").status_code == 200
        grown = psutil.Process().memory_info().rss - before
        assert all(map(is_closed, idle))
        wait_until(lambda: len(server.connections) == 0)
        assert running(server) == 0 and server.service.worker._num_admitted == 0
    assert grown < 200 << 20, f"{grown >> 20} MiB"


@pytest.mark.slow
def test_slow_readers_stop_nobody_and_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients that take a byte now and then of answers of some megabytes each."""
    monkeypatch.setattr("serving.connections.STALL_TIMEOUT_S", 1.0)
    engine = ScriptedEngine(max_context=100_000, max_running=20, tokens_per_step=16, step_s=0.01)
    with serve_scripted(engine, max_waiting=0, send_buffer_bytes=8192) as server, ExitStack() as stack:
        before = psutil.Process().memory_info().rss
        lazy = [stack.enter_context(socket.socket()) for _ in range(10)]
        for connection in lazy:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", server.port))
            connection.sendall(request_bytes(max_tokens=50_000, stream=True, logprobs=0))
        wait_until(lambda: server.service.worker.load().num_running == 10)
        answer = server.client().completions.create(model=MODEL, prompt="y", max_tokens=300)
        assert answer.usage is not None and answer.usage.completion_tokens == 300
        assert server.service.worker.load().num_running > 0, "nobody was slow any more"
        server.clients.pop().close()
        deadline_s = time.monotonic() + 30
        while server.connections and time.monotonic() < deadline_s:
            for connection in lazy:
                with suppress(BlockingIOError, ConnectionResetError):
                    connection.recv(1, socket.MSG_DONTWAIT)
            time.sleep(0.1)
        assert not server.connections, "a connection that takes a byte now and then is still held"
        wait_until(lambda: running(server) == 0)
        grown = psutil.Process().memory_info().rss - before
    assert len(engine.cancelled_ids) == 10
    assert grown < 100 << 20, f"{grown >> 20} MiB"
