"""Run the training DAG on this machine and show how it goes.

The pipeline runs in a child process (:mod:`pipelines.local_child`); this
process follows the events file, draws, and turns the outcome into values.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console

from components.runtime import FAILURE_ENV
from draftline.errors import DraftlineError, NoSpace, StepError, StorageError
from draftline.jobs import EVENTS_ENV
from draftline.spec import RunSpec
from draftline.steps import STATIONS, StepResult
from draftline.storage.files import translated
from pipelines.embedded.processes import end
from pipelines.events import EventFollower, RunProgress, run_labels
from pipelines.interrupts import ignore_interrupts
from pipelines.local_child import GRACE_S
from pipelines.progress_view import open_view

POLL_S = 0.25
_PROBE_BYTES = 64 * 1024


@dataclass(frozen=True)
class LocalRun:
    """One run to be made.

    Attributes:
        spec: The resolved spec, as stored at ``spec_uri``.
        spec_uri: Where the steps read it.
        workspace: URI of the workspace.
        folder: For this attempt's log, events and artifacts; new and empty.
        environment: Added to this process's environment for the steps.
    """

    spec: RunSpec
    spec_uri: str
    workspace: str
    folder: Path
    environment: Mapping[str, str]

    @property
    def log(self) -> Path:
        """Everything that the steps print."""
        return self.folder / "pipeline.log"

    @property
    def events(self) -> Path:
        """Progress events of all steps."""
        return self.folder / "events.jsonl"

    @property
    def failure(self) -> Path:
        """The first failed step's error."""
        return self.folder / "failure.json"

    @property
    def artifacts(self) -> Path:
        """KFP's artifacts."""
        return self.folder / "artifacts"


class RunFailed(DraftlineError):
    """A step failed; carries the step's own message and exit code."""

    def __init__(self, message: str, *, exit_code: int, log: Path) -> None:
        super().__init__(message, remedy=f"The log is {log}")
        self.exit_code = exit_code


def new_folder(home: Path, run_id: str) -> Path:
    """A new folder for one attempt at a run: ``<home>/runs/<run id>/<number>``.

    Raises:
        StorageError: it cannot be created.
    """
    parent = home / "runs" / run_id
    try:
        parent.mkdir(parents=True, exist_ok=True)
        number = 1 + max((int(child.name) for child in parent.iterdir() if child.name.isdecimal()), default=0)
        folder = parent / f"{number:03d}"
        folder.mkdir()
    except OSError as error:
        raise StorageError(
            f"cannot create a folder in {parent}: {error.strerror}", remedy="Choose another place with --home"
        ) from None
    return folder


def run_local(run: LocalRun, console: Console) -> dict[str, StepResult]:
    """Run the pipeline to its end.

    On an exception, Ctrl-C included, the steps and everything they started
    are stopped before it leaves.

    Args:
        run: What to run.
        console: Where to draw.

    Returns:
        The result of every step that ran or was already done, by ``station`` or ``station:item``.

    Raises:
        RunFailed: a step failed.
        StepError: the pipeline's process died.
        StorageError: the run's own files cannot be written; NoSpace where the disk is full.
    """
    progress = RunProgress.for_run(run_labels(run.spec.evaluation.suites, STATIONS), time.time())
    follower = EventFollower(run.events)
    # kfp leaves a temporary directory per step; here they all lie in one that goes at the end.
    with translated("Cannot create a temporary directory for the run"):
        temporary = tempfile.TemporaryDirectory(prefix="draftline-run-", ignore_cleanup_errors=True)
    with temporary as scratch:
        with translated(f"Cannot start the run in {run.folder}"):
            child = _start(run, scratch)
        try:
            with open_view(console, progress) as view:
                while child.poll() is None:
                    _advance(follower, progress)
                    view.update(time.time())
                    time.sleep(POLL_S)
                _advance(follower, progress)
                if child.returncode == 0:
                    progress.settle()
                view.update(time.time())
        finally:
            _stop(child)
    if child.returncode != 0:
        raise explain_failure(run, progress, child.returncode)
    return collect_results(run.artifacts)


