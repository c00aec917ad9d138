"""What every component does: read the spec and the inputs, run the station, write the result.

Runs in the step's own process: a pod on a cluster, a child of the local
runner otherwise. Components call nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from components.live_metrics import live_metrics
from draftline.errors import DraftlineError
from draftline.jobs import JobRunner, progress_from_environment, run_job
from draftline.spec import RunSpec, load_spec, parse_spec
from draftline.steps import StepContext, StepOutput, StepResult
from draftline.steps.execute import execute, step_key
from draftline.steps.stations import Station
from draftline.storage import ObjectStore, open_store
from draftline.storage.files import translated
from draftline.storage.uri import parse_uri

FAILURE_ENV = "DRAFTLINE_FAILURE"
"""Names the file that takes the error of a failed step; set by the local runner, absent on a cluster."""


class Artifact(Protocol):
    """What is used of a ``kfp.dsl.Artifact``."""

    @property
    def path(self) -> str:
        """Its file on this machine."""
        ...

    @property
    def metadata(self) -> MutableMapping[str, Any]:
        """Facts for the KFP page."""
        ...


class Metrics(Artifact, Protocol):
    """What is used of a ``kfp.dsl.Metrics``."""

    def log_metric(self, metric: str, value: float) -> None:
        """Record one number for the KFP page."""
        ...


def run_station(
    station: str,
    spec_uri: str,
    workspace: str,
    inputs: Mapping[str, Artifact | Sequence[Artifact]],
    *,
    result: Artifact,
    item: str = "",
    metrics: Metrics | None = None,
    card: Artifact | None = None,
    page: Artifact | None = None,
    job: Mapping[str, Any] | None = None,
) -> StepResult:
    """Bring one station to its committed result and describe it to KFP.

    Args:
        station: Its name in :data:`draftline.steps.STATIONS`.
        spec_uri: Path or object URI of the resolved spec.
        workspace: URI of the workspace.
        inputs: Artifacts by station, each holding a :class:`StepResult`; a
            list where the station fans out.
        result: Its file receives the result, its metadata a summary.
        item: Fan-out item.
        metrics: Receives the result's numbers.
        card: Receives the report's ``card.md``.
        page: Receives what the step has to show, as HTML.
        job: Settings of the RayJob that does the work, see :class:`components.cluster.settings.JobSettings`; empty
            does it in this pod or on this machine.

    Returns:
        The committed result.

    Raises:
        DraftlineError: whatever the station raises; also written to the file
            that the local runner names.
    """
    try:
        spec = read_spec(spec_uri)
        store = open_store(workspace)
        given = read_inputs(inputs)
        with live_metrics(station, lambda: step_key(station, spec, given, item), spec.name):
            outcome = execute(
                station, spec, store, given, progress_from_environment(), item=item, runner=job_runner(job)
            )
        with translated(f"Cannot write the artifacts of {station}"):
            Path(result.path).write_text(outcome.to_json(), encoding="utf-8")
            result.metadata.update(summarise(outcome))
            if metrics is not None:
                write_metrics(outcome, metrics)
            if card is not None:
                copy_page(outcome, store, "card.md", card)
            if page is not None:
                write_page(spec, store, given, outcome, page)
    except Exception as error:
        # The process boundary: kfp.local would tell its parent no more than that the step failed.
        record_failure(error, f"{station}:{item}" if item else station, os.environ)
        raise
    return outcome


def job_runner(job: Mapping[str, Any] | None) -> JobRunner:
    """What runs the work of a heavy step: RayJobs with these settings, or without settings a child process.

    Raises:
        SpecError: a setting is wrong.
        DraftlineError: there is no way to the Kubernetes API.
    """
    if not job:
        return run_job
    from components.cluster.runner import ray_job_runner

    # Asked for late: a step whose result is there needs no cluster.
    def run_ray_job(station: Station, context: StepContext) -> StepOutput:
        return ray_job_runner(job)(station, context)

    return run_ray_job


def read_spec(spec_uri: str) -> RunSpec:
    """Read the resolved spec from a path or an object URI.

    Raises:
        SpecError: it is missing or not valid.
        StorageError: the object cannot be read.
    """
    place = parse_uri(spec_uri)
    if isinstance(place, Path):
        return load_spec(place)
    folder, _, name = spec_uri.rpartition("/")
    return parse_spec(open_store(folder).get(name).decode("utf-8"), origin=spec_uri)


def read_inputs(inputs: Mapping[str, Artifact | Sequence[Artifact]]) -> dict[str, StepResult]:
    """Read input artifacts; the branches of a fan-out become ``station:item``.

    Raises:
        FormatError: an artifact does not hold a step result.
    """
    results: dict[str, StepResult] = {}
    for station, given in inputs.items():
        for artifact in given if isinstance(given, Sequence) else [given]:
            found = StepResult.from_json(Path(artifact.path).read_bytes(), origin=f"the input {station!r}")
            results[f"{station}:{found.item}" if found.item else station] = found
    return results


def summarise(outcome: StepResult) -> dict[str, str | float]:
    """Flat facts for the artifact's metadata: the key, the objects' folder and every plain number."""
    summary: dict[str, str | float] = {"key": outcome.key, "folder": outcome.prefix}
    if outcome.item:
        summary["item"] = outcome.item
    for name, value in sorted(outcome.outputs.items()):
        if name == "counts" and isinstance(value, Mapping):
            summary.update({f"count_{part}": count for part, count in sorted(value.items())})
        elif isinstance(value, str | bool | int | float):
            summary[name] = value
    summary.update(sorted(outcome.metrics.items()))
    return summary


def write_metrics(outcome: StepResult, metrics: Metrics) -> None:
    """Put the result's numbers where the KFP page shows them."""
    for name, value in sorted(outcome.metrics.items()):
        metrics.log_metric(name, float(value))
    # An artifact without a file never hits kfp's local cache and has nothing to upload.
    Path(metrics.path).write_text("{}", encoding="utf-8")


