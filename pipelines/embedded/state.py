"""What is known about a platform between two commands: ``<home>/platform.json``, and its lock."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from draftline.errors import PlatformError
from pipelines.embedded.processes import ProcessId

STATE_VERSION: Final = 1


@dataclass(frozen=True)
class Layout:
    """Where things lie below a platform's home.

    Attributes:
        home: Absolute path of the home directory.
    """

    home: Path

    @property
    def state_file(self) -> Path:
        """The recorded state."""
        return self.home / "platform.json"

    @property
    def lock_file(self) -> Path:
        """Locked while a command changes the platform."""
        return self.home / "platform.lock"

    @property
    def token_file(self) -> Path:
        """Ray's access token, readable by its owner alone."""
        return self.home / "ray.token"

    @property
    def logs(self) -> Path:
        """One log per service; Ray's own many logs follow in ``ray-session`` when it stops."""
        return self.home / "logs"

    @property
    def mlflow(self) -> Path:
        """MLflow's database and, by default, its artefacts."""
        return self.home / "mlflow"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ServiceRecord(_Record):
    """One started service.

    Attributes:
        name: For example ``"mlflow"``.
        pid: Its supervisor; also the number of the session it leads.
        create_time_s: Creation time of the supervisor.
        port: The port that answers health checks.
        url: Where users and programs reach it.
        probes: Addresses that answer while it is healthy, ``http://…`` or ``tcp://host:port``.
        argv_sha256: Digest of its command line.
        log: Path of its log.
    """

    name: str
    pid: int
    create_time_s: float
    port: int
    url: str
    probes: tuple[str, ...]
    argv_sha256: str
    log: str

    @property
    def process(self) -> ProcessId:
        """The supervisor's identity."""
        return ProcessId(self.pid, self.create_time_s)


class OwnerRecord(_Record):
    """The process whose end ends the platform."""

    pid: int
    create_time_s: float


class PlatformState(_Record):
    """Everything needed to find, use and remove a started platform.

    Attributes:
        version: Version of this file's format.
        platform_id: Random; part of the environment marker of all its processes.
        started_s: Unix time.
        owner: Set when the platform ends with its owner.
        temp_dir: Ray's temporary directory.
        settings: What the user asked for, to notice a second ``up`` that asks for something else.
        mlflow_uri: Tracking URI.
        ray_address: ``host:port`` of Ray's control service.
        dashboard_url: Ray's dashboard, if it runs.
        serve_port: Port set aside for the Ray Serve HTTP proxy.
        client_env: Environment that a client process needs.
        is_ready: Whether all services were healthy once; False while they start.
        services: What was started so far, in order of start.
    """

    version: Literal[1] = STATE_VERSION
    platform_id: str
    started_s: float
    owner: OwnerRecord | None
    temp_dir: str | None
    settings: Mapping[str, str]
    mlflow_uri: str
    ray_address: str
    dashboard_url: str | None
    serve_port: int
    client_env: Mapping[str, str]
    is_ready: bool = False
    services: tuple[ServiceRecord, ...] = ()


def load_state(layout: Layout) -> PlatformState | None:
    """Read the recorded state; None when no platform is recorded.

    Raises:
        PlatformError: The file is damaged or of another version.
    """
    try:
        text = layout.state_file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        return PlatformState.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        raise PlatformError(
            f"{layout.state_file} cannot be read",
            got=f"{'.'.join(map(str, first['loc'])) or 'file'}: {first['msg']}",
            expected=f"the record of a platform, version {STATE_VERSION}",
            remedy="Stop the platform with the Draftline version that started it, or delete this file and run "
            "`draftline down`, which then finds its processes by their environment",
        ) from None


def save_state(layout: Layout, state: PlatformState) -> None:
    """Write the state so that a reader sees the old one or the new one, never a part."""
    temporary = layout.state_file.with_suffix(".json.new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as handle:
        handle.write(state.model_dump_json(indent=2) + "\n")
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, layout.state_file)


@contextmanager
def locked(layout: Layout, on_event: Callable[[str], None], timeout_s: float) -> Iterator[None]:
    """Hold the platform's lock; the kernel releases it when this process ends in whatever way.

    Args:
        layout: Whose lock; its home must exist.
        on_event: Told once when another process holds the lock.
        timeout_s: How long to wait for it.

    Raises:
        PlatformError: Another process held the lock all the time.
    """
    descriptor = os.open(layout.lock_file, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        deadline = time.monotonic() + timeout_s
        is_told = False
        while not _try_lock(descriptor):
            if time.monotonic() >= deadline:
                raise PlatformError(
                    f"Another Draftline command is starting or stopping the platform in {layout.home}",
                    got=f"no end of it within {timeout_s:g} s",
                    remedy="Wait for that command or end it, then try again",
                )
            if not is_told:
                on_event("Waiting for another Draftline command that is starting or stopping the platform")
                is_told = True
            time.sleep(0.1)
        yield
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
