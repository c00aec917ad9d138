"""Connections that cost nothing for ever: limits that uvicorn does not have.

uvicorn 0.54 waits without end for the head of a request, and for a client
that takes nothing of its answer. Both hold a descriptor, the second also the
answer. :class:`GuardedConnection` closes them; uvicorn takes it as ``http=``,
and Ray Serve's proxy, whose uvicorn is not ours to configure, gets it by
:func:`guard_connections`.
"""

from __future__ import annotations

import asyncio
from asyncio.events import TimerHandle

import uvicorn.config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_TIMEOUT_S = 20.0
"""From the first byte of a request, or from the connection, to the end of its head."""

STALL_TIMEOUT_S = 60.0
"""How long a client may leave a full socket full. Serve's proxy keeps what a replica sends meanwhile."""


class GuardedConnection(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 connection, which gives up on clients that hold it for nothing."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected and owes a head."""
        super().connection_made(transport)
        self._head = _Patience(self, HEAD_TIMEOUT_S)
        self._stall = _Patience(self, STALL_TIMEOUT_S)
        self._head.begin()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client, or lost patience, has ended it."""
        self._head.end()
        self._stall.end()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """The first byte of another request on the same connection; while it is idle, keep-alive counts."""
        super().on_message_begin()
        self._head.begin()

    def on_headers_complete(self) -> None:
        """The head is whole."""
        self._head.end()
        super().on_headers_complete()

    def pause_writing(self) -> None:
        """The socket and the buffer behind it are full."""
        super().pause_writing()
        self._stall.begin()

    def resume_writing(self) -> None:
        """The client took something."""
        self._stall.end()
        super().resume_writing()


class _Patience:
    """Aborts a connection unless :meth:`end` comes in time after :meth:`begin`."""

    def __init__(self, connection: HttpToolsProtocol, seconds: float) -> None:
        self._connection = connection
        self._seconds = seconds
        self._timer: TimerHandle | None = None

    def begin(self) -> None:
        """Start to wait; already waiting changes nothing."""
        if self._timer is None:
            self._timer = self._connection.loop.call_later(self._seconds, self._connection.transport.abort)

    def end(self) -> None:
        """What was waited for has come."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def guard_connections() -> None:
    """Make every uvicorn that is started in this process from now on use :class:`GuardedConnection`."""
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{GuardedConnection.__name__}"
