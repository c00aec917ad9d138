"""Bring the endpoint up on a Ray cluster, and take it down; the driver may exit, the endpoint lives on.

``python -m serving.deploy REQUEST RESULT`` is the child process of the deploy
station (see :mod:`draftline.jobs`); ``deploy`` and ``undeploy`` are its parts.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from draftline.errors import DraftlineError, PlatformError, StepError
from draftline.jobs import read_request, report_result
from draftline.registry_layout import ALIAS_CHAMPION
from draftline.spec import ServingSpec
from draftline.steps.context import StepContext, StepOutput
from serving.registry import DraftFiles
from serving.replica import ReplicaConfig, StartReplica, open_draft_source, read_api_keys, start_replica

if TYPE_CHECKING:
    from ray import serve

HOST = "127.0.0.1"
DEFAULT_PORT = 8000
APP = "draftline"
"""Name of the Serve application. A platform has one endpoint: another run's deployment replaces what it serves."""
PORT_ENV = "DRAFTLINE_SERVE_PORT"
API_KEYS_FILE_ENV = "DRAFTLINE_API_KEYS_FILE"
TRACKING_URI_ENV = "MLFLOW_TRACKING_URI"

_POLL_S = 0.25


@dataclass(frozen=True)
class Endpoint:
    """A running endpoint.

    Attributes:
        endpoint: Base URL for OpenAI clients.
        model: Name to put in ``model``.
        app: Name of the Serve application.
        draft: The draft in use, ``None`` without one.
    """

    endpoint: str
    model: str
    app: str
    draft: str | None


def deploy(
    config: ReplicaConfig,
    *,
    app: str = APP,
    port: int = DEFAULT_PORT,
    ray_address: str | None = None,
    timeout_s: float = 300.0,
    start: StartReplica = start_replica,
) -> Endpoint:
    """Deploy and wait until one request was answered.

    A draft is fetched, verified and compared with the target here first, so
    that a bad one never makes Serve replace a replica that works. Deploying
    the same again changes nothing: replicas go on, and take another champion
    between two steps. Anything else replaces the replicas, each when its
    successor has loaded beside it.

    Args:
        config: For the replicas.
        app: Name of the Serve application.
        port: Of the HTTP proxy on 127.0.0.1; fixed by whoever starts Serve first.
        ray_address: A running Ray; ``None`` reads ``RAY_ADDRESS``.
        timeout_s: For everything after Serve has started.
        start: Puts a replica together.

    Raises:
        PlatformError: no Ray there, the port is taken, or the application does not come up.
        DraftlineError: the draft cannot be had or is not what was registered.
    """
    if config.spec.serving.engine == "vllm":
        return _deploy_vllm(config, app=app, port=port, ray_address=ray_address, timeout_s=timeout_s)
    wanted: str | None = None
    if config.has_draft:
        source = open_draft_source(config)
        files = source.fetch(wanted := source.current())
        _check_fits(config, files)
    _connect(ray_address)
    _start_serve(port)
    root = f"http://{HOST}:{port}"
    if not _is_deployed(root, config, app, start):
        # Serve makes up a new version each time, and would replace replicas by equal ones.
        from serving.app import build_app

        _run(build_app(config, start), app)
    deadline_s = time.monotonic() + timeout_s
    draft = _wait_for_health(root, wanted, deadline_s)
    _prove(f"{root}/v1", config, deadline_s)
    return Endpoint(f"{root}/v1", config.spec.serving.model_name, app, draft)


def _deploy_vllm(config: ReplicaConfig, *, app: str, port: int, ray_address: str | None, timeout_s: float) -> Endpoint:
    """The same with vLLM's engine; its replicas do not follow an alias, so each deployment takes the draft of now."""
    from serving.vllm.app import build_vllm_app, plan_app, require_vllm

    require_vllm()
    plan = plan_app(config)
    _connect(ray_address)
    _start_serve(port)
    root = f"http://{HOST}:{port}"
    _run(build_vllm_app(plan), app)
    deadline_s = time.monotonic() + timeout_s
    _prove(f"{root}/v1", config, deadline_s)
    return Endpoint(f"{root}/v1", config.spec.serving.model_name, app, plan.draft)


def undeploy(app: str = APP, *, ray_address: str | None = None) -> None:
    """Remove the application; Serve itself and other applications stay. Absent is fine."""
    from ray import serve

    _connect(ray_address)
    if app in serve.status().applications:
        serve.delete(app)


def run(context: StepContext, environ: Mapping[str, str] = os.environ) -> StepOutput:
    """The deploy station's work: serve the champion of the run's registered model.

    Raises:
        DraftlineError: as :func:`deploy`.
    """
    keys_file = environ.get(API_KEYS_FILE_ENV)
    model_name = context.inputs["register"].outputs["model_name"]
    config = ReplicaConfig(
        spec=context.spec,
        draft_uri=f"models:/{model_name}@{ALIAS_CHAMPION}" if _has_draft(context.spec.serving) else None,
        tracking_uri=environ.get(TRACKING_URI_ENV),
        num_threads=os.cpu_count() or 1,
        api_keys_file=Path(keys_file) if keys_file else None,
    )
    port = environ.get(PORT_ENV, str(DEFAULT_PORT))
    if not port.isdigit():
        raise PlatformError(f"{PORT_ENV} is no port", got=repr(port), expected="a number from 1 to 65535")
    context.report(0, 1, "endpoints", note="loading target and draft")
    endpoint = deploy(config, app=APP, port=int(port))
    context.report(1, 1, "endpoints", note=endpoint.endpoint)
    return StepOutput({"deployed": True, **asdict(endpoint)})


