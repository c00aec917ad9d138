"""Bodies of every bad kind, and answers that break off: bounded in bytes and seconds, refused in OpenAI's shape."""

from __future__ import annotations

import asyncio
import importlib
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import uvicorn
from starlette.types import Message, Receive, Scope, Send

from serving.connections import GuardedConnection
from serving.edge import CALLBACK, CALLBACK_ENV, BodyLimits, Edge
from tests.serving.scripted_engine import ScriptedEngine
from tests.serving.servers import MODEL, Running, serve_scripted, wait_until

JSON = {"Content-Type": "application/json"}
GOOD = json.dumps({"model": MODEL, "prompt": "x", "max_tokens": 3}).encode()


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serve_scripted() as running:
        yield running


def post(server: Running, body: bytes, path: str = "/v1/completions", headers: dict[str, str] = JSON) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", content=body, headers=headers, timeout=20.0)


def head(length: int, *more: str) -> bytes:
    lines = ["POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {length}"]
    return "\r\n".join([*lines, *more, "", ""]).encode()


def read_all(connection: socket.socket) -> bytes:
    answer = b""
    while part := connection.recv(65536):
        answer += part
    return answer


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"model": "\\ud800"}',
        b'{"\\ud800": 1}',
        b"[" * 100_000,
        b'{"model":"scripted","prompt":' + b"[" * 400_000 + b"]" * 400_000 + b"}",
        b'{"model":"scripted","prompt":"x","temperature":NaN}',
        b'{"model":"scripted","prompt":"x","temperature":-Infinity}',
        b'{"model":"scripted","prompt":"x","temperature":1e999}',
        b'{"model":"scripted","prompt":"x","seed":1e999}',
        b'{"model":"scripted","prompt":"x","seed":' + b"9" * 20_000 + b"}",
        b'{"model":"scripted","prompt":"\xc3\x28"}',
        b'{"model":"scripted","prompt":"\\udc00\\ud800"}',
        b'{"model":"scripted","prompt":""}',
        b'{"model":"scripted","prompt":"x"} trailing',
        b'\xef\xbb\xbf{"model":"scripted","prompt":"x"}',
        b'{"model":"scripted","prompt":"\x00"}',
    ],
)
def test_a_body_that_is_no_request_is_400(server: Running, body: bytes) -> None:
    for path in ("/v1/completions", "/v1/chat/completions"):
        response = post(server, body, path)
        assert response.status_code == 400 and response.json()["error"]["message"]
        assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "name"),
    [
        (b'{"model":"scripted","prompt":"x","temperature":0,"temperature":2}', "temperature"),
        (b'{"model":"scripted","prompt":"x","stream":true,"stream_options":{"include_usage":true,'
         b'"include_usage":false}}', "include_usage"),
    ],
)  # fmt: skip
def test_a_field_given_twice_is_named(server: Running, body: bytes, name: str) -> None:
    error = post(server, body).json()["error"]
    assert error["param"] == name and "more than once" in error["message"]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": "multipart/form-data; boundary=x"},
        {**JSON, "Content-Encoding": "gzip"},
    ],
)
def test_what_is_not_declared_plain_json_is_415(server: Running, headers: dict[str, str]) -> None:
    response = post(server, GOOD, headers=headers)
    assert response.status_code == 415 and response.json()["error"]["code"] == "unsupported_media_type"


@pytest.mark.parametrize("media", ["application/json", "Application/JSON; charset=utf-8", "application/json;x=y"])
def test_plain_json_goes_by_many_spellings(server: Running, media: str) -> None:
    assert post(server, GOOD, headers={"Content-Type": media}).json()["choices"][0]["text"] == "abc"


@pytest.mark.slow
@pytest.mark.parametrize("is_announced", [True, False])
def test_a_hundred_megabytes_are_413_and_never_held(server: Running, is_announced: bool) -> None:
    """The client gets to read the refusal, although it was still sending, and memory does not follow the body."""
    part = b" " * (1 << 20)

    async def parts() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield part

    async def send() -> httpx.Response:
        headers = {**JSON, **({"Content-Length": str(100 << 20)} if is_announced else {})}
        async with httpx.AsyncClient(timeout=30) as client:
            return await client.post(f"{server.url}/v1/completions", content=parts(), headers=headers)

    before = psutil.Process().memory_info().rss
    response = asyncio.run(send())
    assert response.status_code == 413 and response.json()["error"]["code"] == "request_too_large"
    assert psutil.Process().memory_info().rss - before < 30 << 20
    assert post(server, GOOD).status_code == 200


def test_who_asks_before_sending_is_refused_before_sending(server: Running) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as polite:
        polite.sendall(head(100 << 20, "Expect: 100-continue"))
        assert read_all(polite).startswith(b"HTTP/1.1 413 ")


def test_a_body_that_does_not_arrive_is_408() -> None:
    with serve_scripted(limits=BodyLimits(arrive_s=0.1)) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as lazy:
            lazy.sendall(head(10) + b"{")
            answer = read_all(lazy)
    assert answer.startswith(b"HTTP/1.1 408 ") and b"request_timeout" in answer


