"""Where the tests of jobs run them: as in production, as child processes on a real Ray."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from draftline.jobs import EVENTS_ENV
from draftline.spec import RunSpec, dump_spec
from draftline.steps.context import StepContext, StepOutput
from draftline.storage.local import LocalStore


@dataclass(frozen=True)
class Bench:
    """Where the jobs run.

    Attributes:
        folder: For requests, results and logs.
        env: Of the jobs.
        spec: What most of them run.
        store: The workspace.
        ray_pid: The process above all of Ray's.
    """

    folder: Path
    env: Mapping[str, str]
    spec: RunSpec
    store: LocalStore
    ray_pid: int

    def start(self, module: str, context: StepContext) -> tuple[subprocess.Popen[bytes], Path]:
        """The job as a child in a process group of its own, and its result file."""
        request, result = self.folder / f"{context.key}.json", self.folder / f"{context.key}-result.json"
        request.write_text(
            json.dumps(
                {
                    "station": context.station,
                    "key": context.key,
                    "item": context.item,
                    "workspace": self.store.uri,
                    "spec": dump_spec(context.spec),
                    "inputs": {name: value.to_json() for name, value in context.inputs.items()},
                }
            )
        )
        log = open(self.folder / f"{context.key}.log", "ab")  # noqa: SIM115 (the child keeps it)
        with log:
            process = subprocess.Popen(
                [sys.executable, "-m", module, str(request), str(result)],
                env={**self.env, EVENTS_ENV: str(self.events(context))},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return process, result

    def events(self, context: StepContext) -> Path:
        """The progress file of the job's next (or present) run."""
        return self.folder / f"{context.key}.events"

    def finish(self, module: str, context: StepContext) -> StepOutput:
        """Run the job to its end, with a progress file of its own."""
        if self.events(context).exists():
            self.events(context).rename(self.folder / f"{context.key}.events-before")
        process, result = self.start(module, context)
        try:
            code = process.wait(240)
        finally:
            self.kill(process)
        log = (self.folder / f"{context.key}.log").read_text()
        assert code == 0, log[-3000:]
        return StepOutput(**json.loads(result.read_text()))

    def kill_when(self, module: str, context: StepContext, is_time: Callable[[], bool]) -> None:
        """Start the job and SIGKILL its whole group at the given moment."""
        process, result = self.start(module, context)
        try:
            deadline = time.monotonic() + 240
            while not is_time():
                assert process.poll() is None, (self.folder / f"{context.key}.log").read_text()[-3000:]
                assert time.monotonic() < deadline
                time.sleep(0.005)
        finally:
            self.kill(process)
        assert process.returncode == -signal.SIGKILL
        assert not result.exists()

    @staticmethod
    def kill(process: subprocess.Popen[bytes]) -> None:
        """End the group of a child that may be over already."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)

    def names(self, context: StepContext, folder: str = "") -> list[str]:
        """Objects of a step, relative to its folder."""
        prefix = f"{context.prefix}/{folder}"
        return [info.key.removeprefix(f"{context.prefix}/") for info in self.store.list(prefix)]
