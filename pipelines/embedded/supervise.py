"""Runs one service so that nothing of it can outlive its purpose.

``python -m pipelines.embedded.supervise --name N --log F --cwd D [--owner PID:CREATE_TIME] -- COMMAND ...``

The program detaches itself, starts the command and prints one JSON line about
the detached process: ``{"pid": 1, "create_time_s": 2.0}``. From then on it

* adopts every orphan among the command's descendants (Linux *child subreaper*),
  so a double fork does not hide a process from it;
* ends the whole tree on SIGTERM, when the command ends, or when the owner dies
  in whatever way;
* asks the kernel to signal the command should the supervisor itself be killed.

Linux only. The module imports nothing heavy: two supervisors run all the time.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from pipelines.embedded.processes import MARKER, ProcessId, end
from pipelines.embedded.tempdir import retire_temp_dir

# include/uapi/linux/prctl.h
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

_WATCHED = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD}
_OWNER_POLL_S = 0.5
_IDLE_POLL_S = 60.0


def main(argv: Sequence[str] | None = None) -> int:
    """Detach, start the command and print who supervises it.

    Args:
        argv: Command line without the program's name.

    Returns:
        Exit code: 0 once the command was started, 1 if it could not be.
    """
    args = _parse(argv)
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.close(reader)
        os.setsid()
        code = _Supervisor(args, report_fd=writer).run()
        sys.stderr.flush()
        # Not sys.exit: the fork must not run what the launching process would run at exit.
        os._exit(code)
    os.close(writer)
    with os.fdopen(reader, encoding="utf-8") as pipe:
        report = pipe.read()
    sys.stdout.write(report)
    return 0 if report else 1


class _Supervisor:
    """The detached process."""

    def __init__(self, args: argparse.Namespace, report_fd: int) -> None:
        self._args = args
        self._report_fd = report_fd
        self._owner: ProcessId | None = args.owner
        self._main_pid = 0
        self._exit_code: int | None = None

    def run(self) -> int:
        """Start the command, wait for a reason to stop, stop everything; returns an exit code."""
        self._redirect_output()
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        original_mask = signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)

        def prepare_child() -> None:
            signal.pthread_sigmask(signal.SIG_SETMASK, original_mask)
            _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

        try:
            child = subprocess.Popen(
                self._args.command, cwd=self._args.cwd, stdin=subprocess.DEVNULL, preexec_fn=prepare_child
            )
        except OSError as error:
            self._say(f"cannot start {self._args.command[0]}: {error}")
            return 1
        self._main_pid = child.pid
        me = ProcessId.of(os.getpid())
        os.write(self._report_fd, json.dumps({"pid": me.pid, "create_time_s": me.create_time_s}).encode())
        os.close(self._report_fd)
        reason = self._wait_for_reason()
        self._say(f"stopping: {reason}")
        self._stop_tree()
        # The child was reaped by waitpid(-1); Popen must not look for it.
        child.returncode = self._exit_code or 0
        if self._args.retire_dir is not None:
            retire_temp_dir(self._args.retire_dir, os.environ.get(MARKER, ""), Path(self._args.log).parent)
        return 0

    def _redirect_output(self) -> None:
        log = os.open(self._args.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        os.close(null)

    def _wait_for_reason(self) -> str:
        while True:
            if self._owner is not None and self._owner.find() is None:
                return f"its owner (pid {self._owner.pid}) has ended"
            caught = signal.sigtimedwait(_WATCHED, _IDLE_POLL_S if self._owner is None else _OWNER_POLL_S)
            self._reap()
            if self._exit_code is not None:
                return f"{self._args.name} ended by itself with {_describe(self._exit_code)}"
            if caught is not None and caught.si_signo in (signal.SIGTERM, signal.SIGINT):
                return f"asked to (signal {caught.si_signo})"

    def _stop_tree(self) -> None:
        """Let the command end in its own way, then end whatever of its descendants remains."""
        if self._exit_code is None:
            os.kill(self._main_pid, signal.SIGTERM)
            deadline = time.monotonic() + self._args.grace_s
            while self._exit_code is None and time.monotonic() < deadline:
                signal.sigtimedwait({signal.SIGCHLD}, 0.1)
                self._reap()
        grace_s = 1.0
        while remaining := psutil.Process().children(recursive=True):
            end(remaining, grace_s)
            self._reap()
            grace_s = 0.0

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._main_pid:
                self._exit_code = os.waitstatus_to_exitcode(status)

    def _say(self, text: str) -> None:
        print(
            f"[draftline] {time.strftime('%Y-%m-%d %H:%M:%S')} {self._args.name}: {text}", file=sys.stderr, flush=True
        )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m pipelines.embedded.supervise", description="Run one service.")
    parser.add_argument("--name", required=True, help="the service's name, for its log")
    parser.add_argument("--log", required=True, help="file that takes the service's output")
    parser.add_argument("--cwd", required=True, help="working directory of the service")
    parser.add_argument("--grace-s", type=float, default=8.0, help="seconds between SIGTERM and SIGKILL")
    parser.add_argument("--owner", type=_owner, help="PID:CREATE_TIME of the process whose end ends the service")
    parser.add_argument("--retire-dir", type=Path, help="directory to remove at the end, if it bears our signature")
    parser.add_argument("command", nargs="+", help="the service's command line, after --")
    return parser.parse_args(argv)


def _owner(text: str) -> ProcessId:
    pid, _, create_time = text.partition(":")
    return ProcessId(int(pid), float(create_time))


def _describe(exit_code: int) -> str:
    return f"exit code {exit_code}" if exit_code >= 0 else f"signal {-exit_code}"


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl failed")


if __name__ == "__main__":
    sys.exit(main())
