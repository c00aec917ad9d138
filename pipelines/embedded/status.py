"""How a platform is doing, as values and as a table."""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from rich.table import Table

from pipelines.embedded.services import answers
from pipelines.embedded.state import PlatformState

SERVICE_NAMES = ("mlflow", "ray")


class Health(StrEnum):
    """How one service is doing."""

    RUNNING = "running"
    STOPPED = "stopped"
    UNHEALTHY = "unhealthy"


@dataclass(frozen=True)
class ServiceStatus:
    """One service.

    Attributes:
        name: For example ``"mlflow"``.
        health: Running (answers), unhealthy (runs but does not answer) or stopped.
        url: Its address; None when it was not started.
        pid: Its supervisor's process number; None when stopped.
        uptime_s: Seconds since it was started; None when stopped.
        log: Its log; None when it was not started.
    """

    name: str
    health: Health
    url: str | None = None
    pid: int | None = None
    uptime_s: float | None = None
    log: Path | None = None


@dataclass(frozen=True)
class PlatformStatus:
    """A platform.

    Attributes:
        home: Its home directory.
        services: Every service, also those that are stopped.
        owner_pid: The process it ends with, if it is tied to one.
    """

    home: Path
    services: tuple[ServiceStatus, ...]
    owner_pid: int | None = None

    @property
    def is_running(self) -> bool:
        """Whether every service is healthy."""
        return all(service.health is Health.RUNNING for service in self.services)


def inspect(home: Path, state: PlatformState | None) -> PlatformStatus:
    """Look at every service of a recorded platform now.

    Args:
        home: Its home.
        state: Its record; None means that nothing was started.
    """
    if state is None:
        return PlatformStatus(home, tuple(ServiceStatus(name, Health.STOPPED) for name in SERVICE_NAMES))
    services = []
    for record in state.services:
        if record.process.find() is None:
            services.append(ServiceStatus(record.name, Health.STOPPED, url=record.url, log=Path(record.log)))
            continue
        health = Health.RUNNING if all(answers(probe) for probe in record.probes) else Health.UNHEALTHY
        uptime_s = max(0.0, time.time() - record.create_time_s)
        services.append(ServiceStatus(record.name, health, record.url, record.pid, uptime_s, Path(record.log)))
    return PlatformStatus(home, tuple(services), None if state.owner is None else state.owner.pid)


def render_status(status: PlatformStatus) -> Table:
    """Lay a status out for the terminal."""
    colours = {Health.RUNNING: "green", Health.STOPPED: "dim", Health.UNHEALTHY: "red"}
    caption = None if status.owner_pid is None else f"ends with process {status.owner_pid}"
    table = Table(title=f"Platform in {status.home}", title_justify="left", caption=caption, caption_justify="left")
    for heading in ("service", "state", "address", "pid", "up for", "log"):
        table.add_column(heading, overflow="fold")
    for service in status.services:
        table.add_row(
            service.name,
            f"[{colours[service.health]}]{service.health}[/]",
            service.url or "",
            "" if service.pid is None else str(service.pid),
            "" if service.uptime_s is None else _duration(service.uptime_s),
            "" if service.log is None else str(service.log),
        )
    return table


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
