"""Small services in place of MLflow and Ray: real processes, real sockets, started in a tenth of a second."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil

from pipelines.embedded.fleet import Plan
from pipelines.embedded.platform import Platform, bring_up
from pipelines.embedded.ports import choose_ports
from pipelines.embedded.processes import ProcessId
from pipelines.embedded.services import ServiceSpec
from pipelines.embedded.state import Layout, OwnerRecord, PlatformState
from pipelines.embedded.tempdir import choose_temp_dir

NAMES = ("front", "back")

SERVER = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
print("server starts", flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""

# Leaves a grandchild in a session of its own, deaf to SIGTERM, before it serves.
SERVER_WITH_HIDDEN_WORKER = (
    """
import os, signal, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    os._exit(0)
os.wait()
"""
    + SERVER
)

DYING = "import sys; print('no such table: kittens', flush=True); sys.exit(3)"

SILENT = "import time; print('thinking', flush=True); time.sleep(600)"


def fake_spec(name: str, script: str, directory: Path, port: int | None = None) -> ServiceSpec:
    """Describe a service that runs ``script`` with its port as argument."""
    port = choose_ports(1)[0] if port is None else port
    return ServiceSpec(
        name=name,
        argv=(sys.executable, "-I", "-S", "-c", script, str(port)),
        env=dict(os.environ),
        cwd=directory / name,
        port=port,
        url=f"http://127.0.0.1:{port}",
        probes=(f"http://127.0.0.1:{port}/health",),
        grace_s=2.0,
    )


class FakeHome:
    """A platform home whose services are scripts."""

    def __init__(self, directory: Path) -> None:
        self.layout = Layout(directory)
        self.layout.logs.mkdir(parents=True, exist_ok=True)
        self.layout.mlflow.mkdir(exist_ok=True)
        self.events: list[str] = []
        self.plans: list[Plan] = []
        self.port: int | None = None

    def up(
        self,
        front: str = SERVER,
        back: str = SERVER,
        *,
        owner_pid: int | None = None,
        timeout_s: float = 20.0,
        check_reuse: Callable[[PlatformState], None] = lambda _: None,
    ) -> Platform:
        """Bring the two scripts up as ``front`` and ``back``."""

        def make_plan() -> Plan:
            owner = None if owner_pid is None else ProcessId.of(owner_pid)
            temp_dir = choose_temp_dir()
            specs = [fake_spec("front", front, self.layout.home, self.port), fake_spec("back", back, self.layout.home)]
            self.plans.append(Plan(fake_state(temp_dir, owner), tuple(specs)))
            return self.plans[-1]

        return bring_up(
            self.layout,
            NAMES,
            make_plan=make_plan,
            check_reuse=check_reuse,
            timeout_s=timeout_s,
            on_event=self.events.append,
        )

    @property
    def temp_dir(self) -> Path:
        """The temporary directory of the latest start."""
        temp_dir = self.plans[-1].state.temp_dir
        assert temp_dir is not None
        return Path(temp_dir)


def fake_state(temp_dir: Path | None, owner: ProcessId | None = None) -> PlatformState:
    """Return the record of a platform without services."""
    return PlatformState(
        platform_id=os.urandom(8).hex(),
        started_s=time.time(),
        owner=None if owner is None else OwnerRecord(pid=owner.pid, create_time_s=owner.create_time_s),
        temp_dir=None if temp_dir is None else str(temp_dir),
        settings={},
        mlflow_uri="http://127.0.0.1:1",
        ray_address="127.0.0.1:2",
        dashboard_url=None,
        serve_port=3,
        client_env={"RAY_ADDRESS": "127.0.0.1:2"},
    )


@contextmanager
def http_server_here(status: Callable[[str], int]) -> Iterator[int]:
    """Serve HTTP from this process; yields the port.

    Args:
        status: Maps a request's path to the status code of the answer.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status(self.path))
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def marked_processes(layout: Layout) -> list[psutil.Process]:
    """Find by a scan of our own every process that carries a home's marker in its environment."""
    found = []
    for process in psutil.process_iter():
        try:
            marker = process.environ().get("DRAFTLINE_PLATFORM", "")
            is_zombie = process.status() == psutil.STATUS_ZOMBIE
        except psutil.Error:
            continue
        if marker.endswith(f":{layout.home}") and not is_zombie:
            found.append(process)
    return found


def eventually(condition: Callable[[], bool], timeout_s: float = 10.0) -> bool:
    """Wait for a condition; return whether it came true."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
