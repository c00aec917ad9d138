"""Who a process is, and how to end it and everything it started.

A pid alone does not identify a process: pids are reused. A process is known
here by pid *and* creation time, and the relatives of one are found by parent
links, by session, and by a marker in their environment; never by name.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import psutil

MARKER = "DRAFTLINE_PLATFORM"
"""Environment variable every process of a platform inherits: ``<platform id>:<home>``."""

# The kernel derives creation times from the boot time, which shifts when the clock is corrected.
_CREATE_TIME_TOLERANCE_S = 2.0
_POLL_S = 0.05


@dataclass(frozen=True)
class ProcessId:
    """One process, exactly.

    Attributes:
        pid: Process number.
        create_time_s: When it was created, Unix time.
    """

    pid: int
    create_time_s: float

    @classmethod
    def of(cls, pid: int) -> ProcessId:
        """Describe a process that runs now.

        Raises:
            psutil.NoSuchProcess: No process has this number.
        """
        return cls(pid, psutil.Process(pid).create_time())

    def find(self) -> psutil.Process | None:
        """Return the live process, or None when it has ended or the pid now belongs to another.

        A zombie counts as ended: it holds nothing but its exit code.
        """
        try:
            process = psutil.Process(self.pid)
            if abs(process.create_time() - self.create_time_s) > _CREATE_TIME_TOLERANCE_S:
                return None
            return None if process.status() == psutil.STATUS_ZOMBIE else process
        except psutil.NoSuchProcess:
            return None


def is_alive(process: psutil.Process) -> bool:
    """Tell whether a process still runs (a zombie does not)."""
    try:
        return bool(process.is_running()) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def relatives(roots: Iterable[ProcessId], is_marked: Callable[[str], bool]) -> list[psutil.Process]:
    """Find every live process of a platform.

    Args:
        roots: The recorded supervisors; each leads a session of its own.
        is_marked: Decides on the value of :data:`MARKER` in a process's environment.

    Returns:
        The roots that live, the members of their sessions, all marked
        processes and the descendants of all of these; without the calling
        process and its ancestors.
    """
    leaders = {root.pid for root in roots if root.find() is not None}
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        if process.pid in leaders or _in_session(process, leaders) or _has_marker(process, is_marked):
            found[process.pid] = process
    for process in list(found.values()):
        found.update({child.pid: child for child in _descendants(process)})
    own = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    return [process for pid, process in found.items() if pid not in own and is_alive(process)]


def end(processes: list[psutil.Process], grace_s: float) -> list[psutil.Process]:
    """End processes: SIGTERM, then SIGKILL for those still there after ``grace_s`` seconds.

    Returns:
        Those that would not even die by SIGKILL within five seconds.
    """
    if grace_s > 0:
        _signal_all(processes, psutil.Process.terminate)
        processes = wait_gone(processes, grace_s)
    _signal_all(processes, psutil.Process.kill)
    return wait_gone(processes, 5.0)


def wait_gone(processes: list[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Wait until processes have ended; return those that have not after ``timeout_s`` seconds."""
    deadline = time.monotonic() + timeout_s
    while (processes := [process for process in processes if is_alive(process)]) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return processes


def _signal_all(processes: list[psutil.Process], send: Callable[[psutil.Process], object]) -> None:
    for process in processes:
        try:
            send(process)
        except psutil.NoSuchProcess:
            continue


def _in_session(process: psutil.Process, leaders: set[int]) -> bool:
    try:
        return os.getsid(process.pid) in leaders
    except (ProcessLookupError, PermissionError):
        return False


def _has_marker(process: psutil.Process, is_marked: Callable[[str], bool]) -> bool:
    try:
        value = process.environ().get(MARKER)
    except (psutil.Error, OSError):
        # Another user's process, or one that ended while we looked: not ours either way.
        return False
    return value is not None and is_marked(value)


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.NoSuchProcess:
        return []