def copy_page(outcome: StepResult, store: ObjectStore, name: str, target: Artifact) -> None:
    """Copy one file of the result to an artifact that the KFP page shows.

    Raises:
        StorageError: the file cannot be read.
    """
    Path(target.path).write_bytes(store.get(f"{outcome.prefix}/{name}"))


def write_page(
    spec: RunSpec, store: ObjectStore, inputs: Mapping[str, StepResult], outcome: StepResult, target: Artifact
) -> None:
    """Put the step's page where the KFP page shows it: the report's as it was written, others drawn from the result.

    Raises:
        FormatError: the training history is damaged.
        StorageError: the workspace failed.
    """
    if outcome.station == "report":
        copy_page(outcome, store, "report.html", target)
        return
    from draftline.report.step_pages import render_step_page

    Path(target.path).write_text(render_step_page(spec, store, inputs, outcome), encoding="utf-8")


def record_failure(error: Exception, label: str, environ: Mapping[str, str]) -> None:
    """Leave a failed step's error for the local runner; the first one counts."""
    path = environ.get(FAILURE_ENV)
    if not path:
        return
    is_expected = isinstance(error, DraftlineError)
    document = {
        "step": label,
        "message": str(error) if is_expected else f"{type(error).__name__}: {error}",
        "exit_code": error.exit_code if isinstance(error, DraftlineError) else 1,
        "is_expected": is_expected,
    }
    try:
        handle = open(path, "x", encoding="utf-8")  # noqa: SIM115 (closed below)
    except OSError:
        # An earlier failure, or no room for a name, must not hide the error at hand.
        _print_traceback()
        return
    try:
        with handle:
            json.dump(document, handle)
    except OSError:
        # A full disk: half a document would be taken for the whole one.
        Path(path).unlink(missing_ok=True)
        _print_traceback()


def _print_traceback() -> None:
    # The log is probably on the same full disk.
    with contextlib.suppress(OSError):
        traceback.print_exc(file=sys.stderr)
