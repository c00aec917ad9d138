"""What the official client offers beyond plain calls: async, helpers, raw responses, its own retries, its errors."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.serving.scripted_engine import ScriptedEngine
from tests.serving.servers import MODEL, Running, serve_scripted

HELLO: list[Any] = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serve_scripted(ScriptedEngine(max_running=8), max_waiting=60) as running:
        yield running


def asynchronous(server: Running, **options: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=20, **options)


def test_the_async_client_answers_streams_and_lists_side_by_side(server: Running) -> None:
    async def stream(client: openai.AsyncOpenAI) -> str:
        chunks = await client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=9, stream=True)
        return "".join([c.choices[0].delta.content or "" async for c in chunks])

    async def whole(client: openai.AsyncOpenAI) -> str:
        return (await client.completions.create(model=MODEL, prompt="x", max_tokens=9)).choices[0].text

    async def scenario() -> list[str]:
        async with asynchronous(server) as client:
            assert [model.id async for model in client.models.list()] == [MODEL]
            assert (await client.models.retrieve(MODEL)).id == MODEL
            return await asyncio.gather(*[ask(client) for ask in (stream, whole) for _ in range(20)])

    assert asyncio.run(scenario()) == ["abcdefghi"] * 40


def test_an_async_stream_that_is_closed_early_frees_its_slot() -> None:
    engine = ScriptedEngine(max_running=1, max_context=100_000, step_s=0.005)
    with serve_scripted(engine, max_waiting=4) as server:

        async def scenario() -> str:
            async with asynchronous(server) as client:
                stream = await client.completions.create(model=MODEL, prompt="x", max_tokens=90_000, stream=True)
                async for _ in stream:
                    break
                await stream.close()
                return (await client.completions.create(model=MODEL, prompt="x", max_tokens=3)).choices[0].text

        assert asyncio.run(scenario()) == "abc"
    assert len(engine.cancelled_ids) == 1


def test_the_streaming_helper_gathers_the_whole_answer(server: Running) -> None:
    with server.client().chat.completions.stream(
        model=MODEL, messages=HELLO, stop="j", stream_options={"include_usage": True}
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.content == "abcdefghi" and final.choices[0].finish_reason == "stop"
    assert final.usage is not None and final.usage.completion_tokens == 10


def test_an_answer_can_be_sent_back_as_it_came(server: Running) -> None:
    client = server.client()
    message = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=3).choices[0].message
    again = client.chat.completions.create(model=MODEL, messages=[*HELLO, message, *HELLO], max_tokens=3)
    assert again.choices[0].message.content == "abc"


def test_raw_responses_show_headers(server: Running) -> None:
    raw = server.client().chat.completions.with_raw_response.create(model=MODEL, messages=HELLO, max_tokens=3)
    assert raw.headers["content-type"] == "application/json"
    assert raw.parse().choices[0].message.content == "abc"
    with server.client().completions.with_streaming_response.create(model=MODEL, prompt="x", max_tokens=3) as opened:
        assert opened.parse().choices[0].text == "abc"


def test_several_choices_stream_side_by_side(server: Running) -> None:
    texts = ["", "", ""]
    for chunk in server.client().chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=9, n=3, seed=1, stream=True
    ):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == ["abcdefghi"] * 3


@pytest.mark.parametrize(
    ("change", "error", "code"),
    [
        ({"temperature": 9}, openai.BadRequestError, "invalid_value"),
        ({"extra_body": {"mirostat": 2}}, openai.BadRequestError, "invalid_value"),
        ({"max_tokens": 100_000}, openai.BadRequestError, "context_length_exceeded"),
        ({"model": "gpt-4o"}, openai.NotFoundError, "model_not_found"),
        ({"messages": [{"role": "user", "content": "x" * 2_000_000}]}, openai.APIStatusError, "request_too_large"),
        ({"extra_headers": {"Content-Type": "text/plain"}}, openai.APIStatusError, "unsupported_media_type"),
    ],
)
def test_errors_become_the_clients_own(
    server: Running, change: dict[str, Any], error: type[openai.APIStatusError], code: str
) -> None:
    with pytest.raises(error) as caught:
        server.client().chat.completions.create(**{"model": MODEL, "messages": HELLO, **change})
    assert caught.value.code == code and caught.value.body

    async def scenario() -> None:
        async with asynchronous(server, max_retries=0) as client:
            await client.chat.completions.create(**{"model": MODEL, "messages": HELLO, **change})

    with pytest.raises(error):
        asyncio.run(scenario())


def test_the_clients_own_retries_get_through_a_full_server() -> None:
    """The client reads Retry-After and comes back; nobody is lost."""
    with serve_scripted(ScriptedEngine(max_running=1, step_s=0.02), max_waiting=0) as server:
        statuses: list[int] = []

        async def note(response: httpx.Response) -> None:
            statuses.append(response.status_code)

        async def scenario() -> list[str]:
            async with (
                httpx.AsyncClient(event_hooks={"response": [note]}) as http,
                asynchronous(server, max_retries=10, http_client=http) as client,
            ):
                calls = [client.completions.create(model=MODEL, prompt="x", max_tokens=9) for _ in range(3)]
                return [answer.choices[0].text for answer in await asyncio.gather(*calls)]

        assert asyncio.run(scenario()) == ["abcdefghi"] * 3
    assert 429 in statuses and statuses.count(200) == 3