def _has_draft(serving: ServingSpec) -> bool:
    return serving.policy != "off" and serving.proposer == "draft"


def main(arguments: list[str]) -> int:
    """``REQUEST RESULT``: read one, write the other; the exit code is the error's."""
    request, result = Path(arguments[0]), Path(arguments[1])
    try:
        outcome: StepOutput | DraftlineError = run(read_request(request))
    except DraftlineError as error:
        outcome = error
    except Exception as error:  # process boundary: the parent shows it as the step's error
        outcome = StepError(f"deploying failed ({type(error).__name__}: {error})", remedy="See the log above")
        report_result(result, outcome)
        raise
    return report_result(result, outcome)


def _connect(ray_address: str | None) -> None:
    import ray

    if ray.is_initialized():
        return
    address = ray_address or os.environ.get("RAY_ADDRESS")
    if not address:
        raise PlatformError("no Ray to deploy on", remedy="Start the platform with `draftline up`, or set RAY_ADDRESS")
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise PlatformError(
            f"cannot reach Ray at {address}", got=str(error).splitlines()[0], remedy="Look at `draftline status`"
        ) from None


def _start_serve(port: int) -> None:
    from ray import serve

    is_running = bool(serve.status().proxies)
    # Checked before anything is deployed: the replica in use would be replaced for a request that then goes elsewhere.
    if is_running and not _is_serve(port):
        raise PlatformError(
            f"Ray Serve runs already, but not on port {port} of {HOST}",
            remedy=f"Set {PORT_ENV} to its port, or stop it with `draftline down`",
        )
    if not is_running and _is_taken(port):
        raise PlatformError(
            f"port {port} on {HOST} is taken by another program",
            remedy=f"Stop that program, or set {PORT_ENV} to a free port",
        )
    serve.start(proxy_location="HeadOnly", http_options={"host": HOST, "port": port})


def _is_serve(port: int) -> bool:
    try:
        return httpx.get(f"http://{HOST}:{port}/-/healthz", timeout=10.0).text == "success"
    except httpx.HTTPError:
        return False


def _run(application: serve.Application, app: str) -> None:
    """Blocks until the replicas have loaded."""
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        serve.run(application, name=app, route_prefix="/")
    except (RuntimeError, RayServeException) as error:
        raise PlatformError(
            f"the application {app} did not start",
            got=_last_line(str(error)),
            remedy="See the replica's log in Ray's logs",
        ) from None


def _is_deployed(root: str, config: ReplicaConfig, app: str, start: StartReplica) -> bool:
    from ray import serve

    from serving.app import fingerprint

    found = serve.status().applications.get(app)
    if found is None or found.status != "RUNNING":
        return False
    try:
        document = httpx.get(f"{root}/version", timeout=5.0).json()
    except (httpx.HTTPError, ValueError):
        return False
    return isinstance(document, dict) and document.get("deployment") == fingerprint(config, start)


def _check_fits(config: ReplicaConfig, files: DraftFiles) -> None:
    from draftline.draft.checkpoint import load_folder
    from draftline.engine.checks import check_fits
    from draftline.target.load import load_config

    check_fits(load_folder(files.draft_dir).config, load_config(config.spec.target, cache_dir=config.cache_dir))


def _wait_for_health(root: str, wanted: str | None, deadline_s: float) -> str | None:
    """Until the endpoint is healthy and uses the wanted draft (a replica that went on swaps it in its own time)."""
    problem = "no answer"
    while time.monotonic() < deadline_s:
        try:
            response = httpx.get(f"{root}/health", timeout=5.0)
            if response.status_code == 200:
                draft = response.json()["draft"]
                if draft == wanted:
                    return wanted
                problem = f"the draft {draft} instead of {wanted}"
            else:
                problem = f"status {response.status_code}"
        except httpx.HTTPError as error:
            problem = type(error).__name__
        time.sleep(_POLL_S)
    raise PlatformError(
        f"{root}/health does not become healthy",
        got=problem,
        remedy="See the replica's log in Ray's logs",
    )


def _prove(base: str, config: ReplicaConfig, deadline_s: float) -> None:
    """One real answer, because a healthy page is not yet a token."""
    keys = read_api_keys(config.api_keys_file) or ("none",)
    document = {"model": config.spec.serving.model_name, "prompt": "Hello", "max_tokens": 4, "temperature": 0}
    try:
        response = httpx.post(
            f"{base}/completions",
            json=document,
            headers={"Authorization": f"Bearer {keys[0]}"},
            timeout=max(1.0, deadline_s - time.monotonic()),
        )
    except httpx.HTTPError as error:
        raise PlatformError("the endpoint does not answer a completion", got=type(error).__name__) from None
    if response.status_code != 200:
        raise PlatformError("the endpoint refuses a completion", got=f"{response.status_code} {response.text[:300]}")


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((HOST, port)) == 0


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
