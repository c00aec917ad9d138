"""Launch a heavy station as a job on Ray, from a process that never imports ray.

The contract is files: ``request.json`` in, ``result.json`` out, exit code 0.
A job that cannot write its result for want of space says so by its exit code.
Locally the job is a child process that connects to ``RAY_ADDRESS`` (or starts
a Ray of its own when that is unset, as in a single pod). Its output is
streamed through; its last error comes back as the same exception.

:class:`JobRunner` is the interface: :func:`run_job` is the child process, and
on a cluster the components bring a runner that submits a RayJob. There both
files are objects in the step's scratch folder of the workspace.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from draftline import errors
from draftline.errors import DraftlineError, NoSpace, StepError
from draftline.progress import JsonlProgress, LineProgress, Progress, TaggedProgress
from draftline.spec import dump_spec, parse_spec
from draftline.steps.context import StepContext, StepOutput
from draftline.steps.ledger import StepResult
from draftline.storage import open_store
from draftline.storage.files import translated

if TYPE_CHECKING:
    from draftline.steps.stations import Station

EVENTS_ENV = "DRAFTLINE_EVENTS"
"""Names the progress file; set by the local runner, absent on a cluster."""

EVENTS_TO_LOG = "log"
"""Value of :data:`EVENTS_ENV` with which events go to the log, tagged, for whoever follows it."""


class JobRunner(Protocol):
    """Runs a station's Ray entry point and waits for it."""

    def __call__(self, station: Station, context: StepContext) -> StepOutput:
        """Errors as :func:`run_job`; called again after a crash it goes on where the work stopped."""
        ...


def progress_from_environment(environ: Mapping[str, str] = os.environ) -> Progress:
    """The progress sink of this process: the runner's events file, tagged lines, or lines to read."""
    path = environ.get(EVENTS_ENV)
    if path == EVENTS_TO_LOG:
        return TaggedProgress()
    return JsonlProgress(Path(path)) if path else LineProgress()


def run_job(station: Station, context: StepContext) -> StepOutput:
    """Run a station's Ray entry point and wait for it.

    Raises:
        DraftlineError: the error that the job reported.
        NoSpace: the disk that holds request and result is full.
        StepError: the job died without reporting one.
    """
    module = station.run.partition(":")[0]
    what = f"Cannot hand station {context.label!r} to its job"
    with translated(what):
        temporary = tempfile.TemporaryDirectory(prefix="draftline-job-")
    with temporary as folder:
        request, result = Path(folder, "request.json"), Path(folder, "result.json")
        with translated(what):
            request.write_text(request_document(context))
        command = [sys.executable, "-m", module, str(request), str(result)]
        completed = subprocess.run(command, env={**os.environ, "PYTHONUNBUFFERED": "1"}, check=False)
        if not result.exists():
            raise _died(context.label, completed.returncode, folder)
        document = result.read_text()
    return parse_result(document)


def parse_result(text: str | bytes) -> StepOutput:
    """The output in a ``result.json``.

    Raises:
        DraftlineError: the error that it holds instead.
    """
    document = json.loads(text)
    if "error" in document:
        raise revive(document["error"])
    return StepOutput(document["outputs"], document["metrics"])


def read_request(place: Path | str) -> StepContext:
    """The step context that :func:`request_document` described, rebuilt in the job's process.

    Args:
        place: A path, or the URI of an object.

    Raises:
        StorageError: the object cannot be read.
    """
    if is_uri(place):
        folder, _, name = str(place).rpartition("/")
        document = json.loads(open_store(folder).get(name))
    else:
        document = json.loads(Path(place).read_text())
    return StepContext(
        station=document["station"],
        key=document["key"],
        item=document["item"],
        spec=parse_spec(document["spec"]),
        store=open_store(document["workspace"]),
        inputs={name: StepResult.from_json(text) for name, text in document["inputs"].items()},
        progress=progress_from_environment(),
    )


def is_uri(place: Path | str) -> bool:
    """Whether a request or a result lies in a workspace instead of on this machine's disk."""
    return "://" in str(place)


def report_result(place: Path | str, outcome: StepOutput | DraftlineError) -> int:
    """Write ``result.json`` and return the exit code with which the job must end.

    A full disk takes no result: then the exit code alone says so, and the
    log takes what the result would have been if it was an error.
    """
    try:
        write_result(place, outcome)
    except NoSpace as error:
        # The log may be on the same disk.
        with contextlib.suppress(OSError):
            if isinstance(outcome, DraftlineError):
                print(outcome, file=sys.stderr)
            print(error, file=sys.stderr, flush=True)
        return error.exit_code
    return outcome.exit_code if isinstance(outcome, DraftlineError) else 0


def write_result(place: Path | str, outcome: StepOutput | DraftlineError) -> None:
    """Write ``result.json`` atomically: an output or an error.

    Args:
        place: A path, or the URI of an object.
        outcome: What came of the job.

    Raises:
        NoSpace, StorageError: it cannot be written.
    """
    if isinstance(outcome, StepOutput):
        document: dict[str, object] = asdict(outcome)
    else:
        document = {"error": error_document(outcome)}
    if is_uri(place):
        folder, _, name = str(place).rpartition("/")
        open_store(folder).put(name, json.dumps(document).encode())
        return
    path = Path(place)
    temporary = path.with_suffix(".tmp")
    with translated(f"Cannot write {path}"):
        temporary.write_text(json.dumps(document))
        temporary.replace(path)


def error_document(error: DraftlineError) -> dict[str, str | None]:
    """An error as plain text fields, which :func:`revive` reads."""
    return {
        "type": type(error).__name__,
        "what": error.what,
        "got": None if error.got is None else str(error.got),
        "expected": error.expected,
        "remedy": error.remedy,
    }


def revive(error: Mapping[str, str | None]) -> DraftlineError:
    """The exception that :func:`error_document` described."""
    kind = getattr(errors, str(error["type"]), StepError)
    cls = kind if isinstance(kind, type) and issubclass(kind, DraftlineError) else StepError
    return cls(str(error["what"]), got=error["got"], expected=error["expected"], remedy=error["remedy"])


def request_document(context: StepContext) -> str:
    """A step context as text (JSON), which :func:`read_request` reads."""
    return json.dumps(
        {
            "station": context.station,
            "key": context.key,
            "item": context.item,
            "workspace": context.store.uri,
            "spec": dump_spec(context.spec),
            "inputs": {name: value.to_json() for name, value in context.inputs.items()},
        }
    )


def _died(label: str, exit_code: int, folder: str) -> DraftlineError:
    if exit_code == NoSpace.exit_code:
        return NoSpace(
            f"the job of station {label!r} could not write its result",
            got=f"a full disk at {folder}",
            remedy="Free some space; start the same run again and it continues where it stopped",
        )
    return StepError(
        f"the job of station {label!r} died without a result",
        got=f"exit code {exit_code}",
        remedy="Read its log above; start the same run again and it continues where it stopped",
    )
