"""Routes of the page, and the stream field that tells where tokens came from; no browser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from serving.api import create_api
from serving.ui.routes import SECURITY_HEADERS
from tests.serving.scripted_engine import END_OF_TEXT, ScriptedEngine
from tests.serving.servers import MODEL, Running, make_service, serve_scripted


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serve_scripted() as running:
        yield running


def says(data: bytes) -> ScriptedEngine:
    return ScriptedEngine(lambda request: [*data, END_OF_TEXT])


def stream(server: Running, path: str = "chat/completions", **fields: Any) -> list[dict[str, Any]]:
    """The chunks of a streamed answer."""
    body: dict[str, Any] = {"model": MODEL, "stream": True, **fields}
    body |= {"prompt": "hi"} if path == "completions" else {"messages": [{"role": "user", "content": "hi"}]}
    text = httpx.post(f"{server.url}/v1/{path}", json=body, timeout=10.0).text
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]


def origins_of(chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [token for chunk in chunks for token in chunk.get("draftline", {}).get("tokens", [])]


WANTED = {"include_token_origin": True}


def test_only_who_asks_is_told_where_tokens_came_from(server: Running) -> None:
    chunks = stream(server, max_tokens=7)
    assert len(chunks) > 1
    assert not any("draftline" in chunk for chunk in chunks)


def test_every_token_has_its_origin(server: Running) -> None:
    tokens = origins_of(stream(server, max_tokens=7, stream_options=WANTED))
    assert [token["text"] for token in tokens] == list("abcdefg")
    assert [token["position"] for token in tokens] == [0, 1, 2, 0, 1, 2, 0]
    # The scripted engine calls the last token of a step the target's own, also where the answer ends there.
    assert [token["origin"] for token in tokens] == ["draft", "draft", "target"] * 2 + ["target"]
    assert {token["num_drafted"] for token in tokens} == {2}
    assert {token["logprob"] for token in tokens} == {-0.5}


def test_completions_tell_origins_too(server: Running) -> None:
    chunks = stream(server, "completions", max_tokens=4, stream_options=WANTED)
    tokens = origins_of(chunks)
    assert "".join(token["text"] for token in tokens) == "abcd"
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "abcd"


@pytest.mark.parametrize(
    ("said", "stop", "shown"),
    [
        ("né 😀!".encode(), None, "né 😀!"),  # characters of several tokens
        (b"one STOP two", "STOP", "one "),
        (b"one STO", "STOP", "one STO"),  # held back for a stop string that never comes
        (b"half \xf0\x9f", None, "half \ufffd"),  # ends within a character
    ],
)
def test_texts_of_tokens_add_up_to_the_text(said: bytes, stop: str | None, shown: str) -> None:
    with serve_scripted(says(said)) as server:
        for chunk in (chunks := stream(server, stop=stop, stream_options=WANTED)):
            content = chunk["choices"][0]["delta"].get("content", "")
            assert content == "".join(token["text"] for token in origins_of([chunk]))
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == shown


def test_the_page_and_its_parts_are_served_with_a_strict_policy(server: Running) -> None:
    with httpx.Client(base_url=server.url) as client:
        first = client.get("/ui")
        assert (first.status_code, first.headers["location"]) == (307, "ui/")
        page = client.get("/ui/")
        assert page.status_code == 200
        for name in ("style.css", "app.js", "answer.js", "live.js", "chart.js", "api.js", "tip.js", "icon.svg"):
            part = client.get(f"/ui/{name}")
            assert part.status_code == 200, name
            assert {header: part.headers[header] for header in SECURITY_HEADERS} == SECURITY_HEADERS
            again = client.get(f"/ui/{name}", headers={"If-None-Match": part.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")
    policy = page.headers["content-security-policy"]
    assert "unsafe" not in policy
    assert "http" not in policy
    # Nothing inline that the policy would have to allow, and nothing from elsewhere.
    assert "<style" not in page.text
    assert " style=" not in page.text
    assert " onclick" not in page.text
    assert "//" not in page.text


@pytest.mark.parametrize("name", ["../api.py", "..%2fapi.py", "%2e%2e/routes.py", "nothing.js", "static/app.js"])
def test_no_other_file_is_served(server: Running, name: str) -> None:
    answer = httpx.get(f"{server.url}/ui/{name}")
    assert answer.status_code == 404
    assert "message" in answer.json()["error"]


def test_load_figures_need_no_key_and_tell_no_secret(server: Running) -> None:
    with serve_scripted(api_keys=["sesame"]) as guarded:
        figures = httpx.get(f"{guarded.url}/ui/load")
        assert figures.json()["needs_key"] is True
        assert "sesame" not in figures.text
    figures = httpx.get(f"{server.url}/ui/load").json()
    assert (figures["model"], figures["draft"], figures["num_spec_tokens"]) == (MODEL, "desk/3", 2)
    assert figures["needs_key"] is False


def test_a_server_without_the_page_has_none() -> None:
    service = make_service(ScriptedEngine())
    try:
        client = TestClient(create_api(service, has_ui=False))
        assert {client.get(path).status_code for path in ("/ui", "/ui/", "/ui/load", "/ui/app.js")} == {404}
    finally:
        service.close()
