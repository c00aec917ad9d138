"""``draftline submit``: put a pipeline on a Kubeflow Pipelines server, start it once or on a schedule, and watch it."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from draftline import __version__
from draftline.errors import DraftlineError, PlatformError, SpecError, StepError
from draftline.spec import RunSpec, dump_spec
from draftline.storage import join_uri, open_store
from pipelines.compile import compile_pipeline, load_pipeline

_API = "/apis/v2beta1"
_TIMEOUT_S = 20.0
_POLL_S = 5.0
_UNREACHABLE_S = 300.0
_OVER = frozenset({"SUCCEEDED", "FAILED", "SKIPPED", "CANCELED"})
_CRON_FIELDS = 6
SPECS = "specs"
"""Folder of the workspace for the specs of submitted runs."""

_UNIT_S = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


@dataclass(frozen=True)
class Server:
    """A Kubeflow Pipelines API server.

    Attributes:
        host: Its URL, as in the browser.
        token: For ``Authorization: Bearer``; empty where it asks for none.
        namespace: Of the profile, with multi-user Kubeflow; empty otherwise.
    """

    host: str
    token: str = ""
    namespace: str = ""


@dataclass(frozen=True)
class Submission:
    """What is to run.

    Attributes:
        pipeline: Its name, see :data:`pipelines.compile.PIPELINES`.
        parameters: All of them but those with a default to keep.
        experiment: Name; created when missing.
        run_name: Shown in the list of runs.
        service_account: Of the run's pods; empty takes the server's default.
        every_s: Seconds between runs; ``None`` runs once unless ``cron`` says otherwise.
        cron: Six fields, seconds first.
    """

    pipeline: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    experiment: str = "draftline"
    run_name: str = "draftline"
    service_account: str = ""
    every_s: int | None = None
    cron: str | None = None


@dataclass(frozen=True)
class Submitted:
    """What the server made of it.

    Attributes:
        pipeline_id: Of the pipeline.
        version_id: Of the version that runs.
        run_id: Of the run, or of the recurring run.
        is_recurring: Which of the two.
    """

    pipeline_id: str
    version_id: str
    run_id: str
    is_recurring: bool


def parse_every(text: str) -> int:
    """Seconds of ``30m``, ``12h``, ``1d`` or ``2w``.

    Raises:
        SpecError: something else.
    """
    found = re.fullmatch(r"([1-9]\d*)([mhdw])", text.strip())
    if found is None:
        raise SpecError("--every is no interval", got=repr(text), expected="a number and a unit: 30m, 12h, 1d, 2w")
    return int(found[1]) * _UNIT_S[found[2]]


def check_cron(text: str) -> str:
    """A cron expression of six fields, as Kubeflow takes it.

    Raises:
        SpecError: it has another number of fields.
    """
    if len(text.split()) != _CRON_FIELDS:
        raise SpecError(
            "--cron needs six fields, seconds first",
            got=repr(text),
            expected="for example '0 0 3 * * *', daily at three",
        )
    return text


def parse_parameters(pipeline: str, assignments: list[str]) -> dict[str, Any]:
    """Parameters of ``NAME=VALUE``; a value of a structure or list is JSON.

    Raises:
        SpecError: the pipeline has no such parameter, or the value has another type.
    """
    kinds = load_pipeline(pipeline).pipeline_spec.root.input_definitions.parameters
    given: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or name not in kinds:
            raise SpecError(
                f"the pipeline {pipeline} has no such parameter",
                got=repr(assignment),
                expected=f"NAME=VALUE, with NAME one of {', '.join(sorted(kinds))}",
            )
        given[name] = _typed(name, text, kinds[name].parameter_type)
    return given


def takes_spec(pipeline: str) -> bool:
    """Whether a pipeline works on a run spec."""
    return "spec_uri" in load_pipeline(pipeline).pipeline_spec.root.input_definitions.parameters


def store_spec(spec: RunSpec, workspace: str) -> str:
    """Put a resolved spec into the workspace, where the steps read it; its URI.

    Raises:
        SpecError: the workspace is on this machine, where no pod can read it.
        StorageError: it cannot be written.
    """
    if not workspace.startswith("s3://"):
        raise SpecError(
            "the steps of a cluster cannot read this workspace",
            got=workspace,
            expected="s3://bucket/prefix",
            remedy="Give --workspace, and AWS_* variables with which this machine may write there",
        )
    text = dump_spec(spec)
    key = f"{SPECS}/{spec.name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.yaml"
    open_store(workspace).put(key, text.encode())
    return join_uri(workspace, key)


def submit(server: Server, submission: Submission) -> Submitted:
    """Create or update the pipeline, then create the run or the recurring run.

    A pipeline that is there already gets a version only when it is another
    one. A recurring run replaces those of its name in its experiment.

    Raises:
        PlatformError: the server does not answer, or refuses.
    """
    _require_answer(server)
    with _api_errors(server), tempfile.TemporaryDirectory(prefix="draftline-submit-") as folder:
        package = Path(folder, "pipeline.yaml")
        compile_pipeline(package, submission.pipeline)
        client = _client(server)
        pipeline_id, version_id = _ensure_version(client, server, submission.pipeline, package)
        experiment = client.create_experiment(submission.experiment, namespace=server.namespace or None)
        common = {
            "experiment_id": experiment.experiment_id,
            "job_name": submission.run_name,
            "params": dict(submission.parameters),
            "pipeline_id": pipeline_id,
            "version_id": version_id,
            "service_account": submission.service_account or None,
        }
        if submission.every_s is None and submission.cron is None:
            return Submitted(pipeline_id, version_id, client.run_pipeline(**common).run_id, False)
        before = _recurring_of_name(client, experiment.experiment_id, submission.run_name)
        made = client.create_recurring_run(
            **common,
            interval_second=submission.every_s,
            cron_expression=submission.cron,
            max_concurrency=1,
            no_catchup=True,
        )
        # After the new one is there: a failure in between leaves two, never none.
        for run_id in before:
            client.delete_recurring_run(run_id)
        return Submitted(pipeline_id, version_id, made.recurring_run_id, True)


def watch(server: Server, run_id: str, show: Callable[[str], None], *, poll_s: float = _POLL_S) -> None:
    """Show what a run's steps do until it ends.

    Args:
        server: Where it runs.
        run_id: Of the run.
        show: Takes a line at a time.
        poll_s: Between two looks.

    Raises:
        StepError: the run failed or was cancelled.
        PlatformError: the server stays away for five minutes.
    """
    client = _client(server)
    seen: dict[str, str] = {}
    answered_s = time.monotonic()
    while True:
        try:
            with _api_errors(server):
                run = client.get_run(run_id)
            answered_s = time.monotonic()
        except PlatformError as error:
            if time.monotonic() - answered_s > _UNREACHABLE_S or not isinstance(error, _Transient):
                raise
            time.sleep(poll_s)
            continue
        for task in (run.run_details.task_details if run.run_details else None) or []:
            state = str(task.state or "PENDING")
            if seen.get(task.task_id) != state:
                seen[task.task_id] = state
                show(f"{task.display_name}: {state.lower()}")
        if run.state in _OVER:
            if run.state in ("FAILED", "CANCELED"):
                raise _ended_badly(server, run)
            show(f"run {run_id}: {run.state.lower()}")
            return
        time.sleep(poll_s)


class _Transient(PlatformError):
    """The same request may succeed later."""


def _ensure_version(client: Any, server: Server, pipeline: str, package: Path) -> tuple[str, str]:
    """IDs of the pipeline and of the version that is this package."""
    name = f"draftline-{pipeline}"
    version = f"{__version__}-{hashlib.sha256(package.read_bytes()).hexdigest()[:12]}"
    pipeline_id = client.get_pipeline_id(name)
    if pipeline_id is None:
        made = client.upload_pipeline(str(package), pipeline_name=name, namespace=server.namespace or None)
        pipeline_id = made.pipeline_id
    wanted = {"operation": "EQUALS", "key": "display_name", "stringValue": version}
    found = client.list_pipeline_versions(pipeline_id, filter=json.dumps({"predicates": [wanted]})).pipeline_versions
    if found:
        return pipeline_id, found[0].pipeline_version_id
    return pipeline_id, client.upload_pipeline_version(str(package), version, pipeline_id).pipeline_version_id


def _recurring_of_name(client: Any, experiment_id: str, name: str) -> list[str]:
    wanted = {"operation": "EQUALS", "key": "display_name", "stringValue": name}
    found = client.list_recurring_runs(experiment_id=experiment_id, filter=json.dumps({"predicates": [wanted]}))
    return [run.recurring_run_id for run in found.recurring_runs or []]


def _client(server: Server) -> Any:
    # kfp takes half a second to import, and prints links and warnings of its own.
    from kfp import Client

    with warnings.catch_warnings(), _api_errors(server):
        warnings.simplefilter("ignore")
        return Client(
            host=server.host,
            existing_token=server.token or None,
            **({"namespace": server.namespace} if server.namespace else {}),
        )


def _require_answer(server: Server) -> None:
    """A first question with a short patience: kfp's client would ask for minutes."""
    headers = {"Authorization": f"Bearer {server.token}"} if server.token else {}
    url = f"{server.host.rstrip('/')}{_API}/healthz"
    try:
        response = httpx.get(url, headers=headers, timeout=_TIMEOUT_S)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise PlatformError(
            f"no Kubeflow Pipelines server answers at {server.host}",
            got=str(error) or type(error).__name__,
            remedy="`kubectl -n kubeflow port-forward svc/ml-pipeline 8888` makes one answer at http://127.0.0.1:8888",
        ) from None
    if response.status_code in (301, 302, 303, 307, 401, 403):
        raise PlatformError(
            f"{server.host} wants to know who asks",
            got=f"status {response.status_code}",
            remedy="Give a token: --token, or KFP_TOKEN in the environment",
        )
    try:
        is_kfp = response.is_success and isinstance(response.json(), dict)
    except ValueError:
        is_kfp = False
    if not is_kfp:
        raise PlatformError(
            f"{server.host} is no Kubeflow Pipelines server",
            got=f"status {response.status_code} at {url}",
            expected="its API server, or a proxy in front of it",
        )


