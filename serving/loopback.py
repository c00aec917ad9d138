"""Keep a replica of a loopback-only Ray on loopback.

Ray Serve 2.60 opens each replica's port for calls between deployments on all
interfaces (``"[::]:0"`` in ``ray.serve._private.replica``) whatever the node's
address is. It asks for Ray's token, but an embedded platform promises to be
reachable from this machine only. There is no option, so the one call is
wrapped; on a cluster, where nodes must reach each other, nothing changes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

_ANYWHERE, _LOOPBACK = "[::]:", "127.0.0.1:"


def confine_replica_port(node_ip: str) -> None:
    """Make the replica that runs in this process bind to 127.0.0.1; call from its constructor.

    Args:
        node_ip: Address of this Ray node; another than 127.0.0.1 changes nothing.
    """
    if node_ip != "127.0.0.1":
        return
    from ray.serve._private import replica

    add_port: Callable[[Any, str], int] | None = getattr(replica, "add_port_to_grpc_server", None)
    if add_port is None:
        logger.warning("this Ray Serve opens its replica port in an unknown way; it may listen on all interfaces")
        return

    def add_loopback_port(server: Any, address: str) -> int:
        return add_port(server, address.replace(_ANYWHERE, _LOOPBACK))

    replica.add_port_to_grpc_server = add_loopback_port  # type: ignore[attr-defined]
