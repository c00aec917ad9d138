"""Runs a heavy step as a RayJob: submit or find it, follow it, bring its result back, cancel it on SIGTERM.

Request and result are objects in the step's scratch folder of the workspace.
The job is named after the step's content key: a step that is started again,
because its pod died or the run was retried, finds the job that it started
before and waits for it instead of starting a second one.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from components.cluster.api import Cluster, current_namespace
from components.cluster.logs import LogFollower
from components.cluster.manifest import GROUP, PLURAL, JobPlan, PodFacts, build_ray_job, job_name
from components.cluster.settings import JobSettings, read_settings
from draftline.errors import DraftlineError, ObjectNotFound, StepError
from draftline.jobs import parse_result, request_document
from draftline.storage import join_uri

if TYPE_CHECKING:
    from draftline.steps import StepContext, StepOutput
    from draftline.steps.stations import Station

EXIT_TERMINATED = 128 + signal.SIGTERM
_CANCEL_WITHIN_S = 20.0
"""Kubernetes kills a pod 30 s after it asked it to end."""

_FINAL_REASONS = frozenset({"DeadlineExceeded", "ValidationFailed"})
"""Of a failed job: another attempt would end alike."""


class Terminated(SystemExit):
    """The step's pod was asked to end."""


@dataclass(frozen=True)
class JobEnd:
    """How a RayJob stands.

    Attributes:
        is_over: It will not change any more.
        has_failed: It is over and not well.
        reason: KubeRay's word for why, may be empty.
        message: The same in a sentence, may be empty.
        phase: For people: deployment status and job status.
    """

    is_over: bool
    has_failed: bool
    reason: str
    message: str
    phase: str


def read_status(job: Mapping[str, Any]) -> JobEnd:
    """How a RayJob stands, from its ``status`` (``ray-operator/apis/ray/v1/rayjob_types.go``)."""
    status = job.get("status") or {}
    deployment, work = status.get("jobDeploymentStatus", ""), status.get("jobStatus", "")
    is_over = deployment in ("Complete", "Failed", "ValidationFailed")
    has_failed = is_over and (deployment != "Complete" or work != "SUCCEEDED")
    reason = status.get("reason", "") or ("ValidationFailed" if deployment == "ValidationFailed" else "")
    phase = " ".join(part for part in (deployment or "Submitted", work and f"({work})") if part)
    return JobEnd(is_over, has_failed, reason, status.get("message", ""), phase)


