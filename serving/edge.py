"""What stands in front of the routes: bodies are bounded, and no answer breaks off without a word.

:class:`Edge` is plain ASGI. The application carries one, and Ray Serve's proxy
is given another (:func:`proxy_middlewares`): the proxy holds the client's
connection, so only there can a client still be told that the replica which
was answering has died, and only there does a body count before it is copied.
"""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import dataclass

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import (
    BodyTooLarge,
    HttpError,
    Overloaded,
    ReplicaLost,
    RequestTimeout,
    ServingError,
    UnsupportedMedia,
    plain_status,
    to_http,
)

logger = logging.getLogger(__name__)

POSTED = frozenset({"/v1/chat/completions", "/v1/completions"})
"""The routes with a body."""

EVENT_STREAM = b"text/event-stream"


@dataclass(frozen=True)
class BodyLimits:
    """How much of a request body is taken, and how long one waits for it.

    Attributes:
        max_bytes: Of one body.
        max_held_bytes: Of all bodies that are arriving.
        arrive_s: From the head of a request to the end of its body.
        discard_bytes: Of a body that is refused: this much is read and thrown away, because a client that
            is still sending when the connection closes never sees the answer.
        discard_s: The same as a time.
    """

    max_bytes: int = 32 * 1024 * 1024
    max_held_bytes: int = 256 * 1024 * 1024
    arrive_s: float = 30.0
    discard_bytes: int = 256 * 1024 * 1024
    discard_s: float = 10.0


