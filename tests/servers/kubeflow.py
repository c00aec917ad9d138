"""A small Kubeflow Pipelines API server over real HTTP: the v2beta1 routes that kfp's client calls."""

from __future__ import annotations

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

ROOT = "/apis/v2beta1"
VERSIONS = re.compile(r"/pipelines/(?P<pipeline>[^/]+)/versions")


class FakeKubeflow:
    """The server; a context manager.

    Attributes:
        requests: Method and path of each request, in order.
        pipelines, versions, experiments, runs, recurring: What was made, oldest first.
        uploads: Bodies of uploads.
        states: Bodies that the next questions for a run are answered with; an int is a status. The last one stays.
        token: Asked for in every request when set.
    """

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.pipelines: list[dict[str, Any]] = []
        self.versions: list[dict[str, Any]] = []
        self.experiments: list[dict[str, Any]] = []
        self.runs: list[dict[str, Any]] = []
        self.recurring: list[dict[str, Any]] = []
        self.uploads: list[bytes] = []
        self.states: list[dict[str, Any] | int] = [{"state": "SUCCEEDED"}]
        self.token = ""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True

    def __enter__(self) -> FakeKubeflow:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def answer(self, method: str, path: str, query: dict[str, list[str]], body: bytes) -> tuple[int, Any]:
        """Status and document for one request."""
        if path == "/healthz":
            return 200, {"multi_user": False}
        if path == "/pipelines/upload":
            self.uploads.append(body)
            self.pipelines.append({"pipeline_id": f"p{len(self.pipelines)}", "display_name": query["name"][0]})
            return 200, self.pipelines[-1]
        if path == "/pipelines/upload_version":
            self.uploads.append(body)
            pipeline = query["pipelineid"][0]
            made = {"pipeline_id": pipeline, "display_name": query["name"][0]}
            self.versions.append({**made, "pipeline_version_id": f"v{len(self.versions)}"})
            return 200, self.versions[-1]
        if path == "/pipelines":
            return 200, {"pipelines": _named(self.pipelines, query)}
        if found := VERSIONS.fullmatch(path):
            ours = [one for one in self.versions if one["pipeline_id"] == found["pipeline"]]
            return 200, {"pipeline_versions": _named(ours, query)}
        return self._answer_runs(method, path, query, body)

    def _answer_runs(self, method: str, path: str, query: dict[str, list[str]], body: bytes) -> tuple[int, Any]:
        kind = path.split("/")[1]
        if method == "DELETE" and kind == "recurringruns":
            self.recurring = [one for one in self.recurring if one["recurring_run_id"] != path.split("/")[2]]
            return 200, {}
        kept = {"experiments": self.experiments, "runs": self.runs, "recurringruns": self.recurring}.get(kind)
        if kept is None:
            return 404, {"error": f"no route {path}"}
        if method == "POST":
            identity = {"experiments": "experiment_id", "runs": "run_id", "recurringruns": "recurring_run_id"}[kind]
            kept.append({**json.loads(body), identity: f"{kind[0]}{len(kept)}-{len(self.requests)}"})
            return 200, kept[-1]
        if path.count("/") == 2:
            state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
            if isinstance(state, int):
                return state, {"error": "injected"}
            return 200, {**self.runs[-1], **state}
        return 200, {"recurringRuns" if kind == "recurringruns" else kind: _named(kept, query)}


def _named(documents: list[dict[str, Any]], query: dict[str, list[str]]) -> list[dict[str, Any]]:
    if "filter" not in query:
        return documents
    (predicate,) = json.loads(query["filter"][0])["predicates"]
    wanted = predicate.get("stringValue") or predicate["string_value"]
    return [document for document in documents if document["display_name"] == wanted]


def _handler(fake: FakeKubeflow) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            """Requests are kept, not printed."""

        def _serve(self) -> None:
            url = urlsplit(self.path)
            fake.requests.append(f"{self.command} {url.path}")
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if fake.token and self.headers.get("Authorization") != f"Bearer {fake.token}":
                status, document = 401, {"error": "who are you"}
            else:
                path = url.path.removeprefix(ROOT)
                status, document = fake.answer(self.command, path, parse_qs(url.query), body)
            data = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_DELETE = _serve

    return Handler
