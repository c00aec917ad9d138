"""Starting, checking and ending a set of supervised services, whatever they are."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from draftline.errors import PlatformError
from pipelines.embedded.ports import listener_pid
from pipelines.embedded.processes import MARKER, ProcessId, relatives, wait_gone
from pipelines.embedded.processes import end as end_processes
from pipelines.embedded.services import ServiceSpec, answers
from pipelines.embedded.state import Layout, PlatformState, ServiceRecord, load_state, save_state
from pipelines.embedded.tempdir import create_temp_dir, find_temp_dirs, retire_temp_dir

Events = Callable[[str], None]

_POLL_S = 0.2
_LOG_TAIL_LINES = 15
# A supervisor gives its service grace_s and then kills; this much more and we do it ourselves.
_SUPERVISOR_GRACE_S = 12.0


@dataclass(frozen=True)
class Plan:
    """A platform about to be started.

    Attributes:
        state: Its record, without services yet.
        specs: What to start, all at the same time.
    """

    state: PlatformState
    specs: tuple[ServiceSpec, ...]


def launch(layout: Layout, plan: Plan, timeout_s: float, on_event: Events) -> PlatformState:
    """Start all services of a plan and wait until each is healthy.

    The record is written before and after every start, so that a kill at any
    instant leaves something to clean up by.

    Args:
        layout: The home; must exist and be locked.
        plan: What to start.
        timeout_s: Time for all of them together.
        on_event: Gets a line per stage.

    Returns:
        The record with all services.

    Raises:
        PlatformError: One ended or did not get healthy; the others were stopped again.
    """
    state = plan.state
    started_s = time.monotonic()
    save_state(layout, state)
    try:
        if state.temp_dir is not None:
            create_temp_dir(Path(state.temp_dir), _signature(layout, state))
        for spec in plan.specs:
            record = _start(layout, state, spec)
            state = state.model_copy(update={"services": (*state.services, record)})
            save_state(layout, state)
        pending = dict(zip(state.services, plan.specs, strict=True))
        while pending:
            for record, spec in list(pending.items()):
                if _is_ready(record, spec):
                    del pending[record]
                    on_event(f"{spec.name} is ready at {spec.url} after {time.monotonic() - started_s:.1f} s")
            if pending and time.monotonic() - started_s > timeout_s:
                raise _failure(next(iter(pending)), f"is not healthy after {timeout_s:g} s")
            time.sleep(_POLL_S if pending else 0)
        state = state.model_copy(update={"is_ready": True})
        save_state(layout, state)
    except BaseException:
        # KeyboardInterrupt too: a start that was broken off leaves nothing behind.
        retire(layout, state)
        raise
    return state


def is_healthy(state: PlatformState, names: Sequence[str], patience_s: float = 0.0) -> bool:
    """Tell whether every one of the named services was started, runs and answers.

    Args:
        state: The record.
        names: Services that must be in it.
        patience_s: How long a service that runs may take to answer (the machine may be busy).
    """
    deadline = time.monotonic() + patience_s
    if not state.is_ready or {record.name for record in state.services} != set(names):
        return False
    while True:
        if any(record.process.find() is None for record in state.services):
            return False
        if all(answers(probe) for record in state.services for probe in record.probes):
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_S)


def retire(layout: Layout, state: PlatformState | None) -> list[str]:
    """End every process of a platform and remove its temporary directory and record.

    Args:
        layout: The home; must be locked.
        state: The record; without one, processes are found by their environment alone.

    Returns:
        What was stopped, a phrase each.

    Raises:
        PlatformError: A process would not even die by SIGKILL.
    """
    records = () if state is None else state.services
    stopped = []
    supervisors = []
    for record in reversed(records):
        if (process := record.process.find()) is not None:
            stopped.append(f"{record.name} (pid {record.pid})")
            supervisors.append(process)
    for process in supervisors:
        process.terminate()
    wait_gone(supervisors, _SUPERVISOR_GRACE_S)
    if remains := members(layout, state):
        stopped.append(f"{len(remains)} leftover process{'es' if len(remains) > 1 else ''}")
        immortal = end_processes(remains, grace_s=2.0)
        # What they started in their last moments.
        immortal += end_processes(members(layout, state), grace_s=0.0)
        if immortal:
            raise PlatformError(
                "Processes of the platform cannot be killed",
                got=", ".join(f"pid {process.pid}" for process in immortal),
                remedy="They probably wait for a disk or a device; try `draftline down` again later",
            )
    if state is not None and state.temp_dir is not None:
        retire_temp_dir(Path(state.temp_dir), _signature(layout, state), layout.logs)
    for path in find_temp_dirs(layout.home):
        retire_temp_dir(path, None, layout.logs)
    layout.token_file.unlink(missing_ok=True)
    layout.state_file.unlink(missing_ok=True)
    return stopped


def members(layout: Layout, state: PlatformState | None) -> list[psutil.Process]:
    """Find all live processes of a platform: its supervisors and everything they started."""

    def is_marked(value: str) -> bool:
        platform_id, _, home = value.partition(":")
        return home == str(layout.home) and (state is None or platform_id == state.platform_id)

    return relatives([record.process for record in state.services] if state is not None else [], is_marked)


def clean_up(layout: Layout, on_event: Events) -> list[str]:
    """End whatever is recorded in a home, and what runs there without a record."""
    state = load_state(layout)
    stopped = retire(layout, state)
    if stopped:
        on_event(f"Stopped {', '.join(stopped)}")
    return stopped


def _signature(layout: Layout, state: PlatformState) -> str:
    return f"{state.platform_id}:{layout.home}"


def _start(layout: Layout, state: PlatformState, spec: ServiceSpec) -> ServiceRecord:
    spec.cwd.mkdir(parents=True, exist_ok=True)
    layout.logs.mkdir(parents=True, exist_ok=True)
    log = layout.logs / f"{spec.name}.log"
    if log.exists():
        os.replace(log, log.with_suffix(".log.1"))
    command = [
        sys.executable, "-m", "pipelines.embedded.supervise", "--name", spec.name, "--log", str(log),
        "--cwd", str(spec.cwd), "--grace-s", str(spec.grace_s),
    ]  # fmt: skip
    if state.owner is not None:
        command += ["--owner", f"{state.owner.pid}:{state.owner.create_time_s}"]
    if spec.retire_dir is not None:
        command += ["--retire-dir", str(spec.retire_dir)]
    done = subprocess.run(
        [*command, "--", *spec.argv],
        # The repository's root: `-m` finds this package there even when it is not installed.
        cwd=Path(__file__).resolve().parents[2],
        env={**spec.env, MARKER: _signature(layout, state)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1:] or _log_tail(log)[-1:] or ["no reason given"]
        raise PlatformError(f"{spec.name} could not be started", got=reason[0], remedy=f"See {log}")
    supervisor = json.loads(done.stdout)
    return ServiceRecord(
        name=spec.name,
        pid=supervisor["pid"],
        create_time_s=supervisor["create_time_s"],
        port=spec.port,
        url=spec.url,
        probes=spec.probes,
        argv_sha256=hashlib.sha256(json.dumps(spec.argv).encode()).hexdigest(),
        log=str(log),
    )


def _is_ready(record: ServiceRecord, spec: ServiceSpec) -> bool:
    if record.process.find() is None:
        raise _failure(record, "ended while starting")
    if not all(answers(probe) for probe in spec.probes):
        return False
    if spec.ready_text is not None and spec.ready_text not in _read_log(Path(record.log)):
        return False
    # Something else may have taken the port since we chose it, and answer in our service's place.
    listener = listener_pid(spec.port)
    return listener is not None and _is_in_session(listener, record.process)


def _is_in_session(pid: int, leader: ProcessId) -> bool:
    try:
        return os.getsid(pid) == leader.pid
    except ProcessLookupError:
        return False


def _failure(record: ServiceRecord, what: str) -> PlatformError:
    tail = "".join(f"\n  | {line}" for line in _log_tail(Path(record.log))) or " nothing"
    return PlatformError(f"{record.name} {what}", remedy=f"Its log, {record.log}, ends with:{tail}")


def _log_tail(log: Path) -> list[str]:
    return _read_log(log).splitlines()[-_LOG_TAIL_LINES:]


def _read_log(log: Path) -> str:
    try:
        return log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
