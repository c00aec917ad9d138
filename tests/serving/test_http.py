"""The HTTP surface, seen by the real OpenAI client over loopback."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from draftline import __version__
from draftline.errors import TargetError
from serving.errors import from_validation
from tests.serving.scripted_engine import END_OF_TEXT, ScriptedEngine
from tests.serving.servers import MODEL, Running, serve_scripted, wait_until

HELLO: list[Any] = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serve_scripted() as running:
        yield running


def says(text: str) -> ScriptedEngine:
    """An engine that answers ``text`` and ends."""
    return ScriptedEngine(lambda request: [*text.encode(), END_OF_TEXT])


def post(server: Running, path: str, document: object, **kwargs: Any) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=document, timeout=10.0, **kwargs)


def test_a_chat_answer_is_whole(server: Running) -> None:
    answer = server.client().chat.completions.create(model=MODEL, messages=HELLO, max_tokens=7, temperature=0)
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "abcdefg", "length")
    prompt = len("system:be kind\nuser:hi\n")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (
        prompt,
        7,
        prompt + 7,
    )
    assert answer.id.startswith("chatcmpl-") and answer.object == "chat.completion" and answer.model == MODEL
    assert answer.model_dump()["metrics"] == {
        "speculative_decoding": {
            "mean_acceptance_length": pytest.approx(7 / 3),
            "draft_acceptance_rate": pytest.approx(4 / 6),
            "acceptance_histogram": [1, 0, 2],
            "num_spec_steps": 3,
            "num_accepted_draft_tokens": 4,
            "num_draft_tokens": 6,
            "num_spec_tokens": 2,
        }
    }


def test_a_completion_counts_prompt_and_answer(server: Running) -> None:
    answer = server.client().completions.create(model=MODEL, prompt="hello")
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("abcdefghijklmnop", "length")
    assert answer.usage is not None and (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 16)


def test_several_prompts_and_choices_keep_their_order(server: Running) -> None:
    answer = server.client().completions.create(model=MODEL, prompt=["x", "yy"], n=2, max_tokens=2, seed=7)
    assert [(c.index, c.text) for c in answer.choices] == [(i, "ab") for i in range(4)]
    assert answer.usage is not None and answer.usage.completion_tokens == 8
    assert [r.sampling.seed for r in server.engine.seen[-4:]] == [7, 8, 7, 8]


def test_a_negative_seed_is_as_good_as_any(server: Running) -> None:
    server.client().completions.create(model=MODEL, prompt="x", n=2, max_tokens=2, seed=-1)
    assert [r.sampling.seed for r in server.engine.seen[-2:]] == [2**64 - 1, 0]


def test_token_ids_are_a_prompt(server: Running) -> None:
    server.client().completions.create(model=MODEL, prompt=[1, 2, 3], max_tokens=1)
    assert server.engine.seen[-1].prompt_ids == (1, 2, 3)


def test_a_stream_carries_several_tokens_per_chunk_and_ends_with_usage(server: Running) -> None:
    stream = server.client().chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=7, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]
    assert "".join(texts) == "abcdefg" and len(texts) <= 3
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    last = chunks[-1]
    assert last.choices == [] and last.usage is not None and last.usage.completion_tokens == 7
    assert last.model_dump()["metrics"]["speculative_decoding"]["num_spec_steps"] == 3
    assert all(c.usage is None for c in chunks[:-1]) and len({c.id for c in chunks}) == 1


def test_a_stream_is_events_that_end_with_done(server: Running) -> None:
    with httpx.stream(
        "POST", f"{server.url}/v1/completions", json={"model": MODEL, "prompt": "x", "max_tokens": 4, "stream": True}
    ) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    documents = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert "".join(d["choices"][0]["text"] for d in documents) == "abcd"
    assert documents[-1]["choices"][0]["finish_reason"] == "length"
    assert not any("usage" in d or "metrics" in d for d in documents)


def test_chat_logprobs_name_each_chosen_token() -> None:
    with serve_scripted(says("aé")) as server:
        answer = server.client().chat.completions.create(model=MODEL, messages=HELLO, logprobs=True)
        assert answer.choices[0].message.content == "aé" and answer.choices[0].logprobs is not None
        content = answer.choices[0].logprobs.content or []
    assert [(t.token, t.bytes) for t in content] == [
        ("a", [97]),
        ("\ufffd", None),
        ("\ufffd", None),
        ("<end>", list(b"<end>")),
    ]
    assert {t.logprob for t in content} == {-0.5}


def test_alternatives_are_reported_as_asked_for() -> None:
    with serve_scripted(says("aéb")) as server:
        client = server.client()
        options: dict[str, Any] = {"model": MODEL, "messages": HELLO, "logprobs": True, "top_logprobs": 2, "stop": "b"}
        answer = client.chat.completions.create(**options).choices[0].logprobs
        assert answer is not None
        expected = [[("a", -0.5), ("\x00", -1.0)], [("\ufffd", -0.5), ("\x00", -1.0)]]
        found = [[(other.token, other.logprob) for other in t.top_logprobs] for t in answer.content or []]
        assert found[:2] == expected and len(found) == 4
        streamed = [
            [(other.token, other.logprob) for other in t.top_logprobs]
            for chunk in client.chat.completions.create(**options, stream=True)
            if chunk.choices and chunk.choices[0].logprobs is not None
            for t in chunk.choices[0].logprobs.content or []
        ]
        assert streamed == found
        plain = client.completions.create(model=MODEL, prompt="x", max_tokens=2, logprobs=2).choices[0].logprobs
    assert plain is not None and plain.tokens == ["a", "\ufffd"]
    assert plain.top_logprobs == [{"a": -0.5, "\x00": -1.0}, {"\ufffd": -0.5, "\x00": -1.0}]


def test_completion_logprobs_have_offsets_also_in_a_stream(server: Running) -> None:
    client = server.client()
    whole = client.completions.create(model=MODEL, prompt="x", max_tokens=5, logprobs=0).choices[0].logprobs
    assert whole is not None
    assert (whole.tokens, whole.text_offset) == (list("abcde"), [0, 1, 2, 3, 4])
    offsets: list[int] = []
    for chunk in client.completions.create(model=MODEL, prompt="x", max_tokens=5, logprobs=0, stream=True):
        assert chunk.choices[0].logprobs is not None
        offsets += chunk.choices[0].logprobs.text_offset or []
    assert offsets == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("tokens_per_step", [1, 2, 3, 5, 50])
@pytest.mark.parametrize("is_stream", [False, True])
def test_stop_strings_cut_wherever_steps_end(tokens_per_step: int, is_stream: bool) -> None:
    engine = ScriptedEngine(tokens_per_step=tokens_per_step, step_s=0.01, max_context=10_000)
    with serve_scripted(engine) as server:
        options: dict[str, Any] = {"model": MODEL, "messages": HELLO, "max_tokens": 9000, "stop": ["zz", "ghi"]}
        if is_stream:
            chunks = list(server.client().chat.completions.create(**options, stream=True))
            text = "".join(c.choices[0].delta.content or "" for c in chunks)
            reason = chunks[-1].choices[0].finish_reason
        else:
            answer = server.client().chat.completions.create(**options)
            text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
            assert answer.usage is not None and answer.usage.completion_tokens == 9
        assert (text, reason) == ("abcdef", "stop")
        wait_until(lambda: server.service.worker.load().num_running == 0)
    assert len(engine.cancelled_ids) == 1, "the surplus was not cancelled"


def test_min_tokens_holds_off_stop_strings_and_end_tokens() -> None:
    with serve_scripted(says("ab.cd.ef.")) as server:
        answer = server.client().completions.create(
            model=MODEL, prompt="x", max_tokens=50, stop=".", extra_body={"min_tokens": 4}
        )
    assert answer.choices[0].text == "ab.cd"


def test_ignore_eos_reads_past_the_end_token() -> None:
    with serve_scripted(says("ab")) as server:
        answer = server.client().completions.create(
            model=MODEL, prompt="x", max_tokens=9, extra_body={"ignore_eos": True}
        )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None and answer.usage.completion_tokens == 9


def test_characters_split_over_tokens_stream_whole() -> None:
    with serve_scripted(says("naïve 😀 日本")) as server:
        chunks = list(server.client().completions.create(model=MODEL, prompt="x", max_tokens=99, stream=True))
    texts = [c.choices[0].text for c in chunks]
    assert "".join(texts) == "naïve 😀 日本" and not any("\ufffd" in text for text in texts)


def test_a_sampled_request_reaches_the_engine_as_asked(server: Running) -> None:
    server.client().chat.completions.create(
        model=MODEL,
        messages=HELLO,
        max_completion_tokens=5,
        temperature=0.7,
        top_p=0.9,
        seed=11,
        user="someone",
        frequency_penalty=0,
        extra_body={"top_k": 20, "ignore_eos": True, "min_tokens": 2},
    )
    sampling = server.engine.seen[-1].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (5, 0.7, 0.9, 20)
    assert (sampling.seed, sampling.ignore_eos, sampling.min_tokens) == (11, True, 2)


def test_without_a_limit_a_chat_may_fill_the_context(server: Running) -> None:
    answer = server.client().chat.completions.create(model=MODEL, messages=HELLO)
    assert answer.usage is not None and answer.usage.total_tokens == server.engine.max_context


CHAT = {"model": MODEL, "messages": HELLO}


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "not supported"),
        ({"mesages": []}, "mesages", "not supported"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", "less than or equal to 20"),
        ({"top_logprobs": 2}, None, "only allowed when logprobs is true"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"temperature": "hot"}, "temperature", "number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 2.5}, "max_tokens", "integer"),
        ({"n": 5}, "n", "less than or equal to 4"),
        ({"stop": ["a"] * 5}, "stop", "at most 4 stop strings"),
        ({"stop": ""}, "stop", "1 to 256 characters"),
        ({"stream_options": {"include_usage": True}}, None, "only allowed when stream is true"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "'system', 'developer', 'user'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None, ""),
        ({"max_tokens": 4, "min_tokens": 5}, None, "min_tokens=5"),
        ({"max_tokens": 4, "max_completion_tokens": 5}, None, "differ"),
    ],
)
def test_a_bad_request_is_named(server: Running, change: dict[str, Any], param: str | None, words: str) -> None:
    response = post(server, "/v1/chat/completions", {**CHAT, **change})
    error = response.json()["error"]
    assert response.status_code == 400 and error["type"] == "invalid_request_error"
    assert words in error["message"]
    if param is not None:
        assert error["param"] == param


def test_a_prompt_that_does_not_fit_is_refused_with_counts(server: Running) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.client().completions.create(model=MODEL, prompt="x" * 500, max_tokens=20)
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "prompt"
    assert "512 tokens" in caught.value.message and "500 plus 20" in caught.value.message


@pytest.mark.parametrize("prompt", ["", [], [[]], [0, 999], [0, -1]])
def test_an_impossible_prompt_is_400(server: Running, prompt: Any) -> None:
    response = post(server, "/v1/completions", {"model": MODEL, "prompt": prompt})
    assert response.status_code == 400 and response.json()["error"]["param"] == "prompt"


def test_an_unknown_model_is_404(server: Running) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        server.client().chat.completions.create(model="other", messages=HELLO)
    assert caught.value.code == "model_not_found" and MODEL in caught.value.message
    with pytest.raises(openai.NotFoundError):
        server.client().models.retrieve("other")


def test_unknown_paths_and_methods_keep_the_error_shape(server: Running) -> None:
    for response, status in [(httpx.get(f"{server.url}/v2/x"), 404), (httpx.get(f"{server.url}/v1/completions"), 405)]:
        assert response.status_code == status and set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_models_health_and_version(server: Running) -> None:
    assert [m.id for m in server.client().models.list()] == [MODEL]
    assert server.client().models.retrieve(MODEL).model_dump()["draft"] == "desk/3"
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert httpx.get(f"{server.url}/version").json() == {"version": __version__}


def test_keys_are_asked_for_only_under_v1() -> None:
    with serve_scripted(api_keys=["right", "also-right"]) as server:
        for key in ("right", "also-right"):
            assert server.client(key).models.list().data
        with pytest.raises(openai.AuthenticationError) as caught:
            server.client("wrong").chat.completions.create(model=MODEL, messages=HELLO)
        assert caught.value.code == "invalid_api_key"
        for headers in ({}, {"Authorization": "right"}, {"Authorization": "Basic right"}):
            response = httpx.get(f"{server.url}/v1/models", headers=headers)
            assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_metrics_add_up() -> None:
    with serve_scripted() as server:
        server.client().completions.create(model=MODEL, prompt="hello", max_tokens=7)
        text = httpx.get(f"{server.url}/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    label = f'{{model_name="{MODEL}"}}'
    expected = {
        f"vllm:spec_decode_num_drafts_total{label}": 3,
        f"vllm:spec_decode_num_draft_tokens_total{label}": 6,
        f"vllm:spec_decode_num_accepted_tokens_total{label}": 4,
        f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{model_name="{MODEL}",position="0"}}': 2,
        f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{model_name="{MODEL}",position="1"}}': 2,
        f"vllm:prompt_tokens_total{label}": 5,
        f"vllm:generation_tokens_total{label}": 7,
        f"vllm:num_requests_running{label}": 0,
        f"vllm:num_requests_waiting{label}": 0,
        f"vllm:kv_cache_usage_perc{label}": 0,
        f"vllm:time_to_first_token_seconds_count{label}": 1,
        f"vllm:inter_token_latency_seconds_count{label}": 4,
        f"vllm:e2e_request_latency_seconds_count{label}": 1,
        f"vllm:request_queue_time_seconds_count{label}": 1,
        f"draftline:mean_budget{label}": 2,
        f"draftline:step_seconds_count{label}": 3,
    }
    assert {name: float(values[name]) for name in expected} == expected
    assert float(values[f"draftline:accepted_length{label}"]) == pytest.approx(7 / 3)


def test_a_full_server_answers_429_and_recovers() -> None:
    engine = ScriptedEngine(max_running=1)
    engine.gate.clear()
    with serve_scripted(engine, max_waiting=1) as server:
        results: list[str] = []

        def ask() -> None:
            results.append(server.client().completions.create(model=MODEL, prompt="x", max_tokens=3).choices[0].text)

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        wait_until(lambda: server.service.worker._num_admitted == 2)
        response = post(server, "/v1/completions", {"model": MODEL, "prompt": "x"})
        assert response.status_code == 429 and int(response.headers["retry-after"]) >= 1
        assert response.json()["error"]["type"] == "rate_limit_error"
        with pytest.raises(openai.RateLimitError):
            server.client().completions.create(model=MODEL, prompt="x")
        engine.gate.set()
        for thread in threads:
            thread.join(10)
        assert results == ["abc", "abc"]
        assert server.client().completions.create(model=MODEL, prompt="x", max_tokens=3).choices[0].text == "abc"


@pytest.mark.slow
def test_a_full_server_says_how_long_by_what_it_measured() -> None:
    """Answers of 100 tokens at 3 tokens a step of 0.05 s: a place every 1.7 s, so 2, 4, 5 s."""
    with serve_scripted(ScriptedEngine(max_running=1, step_s=0.05, max_context=10_000), max_waiting=0) as server:
        server.client().completions.create(model=MODEL, prompt="x", max_tokens=100)
        with server.client().completions.create(model=MODEL, prompt="x", max_tokens=9000, stream=True) as stream:
            next(iter(stream))
            refused = [post(server, "/v1/completions", {"model": MODEL, "prompt": "x"}) for _ in range(3)]
    waits = [int(response.headers["retry-after"]) for response in refused]
    assert waits == sorted(waits) and 2 <= waits[0] < waits[2] <= 12
    assert f"about {waits[0]} s" in refused[0].json()["error"]["message"]


def test_a_full_server_answers_before_it_tokenises() -> None:
    engine = ScriptedEngine(max_running=1)
    engine.gate.clear()
    with serve_scripted(engine, max_waiting=0) as server:
        first = threading.Thread(target=post, args=(server, "/v1/completions", {"model": MODEL, "prompt": "x"}))
        first.start()
        wait_until(lambda: server.service.worker._num_admitted == 1)
        encoded: list[str] = []
        server.service.text.encode = encoded.append  # type: ignore[method-assign,assignment]
        response = post(server, "/v1/completions", {"model": MODEL, "prompt": "y"})
        assert response.status_code == 429 and encoded == []
        engine.gate.set()
        first.join(10)


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenised(server: Running) -> None:
    chars = server.engine.max_context * server.service.text.max_token_chars + 1
    chat = [{"role": "user", "content": "x" * (chars - 1)}, {"role": "user", "content": "x"}]
    for path, part in (("/v1/completions", {"prompt": "x" * chars}), ("/v1/chat/completions", {"messages": chat})):
        error = post(server, path, {"model": MODEL, **part}).json()["error"]
        assert error["code"] == "context_length_exceeded" and f"the request has {chars}" in error["message"]


def test_a_target_without_a_template_is_the_clients_error() -> None:
    with serve_scripted() as server:

        def refuse(messages: object) -> list[int]:
            raise TargetError("this target has no chat template", remedy="Use /v1/completions")

        server.service.text.encode_chat = refuse  # type: ignore[method-assign]
        response = post(server, "/v1/chat/completions", {"model": MODEL, "messages": HELLO})
        assert response.status_code == 400 and "/v1/completions" in response.json()["error"]["message"]


def test_the_openapi_document_has_all_it_refers_to(server: Running) -> None:
    document = httpx.get(f"{server.url}/openapi.json").json()
    found = set(re.findall(r'"\$ref": "([^"]+)"', json.dumps(document)))
    assert "#/components/schemas/Message" in found
    for reference in found:
        node = document
        for part in reference.removeprefix("#/").split("/"):
            node = node[part]
    assert {"400", "401", "429", "503"} <= document["paths"]["/v1/completions"]["post"]["responses"].keys()


@pytest.mark.parametrize(
    "field",
    [
        {"prompt": [1] * 200_000 + [None]},
        {"stop": [1] * 200_000},
        {f"unknown{number}": 1 for number in range(50_000)},
        {"messages": [{"role": "user", "content": [0] * 200_000}]},
    ],
)
def test_a_million_faults_make_one_error(field: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(
        "serving.api.from_validation", lambda error: (seen.append(error.error_count()), from_validation(error))[1]
    )
    with serve_scripted() as server:
        path = "/v1/chat/completions" if "messages" in field else "/v1/completions"
        response = post(
            server, path, {"model": MODEL, **({"prompt": "x"} if path.endswith("v1/completions") else {}), **field}
        )
    assert response.status_code == 400 and seen and seen[0] < 10


def test_more_choices_than_the_server_holds_is_400_not_429() -> None:
    with serve_scripted(ScriptedEngine(max_running=1), max_waiting=1) as server:
        response = post(server, "/v1/completions", {"model": MODEL, "prompt": "x", "n": 3})
        assert response.status_code == 400 and "3 sequences" in response.json()["error"]["message"]


def test_an_engine_crash_ends_streams_with_an_error_and_health_with_503() -> None:
    engine = ScriptedEngine(max_context=100_000, step_s=0.002)
    with serve_scripted(engine) as server:
        stream = iter(server.client().completions.create(model=MODEL, prompt="x", max_tokens=50_000, stream=True))
        next(stream)
        engine.crash = ValueError("nan in the logits of somebody else's prompt")
        with pytest.raises(openai.APIError) as caught:
            list(stream)
        assert "engine failed" in caught.value.message.lower() and "somebody" not in caught.value.message
        health = httpx.get(f"{server.url}/health")
        assert health.status_code == 503 and "ValueError" in health.json()["error"]["message"]
        with pytest.raises(openai.InternalServerError) as refused:
            server.client().completions.create(model=MODEL, prompt="x")
        assert refused.value.status_code == 503 and "retry-after" in refused.value.response.headers


def test_a_crash_before_the_first_token_is_a_500() -> None:
    engine = ScriptedEngine()
    engine.crash = ValueError("broken")
    with serve_scripted(engine) as server:
        response = post(server, "/v1/completions", {"model": MODEL, "prompt": "x"})
        assert response.status_code == 500 and response.json()["error"]["code"] == "engine_error"
