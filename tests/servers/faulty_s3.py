"""A tiny S3 that misbehaves on command: statuses, resets, half bodies, slow ones, silence.

With an upstream it keeps nothing itself: it is a misbehaving proxy in front of
another S3 server.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import parse_qs, urlsplit

_HOP_BY_HOP = frozenset({"connection", "content-length", "date", "keep-alive", "server", "transfer-encoding"})
_SLOW_PIECES = 8


@dataclass(frozen=True)
class Fault:
    """What happens to one request.

    Attributes:
        kind: ``status`` answers an error; ``reset`` drops the connection
            unread; ``lost_answer`` carries the request out, then drops the
            connection; ``cut_body`` answers with half the body, then drops it;
            ``slow`` sends the body in a few pieces with pauses between them;
            ``hang`` is silent until the server stops.
        status: HTTP status of ``status``.
        code: S3 error code of ``status``.
        pause_s: Between two pieces of ``slow``.
    """

    kind: Literal["status", "reset", "lost_answer", "cut_body", "slow", "hang"]
    status: int = 0
    code: str = ""
    pause_s: float = 0.05


@dataclass
class FaultyS3:
    """The server's state, shared with the test.

    Attributes:
        endpoint_url: Where it listens.
        upstream: Endpoint of the server behind this one; empty where this one keeps the objects.
        faults: For the next requests, one each.
        always: For every request after those.
        chosen: For requests by method, path and query; asked before all others.
        ignores_conditions: Whether ``If-None-Match`` means nothing to it.
        objects: Stored bodies and ``x-amz-meta-*`` headers by path.
        uploads: Parts of the multipart uploads under way, by their id.
        requests: Method and path of each request, in order.
    """

    endpoint_url: str = ""
    upstream: str = ""
    faults: deque[Fault] = field(default_factory=deque)
    always: Fault | None = None
    chosen: Callable[[str, str, str], Fault | None] = lambda method, path, query: None
    ignores_conditions: bool = False
    objects: dict[str, tuple[bytes, dict[str, str]]] = field(default_factory=dict)
    uploads: dict[str, dict[int, bytes]] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    stopped: threading.Event = field(default_factory=threading.Event)

    def next_fault(self, method: str, path: str, query: str) -> Fault | None:
        """Record a request and say what happens to it."""
        with self.lock:
            self.requests.append((method, path))
            if (chosen := self.chosen(method, path, query)) is not None:
                return chosen
            return self.faults.popleft() if self.faults else self.always


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: FaultyS3

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def _serve(self) -> None:
        path, _, query = self.path.partition("?")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.state.next_fault(self.command, path, query)
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
        elif fault.kind == "slow":
            self._answer(*self._carry_out(path, body), pause_s=fault.pause_s)
        else:
            status, content, headers = self._carry_out(path, body)
            if fault.kind == "cut_body":
                self._answer(status, content, headers, sent_bytes=len(content) // 2)
            self._reset()

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _serve

    def _carry_out(self, path: str, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        if self.state.upstream:
            return self._forward(body)
        objects = self.state.objects
        query = parse_qs(urlsplit(self.path).query, keep_blank_values=True)
        with self.state.lock:
            if "uploads" in query or "uploadId" in query:
                return self._multipart(path, query, body)
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
            return 200, content, {"ETag": '"0"', "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT", **meta}

    def _multipart(self, path: str, query: dict[str, list[str]], body: bytes) -> tuple[int, bytes, dict[str, str]]:
        uploads = self.state.uploads
        if self.command == "POST" and "uploads" in query:
            upload_id = f"upload-{len(self.state.requests)}"
            uploads[upload_id] = {}
            text = f"<InitiateMultipartUploadResult><UploadId>{upload_id}</UploadId></InitiateMultipartUploadResult>"
            return 200, text.encode(), {}
        upload_id = query["uploadId"][0]
        if upload_id not in uploads:
            return 404, b"<Error><Code>NoSuchUpload</Code></Error>", {}
        if self.command == "PUT":
            number = int(query["partNumber"][0])
            uploads[upload_id][number] = body
            return 200, b"", {"ETag": f'"{number}"'}
        parts = uploads.pop(upload_id)
        if self.command == "DELETE":
            return 204, b"", {}
        self.state.objects[path] = (b"".join(parts[number] for number in sorted(parts)), {})
        return 200, b"<CompleteMultipartUploadResult><ETag>0</ETag></CompleteMultipartUploadResult>", {}

    def _forward(self, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        """What the upstream answers to the request as it came: a signature covers its ``Host``."""
        place = urlsplit(self.state.upstream)
        connection = HTTPConnection(place.hostname or "", place.port, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                # The body is here already: whoever waits to be told to send it would wait for ever.
                if name.lower() not in ("expect", "connection"):
                    connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            headers = {name: value for name, value in answer.getheaders() if name.lower() not in _HOP_BY_HOP}
            if self.command == "HEAD":
                headers["Content-Length"] = answer.getheader("Content-Length", "0")
            return answer.status, answer.read(), headers
        finally:
            connection.close()

    def _answer(
        self,
        status: int,
        content: bytes,
        headers: dict[str, str],
        sent_bytes: int | None = None,
        pause_s: float = 0.0,
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if not pause_s:
            self.wfile.write(content[:sent_bytes])
            return
        piece = max(1, -(-len(content) // _SLOW_PIECES))
        for start in range(0, len(content), piece):
            time.sleep(pause_s)
            self.wfile.write(content[start : start + piece])

    def _reset(self) -> None:
        """Close with a TCP reset instead of a polite end."""
        self.close_connection = True
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


@contextmanager
def running_faulty_s3(upstream: str = "") -> Iterator[FaultyS3]:
    """Serve until the block ends; with an upstream, what comes from there."""
    state = FaultyS3(upstream=upstream)
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
