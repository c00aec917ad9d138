"""The checks that run inside a cluster: against a real S3 server, and against servers that fail where they must."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from pipelines import cluster_checks
from pipelines.cluster_checks import RAYJOB_RIGHTS, app
from tests.servers.s3 import S3Server

Answer = Callable[[str, dict[str, Any], dict[str, str]], tuple[int, dict[str, Any]]]


@contextmanager
def server(answer: Answer) -> Iterator[str]:
    """An HTTP server whose every answer is made by a function of path, body and headers."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self._answer()

        def _answer(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
            status, document = answer(self.path, body, dict(self.headers))
            data = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{httpd.server_port}"
        finally:
            httpd.shutdown()
            thread.join()


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_checks, "_RETRY_S", 0.01)


def test_storage_is_created_and_proved(moto_s3: S3Server) -> None:
    result = run("storage", "s3://made-by-the-chart/workspace", "--create", "--wait", "5")
    assert result.exit_code == 0, result.output
    assert "creates an object only where none is" in result.output


def test_storage_that_is_not_there_fails_with_the_reason(moto_s3: S3Server) -> None:
    result = run("storage", "s3://nobody-made-this/workspace", "--wait", "0")
    assert isinstance(result.exception, cluster_checks._Failed)
    assert "nobody-made-this" in str(result.exception)


def test_mlflow_answers_with_its_database(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "t")
    seen: list[str | None] = []

    def answer(path: str, body: dict[str, Any], headers: dict[str, str]) -> tuple[int, dict[str, Any]]:
        seen.append(headers.get("Authorization"))
        return (200, {"experiments": [{}]}) if path != "/health" or len(seen) > 2 else (503, {})

    with server(answer) as url:
        result = run("mlflow", url, "--wait", "5")
    assert result.exit_code == 0, result.output
    assert result.output.count("not yet: ") == 2 and "is healthy" in result.output
    assert seen[-1] == "Bearer t"


def test_an_endpoint_that_completes_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRAFTLINE_API_KEYS", "first\nsecond\n")
    seen: list[tuple[str, dict[str, Any], str | None]] = []

    def answer(path: str, body: dict[str, Any], headers: dict[str, str]) -> tuple[int, dict[str, Any]]:
        seen.append((path, body, headers.get("Authorization")))
        return 200, {"usage": {"prompt_tokens": 1, "completion_tokens": 8}}

    with server(answer) as url:
        result = run("serving", url, "--model", "m")
    assert result.exit_code == 0, result.output
    ((path, body, authorization),) = seen
    assert (path, body["model"], authorization) == ("/v1/completions", "m", "Bearer first")


@pytest.mark.parametrize(
    ("status", "document", "reason"),
    [
        (401, {"error": "key"}, "refuses"),
        (200, {"usage": {"prompt_tokens": 1, "completion_tokens": 0}}, "without a token"),
    ],
)
def test_an_endpoint_that_does_not_fails_at_once(status: int, document: dict[str, Any], reason: str) -> None:
    asked = []
    with server(lambda path, body, headers: (asked.append(path) or status, document)) as url:
        result = run("serving", url, "--model", "m", "--wait", "30")
    assert isinstance(result.exception, cluster_checks._Failed) and reason in str(result.exception)
    assert len(asked) == 1


def test_an_endpoint_that_never_comes_up_fails_when_the_time_is_over() -> None:
    with server(lambda path, body, headers: (404, {})) as url:
        result = run("serving", url, "--model", "m", "--wait", "1")
    assert isinstance(result.exception, cluster_checks._Failed)
    assert result.output.count("not yet: ") >= 2


@pytest.mark.parametrize("refused", [None, "pods/log"])
def test_permissions_are_asked_for_one_by_one(
    refused: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str, str]] = []

    def answer(path: str, body: dict[str, Any], headers: dict[str, str]) -> tuple[int, dict[str, Any]]:
        assert path == "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
        wanted = body["spec"]["resourceAttributes"]
        resource = "/".join(filter(None, (wanted["resource"], wanted.get("subresource"))))
        asked.append((wanted["group"], resource, wanted["verb"]))
        assert wanted["namespace"] == "ml"
        return 201, {**body, "status": {"allowed": resource != refused}}

    with server(answer) as url:
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "c",
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            "clusters": [{"name": "c", "cluster": {"server": url}}],
            "users": [{"name": "u", "user": {"token": "t"}}],
        }
        (tmp_path / "config").write_text(yaml.safe_dump(config))
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
        monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
        result = run("permissions", "ml")
    assert asked == list(RAYJOB_RIGHTS)
    if refused is None:
        assert result.exit_code == 0, result.output
    else:
        assert isinstance(result.exception, cluster_checks._Failed)
        assert "no right to get pods/log" in str(result.exception)
