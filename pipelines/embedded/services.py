"""The two services: command lines, environments, health."""

from __future__ import annotations

import http.client
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from pipelines.embedded.ports import HOST

# Names that would make a service join or write to something other than this platform.
_FOREIGN_ENV = frozenset(
    {
        "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME",
        "MLFLOW_BACKEND_STORE_URI", "MLFLOW_REGISTRY_STORE_URI", "MLFLOW_DEFAULT_ARTIFACT_ROOT",
        "MLFLOW_ARTIFACTS_DESTINATION", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN",
        "RAY_AUTH_TOKEN_PATH", "RAY_TMPDIR", "RAY_NAMESPACE", "RAY_JOB_CONFIG_JSON_ENV_VAR",
    }
)  # fmt: skip

# Names that point boto3, and MLflow with it, at an S3 server other than Amazon's.
_ENDPOINT_ENV = frozenset({"AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "MLFLOW_S3_ENDPOINT_URL"})


@dataclass(frozen=True)
class ServiceSpec:
    """How to run one service and how to tell that it is well.

    Attributes:
        name: Short name; also that of its log.
        argv: Command line.
        env: Its whole environment.
        cwd: Working directory; is created.
        port: The port it must be listening on itself.
        url: Where users and programs reach it.
        probes: Addresses that answer while it is healthy.
        ready_text: What its log says once it has started, if health alone comes too early.
        grace_s: Seconds it gets to end by itself before it is killed.
        retire_dir: Directory to remove when it has ended.
    """

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(repr=False)
    cwd: Path
    port: int
    url: str
    probes: tuple[str, ...]
    ready_text: str | None = None
    grace_s: float = 8.0
    retire_dir: Path | None = None


def clean_env(extra: Mapping[str, str]) -> dict[str, str]:
    """Return this process's environment without what points at other servers, plus ``extra``."""
    return {name: value for name, value in os.environ.items() if name not in _FOREIGN_ENV} | dict(extra)


def loopback_without_proxy() -> dict[str, str]:
    """Return variables that keep HTTP clients from asking a proxy for 127.0.0.1."""
    names = [name for name in os.environ.get("no_proxy", os.environ.get("NO_PROXY", "")).split(",") if name]
    value = ",".join(dict.fromkeys([*names, HOST, "localhost"]))
    return {"no_proxy": value, "NO_PROXY": value}


def mlflow_service(directory: Path, port: int, artifacts_uri: str | None, env: Mapping[str, str]) -> ServiceSpec:
    """Describe the MLflow server.

    Args:
        directory: Holds ``mlflow.db`` and, by default, ``artifacts``.
        port: Port on loopback.
        artifacts_uri: Where artefacts go instead, for example ``s3://bucket/prefix``. Clients hand
            them to the server, so only the server needs credentials (the usual AWS variables).
        env: Variables beside the inherited ones.
    """
    own_env = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    if _ENDPOINT_ENV.intersection({*os.environ, *env}):
        # Not every S3 server accepts the trailing checksums that boto3 sends by default.
        own_env |= {"AWS_REQUEST_CHECKSUM_CALCULATION": "when_required"}
        own_env |= {"AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required"}
    url = f"http://{HOST}:{port}"
    return ServiceSpec(
        name="mlflow",
        argv=(
            sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{directory / 'mlflow.db'}",
            "--artifacts-destination", artifacts_uri or str(directory / "artifacts"),
        ),
        env=clean_env(own_env | {"PYTHONUNBUFFERED": "1"} | loopback_without_proxy() | dict(env)),
        cwd=directory,
        port=port,
        url=url,
        probes=(f"{url}/health",),
    )  # fmt: skip


@dataclass(frozen=True)
class RayPorts:
    """Every port of a Ray head that would otherwise have a fixed default."""

    gcs: int
    node_manager: int
    client_server: int
    dashboard: int
    autoscaler_metrics: int
    dashboard_metrics: int


@dataclass(frozen=True)
class RaySize:
    """How much of the machine Ray may use.

    Attributes:
        num_cpus: Logical CPUs that Ray schedules on.
        object_store_bytes: Shared memory for objects.
        has_dashboard: Whether the dashboard's web and REST server runs.
    """

    num_cpus: int
    object_store_bytes: int
    has_dashboard: bool


def ray_client_env(address: str, token_file: Path) -> dict[str, str]:
    """Return what a process needs to reach this Ray and to stay on loopback with it."""
    return {
        "RAY_ADDRESS": address,
        # Without this Ray replaces 127.0.0.1 by the host's outer address.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        "RAY_USAGE_STATS_ENABLED": "0",
        # It asks a dashboard that does not run here.
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        # Ray announces a changed default on every start otherwise.
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }


def ray_service(temp_dir: Path, ports: RayPorts, size: RaySize, env: Mapping[str, str]) -> ServiceSpec:
    """Describe the Ray head.

    Args:
        temp_dir: Short directory for Ray's session.
        ports: Its ports.
        size: Its resources.
        env: Variables beside the inherited ones; all workers inherit them too.
    """
    own_env = {
        "AUTOSCALER_METRIC_PORT": str(ports.autoscaler_metrics),
        "DASHBOARD_METRIC_PORT": str(ports.dashboard_metrics),
        # A single node has nowhere to drain to: with running work, SIGTERM would wait 30 s for nothing.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        # By default workers run at niceness 15 and starve beside anything else, the endpoint included.
        "RAY_worker_niceness": "0",
        # Serve's proxy holds the clients' connections: it ends streams whose replica died, and bounds what it takes.
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serving.edge:proxy_middlewares",
        # What workers leave in their temporary directory goes when Ray goes.
        "TMPDIR": str(temp_dir / "tmp"),
    }
    has_dashboard = str(size.has_dashboard).lower()
    return ServiceSpec(
        name="ray",
        argv=(
            sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--node-ip-address", HOST,
            "--port", str(ports.gcs), "--node-manager-port", str(ports.node_manager), "--object-manager-port", "0",
            "--min-worker-port", "0", "--max-worker-port", "0", "--ray-client-server-port", str(ports.client_server),
            "--include-dashboard", has_dashboard, "--dashboard-host", HOST, "--dashboard-port", str(ports.dashboard),
            "--dashboard-agent-listen-port", "0", "--num-cpus", str(size.num_cpus),
            "--object-store-memory", str(size.object_store_bytes), "--temp-dir", str(temp_dir),
            "--disable-usage-stats", "--log-style", "record", "--log-color", "false",
        ),
        env=clean_env(dict(env) | own_env | loopback_without_proxy()),
        cwd=temp_dir,
        port=ports.gcs,
        url=f"{HOST}:{ports.gcs}",
        probes=(f"tcp://{HOST}:{ports.gcs}", f"tcp://{HOST}:{ports.node_manager}"),
        ready_text="Ray runtime started.",
        retire_dir=temp_dir,
    )  # fmt: skip


def answers(probe: str, timeout_s: float = 2.0) -> bool:
    """Ask one health address; proxies from the environment are not used.

    Args:
        probe: ``http://host:port/path`` (healthy when the status is 2xx) or
            ``tcp://host:port`` (healthy when a connection is accepted).
        timeout_s: How long to wait.
    """
    parts = urlsplit(probe)
    host, port = parts.hostname or HOST, parts.port or 80
    try:
        if parts.scheme == "tcp":
            socket.create_connection((host, port), timeout=timeout_s).close()
            return True
        connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
        try:
            connection.request("GET", parts.path or "/")
            return 200 <= connection.getresponse().status < 300
        finally:
            connection.close()
    except (OSError, http.client.HTTPException):
        return False