def collect_results(artifacts: Path) -> dict[str, StepResult]:
    """Read the step results among a run's artifacts, by ``station`` or ``station:item``."""
    results: dict[str, StepResult] = {}
    for path in sorted(artifacts.rglob("result")):
        found = StepResult.from_json(path.read_bytes(), origin=str(path))
        results[f"{found.station}:{found.item}" if found.item else found.station] = found
    return results


def explain_failure(run: LocalRun, progress: RunProgress, return_code: int) -> DraftlineError:
    """The error of a pipeline that ended without success, from whatever it could leave behind.

    Args:
        run: Its folder may hold the failed step's own error.
        progress: What was heard of it.
        return_code: Of its process; negative for a signal.
    """
    told = _read_failure(run.failure)
    if told is not None:
        return RunFailed(told[0], exit_code=told[1], log=run.log)
    unfinished = [line.label for line in progress.stations.values() if line.state in ("running", "failed")]
    how = f"by signal {-return_code}" if return_code < 0 else f"exit code {return_code}"
    what = f"step {unfinished[-1]} died" if unfinished else "the pipeline died before its first step"
    again = "start the same command again to continue where it stopped"
    if _is_full(run.folder):
        return NoSpace(what, got=f"{how} and a full disk at {run.folder}", remedy=f"Free some space, then {again}")
    return StepError(what, got=how, remedy=f"The log is {run.log}; {again}")


def _start(run: LocalRun, scratch: str) -> subprocess.Popen[bytes]:
    request = run.folder / "request.json"
    document = {
        "parent_pid": os.getpid(),
        "scratch": scratch,
        "artifacts": str(run.artifacts),
        "arguments": {
            "spec_uri": run.spec_uri,
            "workspace": run.workspace,
            "suites": list(run.spec.evaluation.suites),
            # No RayJobs: heavy steps are child processes on the embedded Ray.
            "ray_job": {},
        },
    }
    request.write_text(json.dumps(document), encoding="utf-8")
    environment = {
        **os.environ,
        **run.environment,
        EVENTS_ENV: str(run.events),
        FAILURE_ENV: str(run.failure),
        "TMPDIR": scratch,
        "PYTHONUNBUFFERED": "1",
        # The steps print for a log file, whatever terminal this process has.
        "NO_COLOR": "1",
    }
    with open(run.log, "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "pipelines.local_child", str(request)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            # A group of its own: Ctrl-C reaches this process alone, which then ends the whole group.
            start_new_session=True,
        )


def _advance(follower: EventFollower, progress: RunProgress) -> None:
    for event in follower.poll():
        progress.apply(event)


def _stop(child: subprocess.Popen[bytes]) -> None:
    """End whatever remains of the pipeline's process group and of its descendants."""
    remaining = _members(child.pid)
    if not remaining:
        child.wait()
        return
    # An impatient second Ctrl-C must not leave half of it running.
    with ignore_interrupts():
        end(remaining, GRACE_S)
        end(_members(child.pid), 0.0)
        child.wait()


def _members(group: int) -> list[psutil.Process]:
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group or os.getsid(process.pid) == group:
                found[process.pid] = process
                found.update({child.pid: child for child in process.children(recursive=True)})
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return [process for process in found.values() if process.is_running()]


def _read_failure(path: Path) -> tuple[str, int] | None:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return f"step {document['step']} failed: {document['message']}", int(document["exit_code"])
    except (OSError, ValueError, KeyError, TypeError):
        # Absent, or cut off by a full disk or a kill.
        return None


def _is_full(folder: Path) -> bool:
    """Whether the disk takes no more: the one thing that also keeps a step from saying what is wrong."""
    probe = folder / "space-probe"
    try:
        with translated(f"Cannot write {probe}"), open(probe, "wb") as handle:
            handle.write(bytes(_PROBE_BYTES))
            handle.flush()
            os.fsync(handle.fileno())
    except NoSpace:
        return True
    except StorageError:
        return False
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
    return False