def test_bodies_that_arrive_together_have_one_bound() -> None:
    with serve_scripted(limits=BodyLimits(max_bytes=100_000, max_held_bytes=150_000)) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as lazy:
            lazy.sendall(head(100_000) + b" " * 99_999)
            deadline_s = time.monotonic() + 5
            statuses = []
            while 429 not in statuses and time.monotonic() < deadline_s:
                statuses.append(post(server, b" " * 90_000).status_code)
        assert 429 in statuses
        wait_until(lambda: post(server, b" " * 90_000).status_code == 400)


LONG_TEXT = "The parcel that I ordered on Monday has not arrived. " * 10_000
"""About 110,000 tokens of a usual vocabulary, half a megabyte."""


@pytest.mark.parametrize("prompt", [LONG_TEXT, [1] * 100_000, [[1], [1] * 100_000]], ids=["text", "ids", "lists"])
def test_a_hundred_thousand_tokens_are_refused_without_being_tokenised(server: Running, prompt: Any) -> None:
    response = post(server, json.dumps({"model": MODEL, "prompt": prompt}).encode())
    assert response.status_code == 400 and response.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.slow
def test_others_stream_and_are_tokenised_while_a_long_text_is() -> None:
    with serve_scripted(ScriptedEngine(step_s=0.005, max_context=50_000)) as server:
        encode = server.service.text.encode
        is_released = threading.Event()

        def encode_long(text: str) -> list[int]:
            assert len(text) < 1000 or is_released.wait(20)
            return encode(text)

        server.service.text.encode = encode_long  # type: ignore[method-assign]
        long = json.dumps({"model": MODEL, "prompt": "x" * 20_000, "max_tokens": 1}).encode()
        with ThreadPoolExecutor(1) as client:
            stream = iter(server.client().completions.create(model=MODEL, prompt="x", max_tokens=20_000, stream=True))
            next(stream)
            asked = client.submit(post, server, long)
            for _ in range(50):
                next(stream)
            assert post(server, GOOD).status_code == 200
            assert not asked.done()
            is_released.set()
            assert asked.result(20).status_code == 200


class Broken:
    """An application, or a proxy, that breaks off."""

    def __init__(self, *messages: Message, error: Exception | None = None) -> None:
        self.messages = messages
        self.error = error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send what there is."""
        for message in self.messages:
            await send(message)
        if self.error is not None:
            raise self.error


def ask(app: Broken, path: str = "/v1/models") -> httpx.Response:
    async def get() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=Edge(app)), base_url="http://edge") as client:
            return await client.get(path)

    return asyncio.run(get())


def start(status: int, media: str, **headers: str) -> Message:
    pairs = {"content-type": media, **headers}.items()
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in pairs]
    return {"type": "http.response.start", "status": status, "headers": raw}


@pytest.mark.parametrize("error", [None, RuntimeError("torn")])
def test_a_stream_that_breaks_off_ends_with_an_error_event(error: Exception | None) -> None:
    chunk: Message = {"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True}
    response = ask(Broken(start(200, "text/event-stream; charset=utf-8"), chunk, error=error))
    first, second, last, rest = response.text.split("\n\n")
    assert (first, last, rest) == ("data: {}", "data: [DONE]", "")
    assert json.loads(second.removeprefix("data: "))["error"]["code"] == "replica_lost"
    assert "torn" not in response.text


@pytest.mark.parametrize("error", [None, RuntimeError("torn")])
def test_an_answer_that_never_began_is_503(error: Exception | None) -> None:
    response = ask(Broken(error=error))
    assert response.status_code == 503 and response.json()["error"]["code"] == "replica_lost"
    assert int(response.headers["retry-after"]) >= 1


def test_the_proxys_own_refusals_get_the_shape_and_keep_their_headers() -> None:
    text: Message = {"type": "http.response.body", "body": b"Too many requests in queue", "more_body": False}
    response = ask(Broken(start(429, "text/plain", retry_after="7"), text))
    assert response.status_code == 429 and response.headers["retry-after"] == "7"
    assert response.json()["error"]["message"] == "Too many requests in queue"
    assert response.json()["error"]["type"] == "rate_limit_error"


def test_paths_that_are_not_ours_pass_as_they_are() -> None:
    text: Message = {"type": "http.response.body", "body": b"no", "more_body": False}
    assert ask(Broken(start(404, "text/plain"), text), "/-/healthz").text == "no"


def test_the_proxies_of_a_cluster_find_the_middleware(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name that nodes are given leads to the function, and the function to both guards."""
    monkeypatch.setitem(uvicorn.config.HTTP_PROTOCOLS, "auto", "")
    module, _, name = CALLBACK.partition(":")
    (middleware,) = getattr(importlib.import_module(module), name)()
    assert middleware.cls is Edge
    config = uvicorn.Config(Broken(), log_level="critical")
    config.load()
    assert config.http_protocol_class is GuardedConnection
    template = Path(__file__).parents[2] / "charts/draftline/templates/serving/_ray.tpl"
    assert f"- name: {CALLBACK_ENV}\n  value: {CALLBACK}\n" in template.read_text()