@contextlib.contextmanager
def _api_errors(server: Server) -> Iterator[None]:
    """Turn the client's errors into ours, and keep what it prints to itself."""
    from kfp_server_api import ApiException
    from urllib3.exceptions import HTTPError

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except ApiException as error:
        kind = _Transient if (error.status or 0) >= 500 or error.status == 429 else PlatformError
        raise kind(f"{server.host} refuses", got=f"{error.status} {_said(error)}") from None
    except HTTPError as error:
        raise _Transient(f"{server.host} does not answer", got=str(error).splitlines()[0]) from None
    except (ValueError, TimeoutError) as error:
        if isinstance(error, DraftlineError):
            raise
        raise PlatformError(f"{server.host} gave an answer that makes no sense", got=str(error)) from None


def _ended_badly(server: Server, run: Any) -> StepError:
    tasks = (run.run_details.task_details if run.run_details else None) or []
    failed = sorted({str(task.display_name) for task in tasks if task.state == "FAILED"})
    why = run.error.message if run.error is not None and run.error.message else ""
    return StepError(
        f"the run {run.display_name} {'was cancelled' if run.state == 'CANCELED' else 'failed'}",
        got="; ".join(part for part in (f"in {', '.join(failed)}" if failed else "", why) if part) or None,
        remedy=f"See {server.host}/#/runs/details/{run.run_id}; start it again and it continues where it stopped",
    )


def _said(error: Any) -> str:
    try:
        document = json.loads(error.body)
        return str(document.get("error_message") or document.get("error") or document["message"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return str(error.reason)


def _typed(name: str, text: str, kind: int) -> Any:
    from kfp.pipeline_spec.pipeline_spec_pb2 import ParameterType

    if kind == ParameterType.STRING:
        return text
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    expected: dict[int, tuple[type[Any], ...]] = {
        ParameterType.LIST: (list,),
        ParameterType.STRUCT: (dict,),
        ParameterType.BOOLEAN: (bool,),
        ParameterType.NUMBER_INTEGER: (int,),
        ParameterType.NUMBER_DOUBLE: (int, float),
    }
    if not isinstance(value, expected[kind]):
        wanted = " or ".join(one.__name__ for one in expected[kind])
        raise SpecError(f"the parameter {name} has another type", got=text, expected=f"JSON of a {wanted}")
    return value
