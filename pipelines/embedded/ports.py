"""Choosing and checking TCP ports on loopback."""

from __future__ import annotations

import random
import socket

import psutil

from draftline.errors import PlatformError

HOST = "127.0.0.1"

# Below Linux's default ephemeral range (32768 up) and above Ray's default worker range (10002-19999): nobody
# is handed one of these by chance between our choosing a port and the service binding it.
_FIRST_PORT, _LAST_PORT = 20_000, 32_000


def is_free(port: int) -> bool:
    """Tell whether a TCP port on loopback can be bound now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def choose_ports(count: int) -> list[int]:
    """Choose distinct free ports.

    Raises:
        PlatformError: There are not enough free ports.
    """
    candidates = random.sample(range(_FIRST_PORT, _LAST_PORT), _LAST_PORT - _FIRST_PORT)
    chosen: list[int] = []
    for port in candidates:
        if len(chosen) == count:
            break
        if is_free(port):
            chosen.append(port)
    if len(chosen) < count:
        raise PlatformError(
            "Too few free TCP ports on 127.0.0.1",
            got=f"{len(chosen)} between {_FIRST_PORT} and {_LAST_PORT}",
            expected=f"{count}",
            remedy="Stop programs that hold ports in this range",
        )
    return chosen


def require_free(port: int, service: str, option: str) -> None:
    """Check a port that the user asked for.

    Args:
        port: The port.
        service: What is to listen there, for the message.
        option: The argument that chose the port, for the message.

    Raises:
        PlatformError: The port is taken; names the holder when it can be known.
    """
    if is_free(port):
        return
    holder = listener_pid(port)
    held_by = "another user's process" if holder is None else f"{_name(holder)} (pid {holder})"
    raise PlatformError(
        f"{service} cannot listen on 127.0.0.1:{port}, the port is taken by {held_by}",
        remedy=f"Stop that process, or choose another port with {option} (leave it out for a free one)",
    )


def listener_pid(port: int) -> int | None:
    """Return the process that listens on a port, or None if none does or it may not be seen."""
    for connection in psutil.net_connections(kind="tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port:
            return connection.pid
    return None


def _name(pid: int) -> str:
    try:
        return psutil.Process(pid).name()
    except psutil.Error:
        return "a process"
