"""The deploy step beside an endpoint that follows the champion by itself, over real HTTP."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from components.cluster.api import NAMESPACE_ENV
from components.deploy.step import ENDPOINT_ENV, run, wait_for_draft
from draftline.errors import PlatformError
from draftline.spec import RunSpec
from draftline.steps import StepContext, StepResult
from draftline.storage import open_store


@contextmanager
def endpoint(*answers: tuple[int, Any]) -> Iterator[str]:
    """Answers one after the other; the last one stays."""
    left = list(answers)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            """Nothing."""

        def do_GET(self) -> None:
            status, document = left.pop(0) if len(left) > 1 else left[0]
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()
            self.wfile.write(json.dumps(document).encode())

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def context(tmp_path: Path, *, passed: bool = True) -> StepContext:
    register = StepResult("register", "r" * 20, outputs={"model_name": "desk", "version": "3"})
    gate = StepResult("gate", "g" * 20, outputs={"passed": passed, "reasons": []})
    store = open_store(str(tmp_path), create=True)
    return StepContext("deploy", "d" * 20, RunSpec(), store, {"register": register, "gate": gate})


def test_waits_until_the_endpoint_uses_the_draft(tmp_path: Path) -> None:
    with endpoint(
        (503, {}), (200, "no"), (200, {"draft": None}), (200, {"draft": "desk/2"}), (200, {"draft": "desk/3"})
    ) as url:
        output = wait_for_draft(context(tmp_path), url, look_every_s=0.01)
    assert output.outputs["deployed"] is True and output.outputs["draft"] == "desk/3"
    assert output.outputs["endpoint"] == f"{url}/v1"


def test_an_endpoint_that_keeps_its_draft_fails_the_step(tmp_path: Path) -> None:
    with endpoint((200, {"draft": "desk/2"})) as url:
        with pytest.raises(PlatformError, match=r"does not take the draft desk/3; got the draft in use is desk/2"):
            wait_for_draft(context(tmp_path), url, within_s=0.1, look_every_s=0.02)
    with pytest.raises(PlatformError, match="no answer"):
        wait_for_draft(context(tmp_path), url, within_s=0.1, look_every_s=0.02)


def test_the_environment_says_how_to_deploy(tmp_path: Path) -> None:
    with endpoint((200, {"draft": "desk/3"})) as url:
        assert run(context(tmp_path), {ENDPOINT_ENV: f"{url}/", NAMESPACE_ENV: "ml"}).outputs["deployed"] is True
        assert run(context(tmp_path, passed=False), {ENDPOINT_ENV: url}).outputs["deployed"] is False
    assert "serving.draft.uri" in str(run(context(tmp_path), {NAMESPACE_ENV: "ml"}).outputs["reason"])
