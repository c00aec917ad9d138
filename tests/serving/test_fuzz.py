"""Whatever arrives, the answer is a documented status in the documented shape, and no slot stays taken.

Two ways to come up with requests: schemathesis reads the server's own OpenAPI
document and sends what it allows and what it does not; the strategies below
know what a plausible conversation looks like, which no schema says.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    allow_header_conformance,
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from serving.schema import NEUTRAL_VALUES, ChatRequest, CompletionRequest
from tests.serving.scripted_engine import ScriptedEngine
from tests.serving.servers import MODEL, Running, serve_scripted, wait_until

ALLOWED = {200, 400, 404, 429}

JSON_HEADERS = {"Content-Type": "application/json"}

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    allow_header_conformance,
    negative_data_rejection,
]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serve_scripted(ScriptedEngine(max_running=4), max_waiting=60) as running:
        yield running


OPERATIONS = ["POST /v1/chat/completions", "POST /v1/completions", "GET /v1/models", "GET /v1/models/{model_id}"]
PAGES = ["GET /health", "GET /version", "GET /metrics", "GET /ui/load"]


@pytest.fixture(scope="module")
def described(server: Running) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def test_every_operation_is_fuzzed(described: schemathesis.BaseSchema) -> None:
    assert sorted(OPERATIONS + PAGES) == sorted(found.ok().label for found in described.get_all_operations())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("label", "mode", "wanted"),
    [
        ("POST /v1/chat/completions", "positive", 200),
        ("POST /v1/chat/completions", "negative", 400),
        ("POST /v1/completions", "positive", 200),
        ("POST /v1/completions", "negative", 400),
        ("GET /v1/models", "positive", 200),
        ("GET /v1/models/{model_id}", "positive", 404),
        ("GET /ui/load", "positive", 200),
    ],
)
def test_the_server_keeps_what_its_document_says(
    label: str, mode: str, wanted: int, described: schemathesis.BaseSchema, server: Running
) -> None:
    """All that the document allows, and near misses of it; the same examples on every run."""
    method, path = label.split(" ")
    cases = described[path][method].as_strategy(generation_mode=schemathesis.GenerationMode(mode))
    statuses: Counter[int] = Counter()

    @settings(max_examples=60 if method == "POST" else 10, derandomize=True, database=None)
    @given(case=cases)
    def send(case: schemathesis.Case) -> None:
        response = case.call_and_validate(checks=CHECKS, timeout=20)
        statuses[response.status_code] += 1
        wait_until(lambda: server.service.worker.load().num_running == 0)

    send()
    assert statuses[wanted] >= (5 if method == "POST" else 1), f"the examples do not get far: {statuses}"


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=20) as client:
        yield client


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


def _check_stream(text: str) -> None:
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    assert all("error" not in json.loads(event) for event in events[:-1])


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@settings(max_examples=150)
@given(document=documents())
def test_no_request_makes_a_server_error(path: str, server: Running, client: httpx.Client, document: object) -> None:
    response = client.post(path, content=json.dumps(document).encode(), headers=JSON_HEADERS)
    assert response.status_code in ALLOWED, response.text
    if response.status_code != 200:
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]
    elif response.headers["content-type"].startswith("text/event-stream"):
        _check_stream(response.text)
    else:
        assert response.json()["choices"]
    wait_until(lambda: server.service.worker.load().num_running == 0)


@settings(max_examples=100)
@given(body=st.binary(max_size=200))
def test_bytes_that_are_no_json_are_400(client: httpx.Client, body: bytes) -> None:
    assert client.post("/v1/completions", content=body, headers=JSON_HEADERS).status_code == 400
