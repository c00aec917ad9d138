"""The embedded platform: ``up``, ``status`` and ``down``.

An MLflow server on SQLite and a one-node Ray, both on 127.0.0.1 only, each
under a small supervisor of its own (:mod:`pipelines.embedded.supervise`). What
runs is recorded in ``<home>/platform.json``; logs are in ``<home>/logs``.
Neither mlflow nor ray is imported here: they live in the services.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from draftline.errors import PlatformError
from pipelines.embedded.fleet import Events, Plan, clean_up, is_healthy, launch
from pipelines.embedded.ports import HOST, choose_ports, require_free
from pipelines.embedded.processes import ProcessId
from pipelines.embedded.services import (
    RayPorts,
    RaySize,
    loopback_without_proxy,
    mlflow_service,
    ray_client_env,
    ray_service,
)
from pipelines.embedded.state import Layout, OwnerRecord, PlatformState, load_state, locked
from pipelines.embedded.status import (
    SERVICE_NAMES,
    Health,
    PlatformStatus,
    ServiceStatus,
    inspect,
    render_status,
)
from pipelines.embedded.tempdir import choose_temp_dir

__all__ = [
    "Health",
    "Platform",
    "PlatformStatus",
    "ServiceStatus",
    "down",
    "render_status",
    "status",
    "up",
]

_LOCK_TIMEOUT_S = 180.0
_PATIENCE_S = 15.0
# Ray refuses an object store below 75 MiB.
_MIN_OBJECT_STORE_BYTES = 75 * 1024**2


@dataclass(frozen=True)
class Platform:
    """A running platform.

    Attributes:
        home: Its home directory, absolute.
        mlflow_uri: Tracking URI; also the address of MLflow's page.
        ray_address: ``host:port`` for ``ray.init(address=...)``.
        ray_client_env: Environment variables that a process needs to use both services; update a
            child's environment with them.
        logs_dir: Folder of all logs.
        serve_port: A free port set aside for the Ray Serve HTTP proxy (host 127.0.0.1).
        dashboard_url: Ray's dashboard, when it was asked for.
        pids: Supervisor of each service by its name.
        is_reused: True when it ran already: whoever started it will want it to stay.
    """

    home: Path
    mlflow_uri: str
    ray_address: str
    ray_client_env: Mapping[str, str]
    logs_dir: Path
    serve_port: int
    dashboard_url: str | None
    pids: Mapping[str, int]
    is_reused: bool


@dataclass(frozen=True)
class _Request:
    mlflow_port: int | None
    serve_port: int | None
    artifacts_uri: str | None
    num_cpus: int
    object_store_bytes: int
    has_dashboard: bool
    worker_env: Mapping[str, str]
    mlflow_env: Mapping[str, str]

    def settings(self) -> dict[str, str]:
        """Return what is compared when a second ``up`` meets a running platform; no secrets."""
        return {
            "artifacts_uri": self.artifacts_uri or "",
            "num_cpus": str(self.num_cpus),
            "object_store_bytes": str(self.object_store_bytes),
            "dashboard": str(self.has_dashboard),
            "worker_env": _digest(self.worker_env),
            "mlflow_env": _digest(self.mlflow_env),
        }


def up(
    home: Path,
    *,
    mlflow_port: int | None = None,
    serve_port: int | None = None,
    artifacts_uri: str | None = None,
    num_cpus: int | None = None,
    object_store_bytes: int = 512 * 1024**2,
    dashboard: bool = False,
    worker_env: Mapping[str, str] | None = None,
    mlflow_env: Mapping[str, str] | None = None,
    owner_pid: int | None = None,
    start_timeout_s: float = 180.0,
    on_event: Callable[[str], None] = lambda _: None,
) -> Platform:
    """Start the platform, or find the healthy one that runs in this home already.

    What an earlier platform left behind after a kill is ended first.

    Args:
        home: Directory for state, logs, MLflow's database and artefacts; is created.
        mlflow_port: Port for MLflow; None chooses a free one.
        serve_port: Port to set aside for Ray Serve; None chooses a free one.
        artifacts_uri: Where MLflow keeps artefacts instead of a directory in ``home``, for example
            ``s3://bucket/prefix``, with the AWS variables of this process's environment.
        num_cpus: Logical CPUs that Ray schedules on; None means all of the machine's.
        object_store_bytes: Shared memory for Ray's objects.
        dashboard: Run Ray's dashboard (its web page, the State API, job submission). Ray Serve,
            Train and Data do not need it when they are driven from a Python process.
        worker_env: Environment for every Ray worker, for example allocator settings.
        mlflow_env: Environment for the MLflow server, for example credentials.
        owner_pid: With this, the platform ends by itself when that process ends, however that
            happens; without it, it stays until :func:`down`.
        start_timeout_s: How long both services together may take to become healthy.
        on_event: Gets a line for the user at every stage.

    Returns:
        The running platform.

    Raises:
        PlatformError: A port is taken, a service did not start, or a platform with other
            essentials runs here. Nothing that was started is left running.
    """
    request = _Request(
        mlflow_port, serve_port, artifacts_uri, num_cpus or os.cpu_count() or 1, object_store_bytes, dashboard,
        dict(worker_env or {}), dict(mlflow_env or {}),
    )  # fmt: skip
    _check(request)
    layout = _prepare_home(home)
    owner = None if owner_pid is None else _owner_record(owner_pid)
    return bring_up(
        layout,
        SERVICE_NAMES,
        make_plan=lambda: _plan(layout, request, owner, on_event),
        check_reuse=lambda state: _check_reuse(state, request, owner, on_event),
        timeout_s=start_timeout_s,
        on_event=on_event,
    )


def status(home: Path) -> PlatformStatus:
    """Look at the platform of a home now; changes nothing and waits for nobody.

    Raises:
        PlatformError: Its record is damaged.
    """
    home = home.expanduser().resolve()
    return inspect(home, load_state(Layout(home)))


def down(home: Path, *, on_event: Callable[[str], None] = lambda _: None) -> list[str]:
    """Stop the platform of a home and everything it started; MLflow's data and the logs stay.

    Args:
        home: Its home directory.
        on_event: Gets a line for the user when something was stopped.

    Returns:
        What was stopped, a phrase each; empty when nothing ran.

    Raises:
        PlatformError: Another command holds the lock, the record is damaged, or a process cannot be killed.
    """
    layout = Layout(home.expanduser().resolve())
    if not layout.home.is_dir():
        return []
    with locked(layout, on_event, _LOCK_TIMEOUT_S):
        return clean_up(layout, on_event)


def bring_up(
    layout: Layout,
    names: Sequence[str],
    *,
    make_plan: Callable[[], Plan],
    check_reuse: Callable[[PlatformState], None],
    timeout_s: float,
    on_event: Events,
) -> Platform:
    """Reuse what runs healthily, clean up what does not, start what is missing.

    The part of :func:`up` that does not care which services these are.

    Args:
        layout: An existing home.
        names: The services of a whole platform.
        make_plan: Called when a platform has to be started.
        check_reuse: Called with the record of the one that runs; raises if it will not do.
        timeout_s: Time to become healthy.
        on_event: Gets a line per stage.

    Raises:
        PlatformError: See :func:`up`.
    """
    with locked(layout, on_event, _LOCK_TIMEOUT_S):
        state = load_state(layout)
        if state is not None and is_healthy(state, names, _PATIENCE_S):
            check_reuse(state)
            on_event(f"The platform in {layout.home} is running already")
            return _platform(layout, state, is_reused=True)
        if state is not None:
            on_event("Cleaning up after a platform that did not end properly")
        clean_up(layout, on_event)
        state = launch(layout, make_plan(), timeout_s, on_event)
        (layout.mlflow / _INITIALISED).touch()
        return _platform(layout, state, is_reused=False)


_INITIALISED = ".initialised"


def _platform(layout: Layout, state: PlatformState, *, is_reused: bool) -> Platform:
    return Platform(
        home=layout.home,
        mlflow_uri=state.mlflow_uri,
        ray_address=state.ray_address,
        ray_client_env=dict(state.client_env),
        logs_dir=layout.logs,
        serve_port=state.serve_port,
        dashboard_url=state.dashboard_url,
        pids={record.name: record.pid for record in state.services},
        is_reused=is_reused,
    )


def _check(request: _Request) -> None:
    if not sys.platform.startswith("linux"):
        raise PlatformError("The embedded platform cannot run here", got=sys.platform, expected="Linux")
    for name, port in (("mlflow_port", request.mlflow_port), ("serve_port", request.serve_port)):
        if port is not None and not 1024 <= port <= 65_535:
            raise PlatformError(f"{name} is out of range", got=port, expected="1024 to 65535")
    if request.num_cpus < 1:
        raise PlatformError("num_cpus is too small", got=request.num_cpus, expected="1 or more")
    if request.object_store_bytes < _MIN_OBJECT_STORE_BYTES:
        raise PlatformError(
            "object_store_bytes is too small for Ray",
            got=request.object_store_bytes,
            expected=f"at least {_MIN_OBJECT_STORE_BYTES}",
        )


def _prepare_home(home: Path) -> Layout:
    layout = Layout(home.expanduser().resolve())
    try:
        for directory in (layout.home, layout.logs, layout.mlflow):
            directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PlatformError(
            f"The platform's home {layout.home} cannot be created",
            got=error.strerror,
            remedy="Choose a directory that you may write to",
        ) from error
    return layout


def _owner_record(owner_pid: int) -> OwnerRecord:
    try:
        owner = ProcessId.of(owner_pid)
    except psutil.NoSuchProcess:
        raise PlatformError("The platform's owner does not run", got=f"pid {owner_pid}") from None
    return OwnerRecord(pid=owner.pid, create_time_s=owner.create_time_s)


def _check_reuse(state: PlatformState, request: _Request, owner: OwnerRecord | None, on_event: Events) -> None:
    ports = {record.name: record.port for record in state.services}
    essentials = [
        ("mlflow_port", request.mlflow_port, ports["mlflow"]),
        ("serve_port", request.serve_port, state.serve_port),
        ("artifacts_uri", request.artifacts_uri, state.settings.get("artifacts_uri") or None),
    ]
    for name, wanted, found in essentials:
        if wanted != found and not (wanted is None and name.endswith("port")):
            raise PlatformError(
                f"A platform runs here already with another {name}",
                got=found or "the default",
                expected=str(wanted or "the default"),
                remedy="Stop it first with `draftline down`, or ask for the same",
            )
    different = [name for name, value in request.settings().items() if state.settings.get(name) != value]
    if different:
        on_event(f"The running platform keeps its own {', '.join(different)}; `draftline down` first to change that")
    if state.owner is not None and state.owner != owner:
        on_event(f"The running platform will end together with process {state.owner.pid}, which started it")


def _plan(layout: Layout, request: _Request, owner: OwnerRecord | None, on_event: Events) -> Plan:
    if request.mlflow_port is not None:
        require_free(request.mlflow_port, "MLflow", "mlflow_port")
    if request.serve_port is not None:
        require_free(request.serve_port, "Ray Serve", "serve_port")
    free = choose_ports(8)
    mlflow_port, serve_port = request.mlflow_port or free[0], request.serve_port or free[1]
    ray_ports = RayPorts(*free[2:])
    size = RaySize(request.num_cpus, request.object_store_bytes, request.has_dashboard)
    temp_dir = choose_temp_dir()
    _set_aside_unfinished_database(layout, on_event)
    _write_token(layout.token_file)

    client_env = ray_client_env(f"{HOST}:{ray_ports.gcs}", layout.token_file) | loopback_without_proxy()
    client_env |= {"MLFLOW_TRACKING_URI": f"http://{HOST}:{mlflow_port}", "MLFLOW_DISABLE_TELEMETRY": "true"}
    # A worker is connected by its node; an address would make it a client of its own.
    worker_env = {name: value for name, value in client_env.items() if name != "RAY_ADDRESS"}
    specs = (
        mlflow_service(layout.mlflow, mlflow_port, request.artifacts_uri, request.mlflow_env),
        ray_service(temp_dir, ray_ports, size, {**request.worker_env, **worker_env}),
    )
    state = PlatformState(
        platform_id=secrets.token_hex(8),
        started_s=time.time(),
        owner=owner,
        temp_dir=str(temp_dir),
        settings=request.settings(),
        mlflow_uri=specs[0].url,
        ray_address=specs[1].url,
        dashboard_url=f"http://{HOST}:{ray_ports.dashboard}" if request.has_dashboard else None,
        serve_port=serve_port,
        client_env=client_env,
    )
    on_event(f"Starting MLflow ({specs[0].url}) and Ray ({specs[1].url}), usually 10 to 30 s")
    return Plan(state, specs)


def _set_aside_unfinished_database(layout: Layout, on_event: Events) -> None:
    """Rename a database whose creation was broken off: MLflow's migrations cannot be resumed on SQLite."""
    if (layout.mlflow / _INITIALISED).exists():
        return
    for path in layout.mlflow.glob("mlflow.db*"):
        if ".unfinished" not in path.name:
            os.replace(path, path.with_name(f"{path.name}.unfinished"))
            on_event(f"Set aside {path}, which an interrupted first start left unfinished")


def _write_token(path: Path) -> None:
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as handle:
        handle.write(secrets.token_hex(32))


def _digest(env: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(sorted(env.items())).encode()).hexdigest()[:16]
