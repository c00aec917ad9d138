"""A tiny S3 that misbehaves on command: statuses, resets, half bodies, silence."""

from __future__ import annotations

import socket
import struct
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal


@dataclass(frozen=True)
class Fault:
    """What happens to one request.

    Attributes:
        kind: ``status`` answers an error; ``reset`` drops the connection
            unread; ``lost_answer`` carries the request out, then drops the
            connection; ``cut_body`` answers with half the body, then drops it;
            ``hang`` is silent until the server stops.
        status: HTTP status of ``status``.
        code: S3 error code of ``status``.
    """

    kind: Literal["status", "reset", "lost_answer", "cut_body", "hang"]
    status: int = 0
    code: str = ""


@dataclass
class FaultyS3:
    """The server's state, shared with the test.

    Attributes:
        endpoint_url: Where it listens.
        faults: For the next requests, one each.
        always: For every request after those.
        ignores_conditions: Whether ``If-None-Match`` means nothing to it.
        objects: Stored bodies and ``x-amz-meta-*`` headers by path.
        requests: Method and path of each request, in order.
    """

    endpoint_url: str = ""
    faults: deque[Fault] = field(default_factory=deque)
    always: Fault | None = None
    ignores_conditions: bool = False
    objects: dict[str, tuple[bytes, dict[str, str]]] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    stopped: threading.Event = field(default_factory=threading.Event)

    def next_fault(self, method: str, path: str) -> Fault | None:
        """Record a request and say what happens to it."""
        with self.lock:
            self.requests.append((method, path))
            return self.faults.popleft() if self.faults else self.always


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: FaultyS3

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def _serve(self) -> None:
        path = self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.state.next_fault(self.command, path)
        if fault is None:
            self._answer(*self._carry_out(path, body))
        elif fault.kind == "status":
            text = f"<Error><Code>{fault.code}</Code><Message>as told</Message></Error>"
            self._answer(fault.status, text.encode(), {})
        elif fault.kind == "hang":
            self.state.stopped.wait()
            self._reset()
        elif fault.kind == "reset":
            self._reset()
        else:
            status, content, headers = self._carry_out(path, body)
            if fault.kind == "cut_body":
                self._answer(status, content, headers, sent_bytes=len(content) // 2)
            self._reset()

    do_GET = do_PUT = do_HEAD = do_DELETE = _serve

    def _carry_out(self, path: str, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        objects = self.state.objects
        with self.state.lock:
            if self.command == "PUT":
                is_conditional = self.headers.get("If-None-Match") == "*" and not self.state.ignores_conditions
                if is_conditional and path in objects:
                    return 412, b"<Error><Code>PreconditionFailed</Code></Error>", {}
                meta = {name: value for name, value in self.headers.items() if name.lower().startswith("x-amz-meta-")}
                objects[path] = (body, meta)
                return 200, b"", {"ETag": '"0"'}
            if self.command == "DELETE":
                objects.pop(path, None)
                return 204, b"", {}
            if path not in objects:
                return 404, b"<Error><Code>NoSuchKey</Code></Error>", {}
            content, meta = objects[path]
            return 200, content, {"ETag": '"0"', **meta}

    def _answer(self, status: int, content: bytes, headers: dict[str, str], sent_bytes: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:sent_bytes])

    def _reset(self) -> None:
        """Close with a TCP reset instead of a polite end."""
        self.close_connection = True
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


@contextmanager
def running_faulty_s3() -> Iterator[FaultyS3]:
    """Serve until the block ends."""
    state = FaultyS3()
    handler = type("Handler", (_Handler,), {"state": state})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    # The threads of kept-alive connections end when the client's pool does, which may be later.
    server.daemon_threads = True
    server.block_on_close = False
    state.endpoint_url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), name="faulty-s3", daemon=True)
    thread.start()
    try:
        yield state
    finally:
        state.stopped.set()
        server.shutdown()
        thread.join()
        server.server_close()
