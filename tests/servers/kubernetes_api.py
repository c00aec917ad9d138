"""A small Kubernetes API server over real HTTP: custom objects, watches, pods and their logs, and faults on demand.

It knows what steps ask for and nothing else. :class:`FakeKubeRay` plays the
operator: it runs the entry point of a RayJob as a process of this machine.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

CUSTOM = re.compile(
    r"/apis/(?P<group>[^/]+)/v1/namespaces/(?P<namespace>[^/]+)/(?P<plural>[a-z]+)(?:/(?P<name>[^/]+))?"
)
POD = re.compile(r"/api/v1/namespaces/(?P<namespace>[^/]+)/pods(?:/(?P<name>[^/]+))?(?P<log>/log)?")


class FakeKubernetes:
    """The server; a context manager.

    Attributes:
        requests: ``METHOD path`` of every request, in order.
        faults: Called with method and path; a status code fails the request, ``0`` drops the connection.
        after_create: Called with each created object, in a thread of its own.
    """

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.faults: Callable[[str, str], int | None] = lambda method, path: None
        self.after_create: Callable[[dict[str, Any]], None] | None = None
        self._changed = threading.Condition()
        self._objects: dict[tuple[str, str], dict[str, Any]] = {}
        self._history: list[tuple[str, str, dict[str, Any]]] = []
        self._logs: dict[str, list[str]] = {}
        self._pods: dict[str, dict[str, Any]] = {}
        self._cut_logs: dict[str, int] = {}
        self._version = 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True

    def __enter__(self) -> FakeKubernetes:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def count(self, method: str) -> int:
        return sum(request.startswith(f"{method} ") for request in self.requests)

    def get(self, plural: str, name: str) -> dict[str, Any] | None:
        with self._changed:
            return copy.deepcopy(self._objects.get((plural, name)))

    def put(self, plural: str, document: Mapping[str, Any]) -> None:
        """Create or replace an object, as an operator or another client would."""
        with self._changed:
            key = (plural, document["metadata"]["name"])
            self._store("MODIFIED" if key in self._objects else "ADDED", plural, copy.deepcopy(dict(document)))

    def set_status(self, plural: str, name: str, **status: Any) -> None:
        with self._changed:
            if (plural, name) in self._objects:
                document = copy.deepcopy(self._objects[plural, name])
                document["status"] = {**document.get("status", {}), **status}
                self._store("MODIFIED", plural, document)

    def remove(self, plural: str, name: str) -> bool:
        with self._changed:
            document = self._objects.pop((plural, name), None)
            if document is not None:
                self._history.append(("DELETED", plural, document))
                self._changed.notify_all()
            return document is not None

    def add_pod(self, name: str, labels: Mapping[str, str], phase: str = "Running", **spec: Any) -> None:
        with self._changed:
            self._pods[name] = {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {
                    "name": name,
                    "labels": dict(labels),
                    "creationTimestamp": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
                },
                "spec": {"containers": [], **spec},
                "status": {"phase": phase},
            }
            self._logs.setdefault(name, [])

    def write_log(self, pod: str, line: str) -> None:
        with self._changed:
            now = datetime.now(UTC)
            self._logs[pod].append(f"{now:%Y-%m-%dT%H:%M:%S}.{now.microsecond:06d}{len(self._logs[pod]):03d}Z {line}")
            self._changed.notify_all()

    def end_pod(self, pod: str, phase: str = "Succeeded") -> None:
        with self._changed:
            self._pods[pod]["status"]["phase"] = phase
            self._changed.notify_all()

    def cut_log_after(self, pod: str, lines: int) -> None:
        """Break the next reading of a log off after some lines."""
        self._cut_logs[pod] = lines

    def _store(self, kind: str, plural: str, document: dict[str, Any]) -> dict[str, Any]:
        self._version += 1
        document["metadata"]["resourceVersion"] = str(self._version)
        self._objects[plural, document["metadata"]["name"]] = document
        self._history.append((kind, plural, copy.deepcopy(document)))
        self._changed.notify_all()
        return document


def _handler(fake: FakeKubernetes) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            """Requests are kept, not printed."""

        def _serve(self) -> None:
            url = urlsplit(self.path)
            fake.requests.append(f"{self.command} {url.path}")
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            fault = fake.faults(self.command, url.path)
            if fault == 0:
                self.close_connection = True
                self.connection.close()
            elif fault is not None:
                self._answer(fault, _status(fault, "injected"))
            elif (custom := CUSTOM.fullmatch(url.path)) is not None:
                self._custom(custom["plural"], custom["name"], parse_qs(url.query), body)
            elif (pod := POD.fullmatch(url.path)) is not None:
                self._pod(pod["name"], bool(pod["log"]), parse_qs(url.query))
            else:
                self._answer(404, _status(404, f"no route {url.path}"))

        do_GET = do_POST = do_DELETE = _serve

        def _custom(self, plural: str, name: str | None, query: dict[str, list[str]], body: Any) -> None:
            if name is None and self.command == "GET":
                self._watch(plural, query) if query.get("watch") else self._answer(400, _status(400, "watch only"))
                return
            if self.command == "POST":
                with fake._changed:
                    if (plural, body["metadata"]["name"]) in fake._objects:
                        self._answer(409, _status(409, "already exists"))
                        return
                    stored = copy.deepcopy(fake._store("ADDED", plural, body))
                self._answer(201, stored)
                if fake.after_create is not None:
                    threading.Thread(target=fake.after_create, args=(stored,), daemon=True).start()
                return
            assert name is not None
            found = fake.get(plural, name)
            if found is None:
                self._answer(404, _status(404, f'{plural} "{name}" not found'))
            elif self.command == "GET":
                self._answer(200, found)
            else:
                fake.remove(plural, name)
                self._answer(200, _status(200, "deleted"))

        def _watch(self, plural: str, query: dict[str, list[str]]) -> None:
            name = query["fieldSelector"][0].removeprefix("metadata.name=")
            until_s = time.monotonic() + float(query.get("timeoutSeconds", ["30"])[0])
            self._begin_chunks()
            with fake._changed:
                seen = len(fake._history)
                current = copy.deepcopy(fake._objects.get((plural, name)))
            if current is not None:
                self._chunk(json.dumps({"type": "ADDED", "object": current}) + "\n")
            while time.monotonic() < until_s:
                with fake._changed:
                    if len(fake._history) == seen:
                        fake._changed.wait(timeout=0.2)
                    fresh, seen = fake._history[seen:], len(fake._history)
                for kind, of, document in fresh:
                    is_wanted = of == plural and document["metadata"]["name"] == name
                    if is_wanted and not self._chunk(json.dumps({"type": kind, "object": document}) + "\n"):
                        return
            self._chunk("")

        def _pod(self, name: str | None, is_log: bool, query: dict[str, list[str]]) -> None:
            if name is None:
                wanted = dict(part.split("=") for part in query["labelSelector"][0].split(","))
                found = [p for p in fake._pods.values() if wanted.items() <= p["metadata"]["labels"].items()]
                self._answer(200, {"apiVersion": "v1", "kind": "PodList", "metadata": {}, "items": found})
            elif name not in fake._pods:
                self._answer(404, _status(404, f'pods "{name}" not found'))
            elif not is_log:
                self._answer(200, fake._pods[name])
            else:
                self._log(name)

        def _log(self, name: str) -> None:
            self._begin_chunks()
            num_sent = 0
            cut = fake._cut_logs.pop(name, None)
            while True:
                with fake._changed:
                    is_over = fake._pods[name]["status"]["phase"] != "Running"
                    lines = fake._logs[name][num_sent:]
                    if not lines and not is_over:
                        fake._changed.wait(timeout=0.2)
                for line in lines:
                    if cut is not None and num_sent >= cut:
                        self.close_connection = True
                        self.connection.close()
                        return
                    num_sent += 1
                    if not self._chunk(line + "\n"):
                        return
                if is_over and not lines:
                    break
            self._chunk("")

        def _answer(self, status: int, document: Mapping[str, Any]) -> None:
            data = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _begin_chunks(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()

        def _chunk(self, text: str) -> bool:
            data = text.encode()
            try:
                self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
                self.wfile.flush()
            except (OSError, ValueError):
                self.close_connection = True
                return False
            return True

    return Handler


class FakeKubeRay:
    """KubeRay's operator: gives each new RayJob a submitter pod, runs its entry point, and sets its status.

    Args:
        fake: The API server.
        environment: Beside the variables with plain values in the manifest.
    """

    def __init__(self, fake: FakeKubernetes, environment: Mapping[str, str]) -> None:
        self._fake = fake
        self._environment = environment
        self.num_jobs = 0
        fake.after_create = self.run

    def run(self, job: dict[str, Any]) -> None:
        name, number = job["metadata"]["name"], self.num_jobs
        self.num_jobs += 1
        pod = f"{name}-{number}"
        self._fake.set_status("rayjobs", name, jobDeploymentStatus="Initializing")
        self._fake.add_pod(pod, {"job-name": name})
        self._fake.set_status("rayjobs", name, jobDeploymentStatus="Running", jobStatus="RUNNING")
        container = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
        plain = {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}
        command = [sys.executable, *shlex.split(job["spec"]["entrypoint"])[1:]]
        process = subprocess.Popen(
            command, env={**os.environ, **plain, **self._environment, "FAKE_ATTEMPT": str(number)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            self._fake.write_log(pod, line.rstrip("\n"))
        process.stdout.close()
        is_good = process.wait() == 0
        self._fake.end_pod(pod, "Succeeded" if is_good else "Failed")
        self._fake.set_status(
            "rayjobs", name,
            jobStatus="SUCCEEDED" if is_good else "FAILED",
            jobDeploymentStatus="Complete" if is_good else "Failed",
            reason="" if is_good else "AppFailed",
            message="" if is_good else f"exit code {process.returncode}",
        )  # fmt: skip


def _status(code: int, message: str) -> dict[str, Any]:
    return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message, "code": code}