class RayJobRunner:
    """A :class:`draftline.jobs.JobRunner` on KubeRay.

    Args:
        cluster: Where jobs are submitted.
        pod: What they take over from the step's pod.
        settings: Their size and place.
    """

    def __init__(self, cluster: Cluster, pod: PodFacts, settings: JobSettings) -> None:
        self._cluster = cluster
        self._pod = pod
        self._settings = settings

    def __call__(self, station: Station, context: StepContext) -> StepOutput:
        """Run the station's entry point in a RayJob and wait for it.

        Raises:
            DraftlineError: the error that the job reported.
            StepError: the job died again and again without reporting one, was deleted, or is not valid.
            PlatformError: the Kubernetes API does not answer, or refuses.
            Terminated: this process got SIGTERM; the job is deleted.
        """
        name = job_name(station.name, context.store.uri, context.key)
        places = _Places(context)
        attempt = 0
        with self._cancelling(name):
            while True:
                attempt += 1
                if (done := self._submit(name, station, context, places)) is not None:
                    return done
                with LogFollower(self._cluster, name, context.progress):
                    end = self._wait(name, context)
                if (document := places.read_result()) is not None:
                    return parse_result(document)
                if end is None:
                    raise _deleted(context.label, name)
                if not end.has_failed or end.reason in _FINAL_REASONS or attempt > self._settings.retries:
                    raise _failed(context.label, name, self._cluster.namespace, end)
                _say(context, f"RayJob {name} failed ({_why(end)}); attempt {attempt + 1}")

    def _submit(self, name: str, station: Station, context: StepContext, places: _Places) -> StepOutput | None:
        """Leave a job under the name that runs or will run; or the result, when one was here before and is gone."""
        found = self._cluster.get(GROUP, PLURAL, name)
        if found is not None and (_is_going(found) or self._is_useless(found, places)):
            self._cluster.delete(GROUP, PLURAL, name)
            for state in self._cluster.changes(GROUP, PLURAL, name):
                if state is None:
                    break
            found = None
        if found is not None:
            _say(context, f"found RayJob {name}: {read_status(found).phase}")
            return None
        document = places.read_result()
        if document is not None:
            # Finished and removed by its TTL while nobody looked; an error is tried again.
            with suppress(DraftlineError):
                return parse_result(document)
            places.delete_result()
        places.write_request()
        module = station.run.partition(":")[0]
        plan = JobPlan(
            name=name,
            namespace=self._cluster.namespace,
            command=("python", "-m", module, places.request_uri, places.result_uri),
            settings=self._settings,
            pod=self._pod,
            labels={"draftline.io/station": station.name, "draftline.io/key": context.key},
            annotations={
                "draftline.io/workspace": context.store.uri,
                "draftline.io/run": context.spec.name,
                "draftline.io/item": context.item,
            },
        )
        was_created = self._cluster.create(GROUP, PLURAL, build_ray_job(plan))
        _say(context, f"{'submitted' if was_created else 'found'} RayJob {name}")
        return None

    def _is_useless(self, job: Mapping[str, Any], places: _Places) -> bool:
        end = read_status(job)
        # Well and without a result: the step was committed, and its result was removed since.
        return end.has_failed or (end.is_over and places.read_result() is None)

    def _wait(self, name: str, context: StepContext) -> JobEnd | None:
        """Until the job is over; ``None`` when it was deleted."""
        shown = ""
        for job in self._cluster.changes(GROUP, PLURAL, name):
            if job is None:
                return None
            end = read_status(job)
            if end.phase != shown:
                shown = end.phase
                _say(context, f"RayJob {name}: {end.phase}")
            if end.is_over:
                return end
        return None

    @contextmanager
    def _cancelling(self, name: str) -> Iterator[None]:
        """Delete the job when this process is asked to end: nobody would wait for it any more."""
        is_main = threading.current_thread() is threading.main_thread()

        def terminate(signum: int, frame: object) -> None:
            raise Terminated(EXIT_TERMINATED)

        before = signal.signal(signal.SIGTERM, terminate) if is_main else None
        try:
            yield
        except (Terminated, KeyboardInterrupt):
            if is_main:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            print(f"asked to end: deleting RayJob {name}", flush=True)
            self._cluster.delete(GROUP, PLURAL, name, within_s=_CANCEL_WITHIN_S)
            raise
        finally:
            if is_main:
                signal.signal(signal.SIGTERM, before)


class _Places:
    """Request and result of one step in its workspace."""

    def __init__(self, context: StepContext) -> None:
        self._context = context
        self._request = f"{context.scratch}/job/request.json"
        self._result = f"{context.scratch}/job/result.json"
        self.request_uri = join_uri(context.store.uri, self._request)
        self.result_uri = join_uri(context.store.uri, self._result)

    def write_request(self) -> None:
        self._context.store.put(self._request, request_document(self._context).encode())

    def read_result(self) -> bytes | None:
        try:
            return self._context.store.get(self._result)
        except ObjectNotFound:
            return None

    def delete_result(self) -> None:
        self._context.store.delete(self._result)


def ray_job_runner(given: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> RayJobRunner:
    """The runner of a step's pod.

    Args:
        given: The pipeline's parameters for its jobs, see :class:`JobSettings`.
        environ: Of this process.

    Raises:
        SpecError: a parameter is wrong.
        DraftlineError: there is no way to the Kubernetes API.
    """
    settings = read_settings(given, environ)
    cluster = Cluster(current_namespace(environ), settings.unreachable_s)
    return RayJobRunner(cluster, cluster.own_pod(environ), settings)


def _say(context: StepContext, text: str) -> None:
    # Not a progress event: those are thinned out, and each of these says something new.
    print(f"[{context.label}] {text}", flush=True)


def _is_going(job: Mapping[str, Any]) -> bool:
    return bool(job["metadata"].get("deletionTimestamp"))


def _why(end: JobEnd) -> str:
    return ": ".join(part for part in (end.reason or end.phase, end.message) if part)


def _deleted(label: str, name: str) -> StepError:
    return StepError(
        f"the RayJob of station {label!r} was deleted before it had a result",
        got=name,
        remedy="Start the same run again and it continues where it stopped",
    )


def _failed(label: str, name: str, namespace: str, end: JobEnd) -> StepError:
    return StepError(
        f"the RayJob of station {label!r} {'failed' if end.has_failed else 'ended without a result'}",
        got=_why(end),
        remedy=f"Its log is above; `kubectl -n {namespace} describe rayjob {name}` shows more. Start the same run "
        "again and it continues where it stopped",
    )