class _Arriving:
    """A request body on its way.

    Attributes:
        is_more: Whether more of it may come.
        is_cut: Whether the client hung up before its end.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.is_more = True
        self.is_cut = False

    async def part(self) -> bytes:
        """The next part, empty when the client has hung up."""
        message = await self._receive()
        self.is_cut = message["type"] != "http.request"
        self.is_more = not self.is_cut and message.get("more_body", False)
        part: bytes = message.get("body", b"")
        return part

    async def discard(self, limits: BodyLimits) -> None:
        """Read on and keep nothing."""
        num_bytes = 0
        try:
            async with asyncio.timeout(limits.discard_s):
                while self.is_more and num_bytes <= limits.discard_bytes:
                    num_bytes += len(await self.part())
        except TimeoutError:
            return


def _asks_first(scope: Scope) -> bool:
    """Whether the client waits for ``100 Continue`` before it sends the body."""
    return any(name == b"expect" for name, _ in scope["headers"])


class Edge:
    """ASGI middleware; see the module.

    Args:
        app: What answers.
        limits: Of bodies.
    """

    def __init__(self, app: ASGIApp, limits: BodyLimits | None = None) -> None:
        self._app = app
        self._limits = limits or BodyLimits()
        self._held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or not _is_ours(scope["path"]):
            await self._app(scope, receive, send)
            return
        if scope["method"] != "POST" or scope["path"] not in POSTED:
            await _answer_fully(self._app, scope, receive, send)
            return
        arriving = _Arriving(receive)
        try:
            body = await self._take(scope, arriving)
        except ServingError as refusal:
            if not isinstance(refusal, RequestTimeout) and not _asks_first(scope):
                await arriving.discard(self._limits)
            await _send_error(send, to_http(refusal))
            return
        if body is not None:
            await _answer_fully(self._app, scope, _replay([body], receive), send)

    async def _take(self, scope: Scope, arriving: _Arriving) -> bytes | None:
        """The whole body, ``None`` from a client that hung up before its end."""
        headers = dict(scope["headers"])
        _check_media(headers)
        announced = headers.get(b"content-length", b"")
        if announced.isdigit() and int(announced) > self._limits.max_bytes:
            raise self._too_large()
        body = bytearray()
        try:
            async with asyncio.timeout(self._limits.arrive_s):
                while arriving.is_more:
                    part = await arriving.part()
                    if len(body) + len(part) > self._limits.max_bytes:
                        raise self._too_large()
                    if self._held_bytes + len(part) > self._limits.max_held_bytes:
                        raise Overloaded("Too many large requests are arriving at once; try again shortly")
                    body += part
                    self._held_bytes += len(part)
        except TimeoutError:
            raise RequestTimeout(
                f"The request body did not arrive within {self._limits.arrive_s:g} seconds; send it again"
            ) from None
        finally:
            self._held_bytes -= len(body)
        return None if arriving.is_cut else bytes(body)

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(f"The request body exceeds {self._limits.max_bytes} bytes")


def _is_ours(path: str) -> bool:
    return path.startswith("/v1/") or path == "/health"


def _check_media(headers: dict[bytes, bytes]) -> None:
    media = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    # Web pages may post anything but JSON to any address without asking, a server on loopback included.
    if media != b"application/json":
        raise UnsupportedMedia(
            f"The Content-Type {media.decode('latin-1')!r} is not supported. Send 'Content-Type: application/json'"
        )
    encoding = headers.get(b"content-encoding", b"identity").strip().lower()
    if encoding != b"identity":
        raise UnsupportedMedia(
            f"The Content-Encoding {encoding.decode('latin-1')!r} is not supported. Send the body as it is"
        )


def _replay(body: list[bytes], receive: Receive) -> Receive:
    """A ``receive`` that hands the body out once, forgets it, and then tells of a disconnect as the first did."""

    async def replay() -> Message:
        if not body:
            return await receive()
        return {"type": "http.request", "body": body.pop(), "more_body": False}

    return replay


class _Watched:
    """A ``send`` that knows how far the answer got, and puts foreign errors into OpenAI's shape."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._foreign_status = 0
        self._foreign_headers: dict[str, str] = {}
        self._foreign_text = bytearray()
        self.is_started = False
        self.is_complete = False
        self.is_event_stream = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.is_started = True
            headers = dict(message.get("headers", ()))
            media = headers.get(b"content-type", b"")
            self.is_event_stream = media.startswith(EVENT_STREAM)
            if message["status"] >= 400 and media.startswith(b"text/plain"):
                # The proxy's own words: no application, no replica, too many requests.
                self._foreign_status = message["status"]
                kept = ("retry-after", "allow")
                self._foreign_headers = {
                    name.decode(): value.decode("latin-1") for name, value in headers.items() if name.decode() in kept
                }
                return
        is_last = message["type"] == "http.response.body" and not message.get("more_body", False)
        if self._foreign_status:
            self._foreign_text += message.get("body", b"")
            if is_last:
                self.is_complete = True
                await _send_error(self._send, self._translated())
            return
        await self._send(message)
        self.is_complete = self.is_complete or is_last

    def _translated(self) -> HttpError:
        text = self._foreign_text.decode(errors="replace").strip()
        error = plain_status(self._foreign_status, text or "The server did not say why")
        error.headers.update(self._foreign_headers)
        return error


async def _answer_fully(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Run ``app``; an answer that it leaves unfinished is ended here."""
    watched = _Watched(send)
    try:
        await app(scope, receive, watched)
    except Exception:  # the last frame before the socket: whatever broke, the client must hear of it
        logger.exception("%s %s broke off", scope["method"], scope["path"])
    if watched.is_complete:
        return
    lost = to_http(ReplicaLost("The replica that was answering is gone. Send the request again"))
    if not watched.is_started:
        await _send_error(send, lost)
    elif watched.is_event_stream:
        # The status line is long gone; OpenAI clients raise on an event that holds an error.
        event = f"data: {json.dumps(lost.document())}\n\ndata: [DONE]\n\n"
        await send({"type": "http.response.body", "body": event.encode(), "more_body": False})


async def _send_error(send: Send, error: HttpError) -> None:
    body = json.dumps(error.document()).encode()
    headers = {**error.headers, "Content-Type": "application/json", "Content-Length": str(len(body))}
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body, "more_body": False})


CALLBACK_ENV = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
"""Where Ray Serve looks for the proxy's middleware; every node's environment must say :data:`CALLBACK`."""

CALLBACK = "serving.edge:proxy_middlewares"


def proxy_middlewares() -> list[Middleware]:
    """Called once by each Serve proxy, in its process, before it opens its port."""
    from serving.connections import guard_connections

    guard_connections()
    return [Middleware(Edge)]
