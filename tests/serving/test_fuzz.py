"""Whatever JSON arrives, the answer is a documented status in the documented shape, and no slot stays taken."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.api import create_api
from serving.schema import NEUTRAL_VALUES, ChatRequest, CompletionRequest
from serving.service import CompletionService
from tests.serving.scripted_engine import ScriptedEngine
from tests.serving.servers import MODEL, make_service, wait_until

ALLOWED = {200, 400, 404, 429}


@pytest.fixture(scope="module")
def service() -> Iterator[CompletionService]:
    service = make_service(ScriptedEngine(max_running=4), max_waiting=60)
    yield service
    service.close()


@pytest.fixture(scope="module")
def api(service: CompletionService) -> FastAPI:
    return create_api(service)


_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
_JSON = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
_NAMES = sorted({*ChatRequest.model_fields, *CompletionRequest.model_fields, *NEUTRAL_VALUES})
_MESSAGE = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["system", "developer", "user", "assistant", "tool"]),
        "content": st.text(max_size=20) | _JSON,
    }
)
_PLAUSIBLE: dict[str, st.SearchStrategy[Any]] = {
    "messages": st.lists(_MESSAGE, max_size=3),
    "prompt": st.text(max_size=20)
    | st.lists(st.text(max_size=5), max_size=3)
    | st.lists(st.integers(-1, 300), max_size=9),
    "max_tokens": st.integers(-1, 600),
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0, 1),
    "n": st.integers(0, 5),
    "stop": st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=5),
    "stream": st.booleans(),
    "logprobs": st.booleans() | st.integers(0, 1),
}
_FIELDS = st.dictionaries(st.sampled_from(_NAMES), _JSON, max_size=3)


@st.composite
def documents(draw: st.DrawFn) -> object:
    """Mostly plausible requests with some fields replaced by anything."""
    if draw(st.integers(0, 19)) == 0:
        return draw(_JSON)
    names = [
        "messages" if draw(st.booleans()) else "prompt",
        *draw(st.lists(st.sampled_from(sorted(_PLAUSIBLE)), max_size=4)),
    ]
    document: dict[str, object] = {"model": MODEL, **{name: draw(_PLAUSIBLE[name]) for name in names}}
    return {**document, **draw(_FIELDS)} if draw(st.booleans()) else document


async def _post(api: FastAPI, path: str, body: bytes) -> httpx.Response:
    transport = httpx.ASGITransport(app=api)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.post(path, content=body)


def _check_stream(text: str) -> None:
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    assert all("error" not in json.loads(event) for event in events[:-1])


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@settings(max_examples=250, deadline=None)
@given(document=documents())
def test_no_request_makes_a_server_error(path: str, api: FastAPI, service: CompletionService, document: object) -> None:
    response = asyncio.run(_post(api, path, json.dumps(document).encode()))
    assert response.status_code in ALLOWED, response.text
    if response.status_code != 200:
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]
    elif response.headers["content-type"].startswith("text/event-stream"):
        _check_stream(response.text)
    else:
        assert response.json()["choices"]
    wait_until(lambda: service.worker.load().num_running == 0)


@settings(max_examples=100, deadline=None)
@given(body=st.binary(max_size=200))
def test_bytes_that_are_no_json_are_400(api: FastAPI, body: bytes) -> None:
    assert asyncio.run(_post(api, "/v1/completions", body)).status_code == 400
