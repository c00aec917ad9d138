"""What a session says at its end: the streamed answer, the addresses, a refusal."""

from __future__ import annotations

import io
import json
import shlex
import signal
import socket
from pathlib import Path

import pytest
from rich.console import Console

from draftline.errors import PlatformError, StepError
from draftline.spec import RunSpec
from draftline.steps import StepResult
from draftline.target.allocator import ALLOCATOR_ENV
from pipelines.embedded.platform import Platform
from pipelines.session import (
    DEMO_QUESTION,
    SessionOptions,
    curl_line,
    print_addresses,
    require_deployed,
    running_platform,
    serve_until_interrupted,
    step_environment,
    stream_answer,
)
from tests.serving.scripted_engine import END_OF_TEXT, ScriptedEngine
from tests.serving.servers import MODEL, serve_scripted


def deployed(url: str) -> StepResult:
    return StepResult("deploy", "d", outputs={"endpoint": f"{url}/v1", "model": MODEL, "app": "draftline"})


def recording() -> tuple[Console, io.StringIO]:
    output = io.StringIO()
    return Console(file=output, width=200), output


@pytest.fixture
def described(tmp_path: Path) -> Platform:
    """The description of a platform; nothing runs."""
    return Platform(
        home=tmp_path, mlflow_uri="http://127.0.0.1:5000", ray_address="127.0.0.1:6379",
        ray_client_env={"RAY_ADDRESS": "127.0.0.1:6379"}, logs_dir=tmp_path / "logs", serve_port=8123,
        dashboard_url=None, pids={}, is_reused=False,
    )  # fmt: skip


def test_the_answer_is_streamed_by_the_openai_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with a proxy in the environment, which would swallow a request to loopback."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    seen: list[int] = []

    def script(request: object) -> list[int]:
        seen.append(1)
        return [*b"[b]Sorry[/b] to hear that.", END_OF_TEXT]

    console, output = recording()
    with serve_scripted(ScriptedEngine(script, max_context=8192)) as server:
        stream_answer(RunSpec(), deployed(server.url), console)
    assert output.getvalue() == f"\nYou  {DEMO_QUESTION}\n{MODEL}  [b]Sorry[/b] to hear that.\n"
    assert seen == [1]


def test_an_empty_answer_is_an_error() -> None:
    console, _ = recording()
    with (
        serve_scripted(ScriptedEngine(lambda _: [END_OF_TEXT], max_context=8192)) as server,
        pytest.raises(PlatformError, match="empty answer"),
    ):
        stream_answer(RunSpec(), deployed(server.url), console)


@pytest.mark.slow
def test_a_dead_endpoint_is_an_error() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    console, _ = recording()
    with pytest.raises(PlatformError, match=f"the endpoint {url}/v1 did not answer"):
        stream_answer(RunSpec(), deployed(url), console)


def test_the_curl_line_survives_a_shell() -> None:
    words = shlex.split(curl_line("http://127.0.0.1:8000/v1", "it's"))
    assert words[:3] == ["curl", "-N", "http://127.0.0.1:8000/v1/chat/completions"]
    body = json.loads(words[-1])
    assert body["model"] == "it's" and body["stream"] is True


def test_addresses(described: Platform) -> None:
    console, output = recording()
    print_addresses(described, deployed("http://127.0.0.1:8123"), console)
    text = output.getvalue()
    assert "MLflow    http://127.0.0.1:5000\n" in text
    assert f"Endpoint  http://127.0.0.1:8123/v1  (OpenAI API, model {MODEL})\n" in text
    assert "\nTry it:\ncurl -N http://127.0.0.1:8123/v1/chat/completions" in text
    console, output = recording()
    print_addresses(described, None, console)
    assert "Endpoint" not in output.getvalue() and "curl" not in output.getvalue()


def test_a_demo_whose_draft_was_refused_fails_with_the_reasons() -> None:
    reasons = [
        {"rule": "min_speedup", "ok": False, "got": 0.9, "needs": ">= 1.0"},
        {"rule": "max_ece", "ok": True, "got": 0.1, "needs": "<= 0.15"},
    ]
    refusing = {"gate": StepResult("gate", "g", outputs={"passed": False, "reasons": reasons})}
    with pytest.raises(StepError, match=r"got min_speedup is 0.9, needs >= 1.0\."):
        require_deployed(refusing)
    require_deployed({"deploy": deployed("http://127.0.0.1:1")})


def test_steps_get_the_platform_and_the_allocator(described: Platform) -> None:
    environment = step_environment(described)
    assert environment["RAY_ADDRESS"] == "127.0.0.1:6379"
    assert environment["DRAFTLINE_SERVE_PORT"] == "8123"
    assert environment.items() >= ALLOCATOR_ENV.items()


def test_a_platform_that_cannot_start_is_an_error(tmp_path: Path) -> None:
    console, _ = recording()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        options = SessionOptions(tmp_path, serve_port=listener.getsockname()[1])
        with pytest.raises(PlatformError, match="port is taken"), running_platform(options, console):
            pytest.fail("the platform must not start")


@pytest.mark.slow
def test_serving_ends_with_an_interrupt(platform: Platform) -> None:
    console, output = recording()

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        serve_until_interrupted(platform, console)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, previous)
    assert output.getvalue().strip() == "Serving until Ctrl-C."


def test_serving_ends_when_a_service_does(described: Platform) -> None:
    console, _ = recording()
    with pytest.raises(PlatformError, match="mlflow ended by itself"):
        serve_until_interrupted(described, console)
