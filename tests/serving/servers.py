"""A real HTTP server on loopback around the scripted engine."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import openai
import uvicorn

from serving.api import create_api
from serving.connections import GuardedConnection
from serving.edge import BodyLimits
from serving.service import CompletionService, ServiceInfo
from serving.worker import EngineWorker
from tests.serving.scripted_engine import ByteText, ScriptedEngine

MODEL = "scripted"


@dataclass(frozen=True)
class Running:
    """A server in this process."""

    engine: ScriptedEngine
    service: CompletionService
    port: int
    connections: set[Any]
    clients: list[openai.OpenAI] = field(default_factory=list)

    @property
    def url(self) -> str:
        """Root of the server."""
        return f"http://127.0.0.1:{self.port}"

    def client(self, api_key: str = "none") -> openai.OpenAI:
        """The real client, without retries, so that every answer is seen; closed with the server."""
        client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=20.0)
        self.clients.append(client)
        return client


def make_service(engine: ScriptedEngine, *, max_waiting: int = 4, model_name: str = MODEL) -> CompletionService:
    """A started service; close it."""
    worker = EngineWorker(
        lambda: engine, max_running=engine.max_running, max_waiting=max_waiting, model_name=model_name
    )
    worker.start().result(timeout=5)
    info = ServiceInfo(
        model_name, engine.max_context, num_spec_tokens=engine.tokens_per_step - 1, draft="desk/3", created=1
    )
    return CompletionService(worker, ByteText(), info)


@contextmanager
def serve_scripted(
    engine: ScriptedEngine | None = None,
    *,
    max_waiting: int = 4,
    api_keys: Sequence[str] = (),
    limits: BodyLimits | None = None,
    send_buffer_bytes: int = 0,
) -> Iterator[Running]:
    """Run the application under uvicorn in a thread until the block ends.

    Args:
        engine: Computes the answers.
        max_waiting: Places in the queue.
        api_keys: Keys that are accepted.
        limits: Of bodies.
        send_buffer_bytes: What the kernel keeps for a client that does not read; 0 leaves it to the kernel.
    """
    engine = engine or ScriptedEngine()
    service = make_service(engine, max_waiting=max_waiting)
    config = uvicorn.Config(
        create_api(service, api_keys, limits=limits),
        http=GuardedConnection,
        log_level="critical",
        lifespan="off",
        ws="none",
    )
    server = uvicorn.Server(config)
    listening = socket.socket()
    if send_buffer_bytes:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer_bytes)
    listening.bind(("127.0.0.1", 0))
    listening.listen(2048)
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        running = Running(engine, service, listening.getsockname()[1], server.server_state.connections)
        try:
            yield running
        finally:
            for client in running.clients:
                client.close()
    finally:
        engine.gate.set()
        server.should_exit = True
        service.close()
        thread.join(10)
        listening.close()


def wait_until(condition: object, timeout_s: float = 5.0) -> None:
    """Poll until ``condition()`` holds; fails with its name after the timeout."""
    assert callable(condition)
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.005)
