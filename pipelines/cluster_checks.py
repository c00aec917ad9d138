"""Checks from inside a cluster: ``python -m pipelines.cluster_checks storage|mlflow|serving|permissions ...``.

``helm test`` runs one in each of its pods, and the chart's provisioning job
creates the bucket with the first. Each proves what its users will do, tries
again while a service is still coming up, prints one line, and exits non-zero
with the reason when the time is over.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Annotated, TypeVar

import httpx
import typer

from components.cluster.api import load_configuration
from draftline.errors import AccessDenied, DraftlineError, PlatformError
from draftline.storage import open_store

API_KEYS_ENV = "DRAFTLINE_API_KEYS"
"""Accepted keys of the endpoint, one a line; the first one is sent."""

_RETRY_S = 5.0
_TIMEOUT_S = 30.0

RAYJOB_RIGHTS = (
    ("ray.io", "rayjobs", "create"),
    ("ray.io", "rayjobs", "get"),
    ("ray.io", "rayjobs", "watch"),
    ("ray.io", "rayjobs", "delete"),
    ("", "pods", "get"),
    ("", "pods", "list"),
    ("", "pods/log", "get"),
)
"""API group, resource and verb of everything that submitting and following a job takes."""

Outcome = TypeVar("Outcome")

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)

WaitOption = Annotated[float, typer.Option("--wait", help="Seconds to go on trying.")]


@app.command()
def storage(
    workspace: Annotated[str, typer.Argument(help="Its URI, s3://bucket/prefix.")],
    create: Annotated[bool, typer.Option("--create", help="Create the bucket if it is missing.")] = False,
    wait: WaitOption = 300.0,
) -> None:
    """Write, read, list and conditionally create objects; leaves nothing behind."""
    _until_done(lambda: open_store(workspace, create=create).check(), wait)
    typer.echo(f"{workspace} can be written, read and listed, and creates an object only where none is")


@app.command()
def mlflow(uri: Annotated[str, typer.Argument(help="The server's URL.")], wait: WaitOption = 300.0) -> None:
    """Ask for the server's health and, as any client would, for an experiment: its database answers too."""
    root = uri.rstrip("/")
    _until_done(lambda: _require(httpx.get(f"{root}/health", timeout=_TIMEOUT_S)), wait)
    found = _until_done(
        lambda: _require(
            httpx.post(
                f"{root}/api/2.0/mlflow/experiments/search",
                json={"max_results": 1},
                headers=_mlflow_headers(os.environ),
                auth=_mlflow_auth(os.environ),
                timeout=_TIMEOUT_S,
            )
        ),
        wait,
    )
    typer.echo(f"{root} is healthy and lists {len(found.json().get('experiments', []))} experiment of at most 1")


@app.command()
def serving(
    uri: Annotated[str, typer.Argument(help="The endpoint's root URL.")],
    model: Annotated[str, typer.Option(help="Name of the served model.")],
    wait: WaitOption = 300.0,
) -> None:
    """Have the endpoint complete a prompt."""
    keys = os.environ.get(API_KEYS_ENV, "").split()
    body = {"model": model, "prompt": "Hello", "max_tokens": 8, "temperature": 0}
    headers = {"Authorization": f"Bearer {keys[0]}"} if keys else {}
    answer = _until_done(
        lambda: _require(
            httpx.post(f"{uri.rstrip('/')}/v1/completions", json=body, headers=headers, timeout=_TIMEOUT_S)
        ),
        wait,
    ).json()
    usage = answer["usage"]
    if not usage["completion_tokens"]:
        raise _Failed(PlatformError(f"{uri} answered without a token", got=str(answer)[:300]))
    typer.echo(f"{model} completed {usage['prompt_tokens']} tokens with {usage['completion_tokens']}")


@app.command()
def permissions(
    namespace: Annotated[str, typer.Argument(help="Where jobs are to run.")], wait: WaitOption = 60.0
) -> None:
    """Ask Kubernetes whether this pod's account may run RayJobs."""
    refused = _until_done(lambda: _refused_rights(namespace), wait)
    if refused:
        raise _Failed(
            AccessDenied(
                f"this account may not run RayJobs in {namespace}",
                got=f"no right to {', '.join(refused)}",
                remedy="Install the chart with pipeline.enabled=true, and name the account in pipeline.subjects",
            )
        )
    typer.echo(f"this account may create, follow and cancel RayJobs in {namespace}")


class _Failed(Exception):
    """Trying again would not help."""


def _until_done(attempt: Callable[[], Outcome], wait_s: float) -> Outcome:
    deadline_s = time.monotonic() + wait_s
    while True:
        try:
            return attempt()
        except AccessDenied as error:
            raise _Failed(error) from error
        except (DraftlineError, httpx.HTTPError) as error:
            if time.monotonic() + _RETRY_S > deadline_s:
                raise _Failed(error) from error
            typer.echo(f"not yet: {str(error) or type(error).__name__}")
            time.sleep(_RETRY_S)


def _require(response: httpx.Response) -> httpx.Response:
    """The response if it is good. A refusal is final; a server error may pass."""
    if response.is_success:
        return response
    error = PlatformError(f"{response.request.url} refuses", got=f"{response.status_code} {response.text[:300]}")
    # Kubernetes' proxies answer 404 for an application that Serve has not deployed yet.
    if response.is_client_error and response.status_code not in (404, 429):
        raise _Failed(error)
    raise error


def _mlflow_headers(environ: Mapping[str, str]) -> dict[str, str]:
    token = environ.get("MLFLOW_TRACKING_TOKEN")
    return {"Authorization": f"Bearer {token}"} if token else {}


def _mlflow_auth(environ: Mapping[str, str]) -> tuple[str, str] | None:
    user, password = environ.get("MLFLOW_TRACKING_USERNAME"), environ.get("MLFLOW_TRACKING_PASSWORD")
    return (user, password) if user and password else None


def _refused_rights(namespace: str) -> list[str]:
    """Rights that the pod's account lacks, by a SelfSubjectAccessReview each."""
    from kubernetes import client
    from kubernetes.client.exceptions import ApiException
    from urllib3.exceptions import HTTPError

    api = client.AuthorizationV1Api(client.ApiClient(load_configuration()))
    try:
        return [
            f"{verb} {resource}"
            for group, resource, verb in RAYJOB_RIGHTS
            if not api.create_self_subject_access_review(_review(namespace, group, resource, verb)).status.allowed
        ]
    except (ApiException, HTTPError) as error:
        raise PlatformError("cannot ask Kubernetes", got=str(error).splitlines()[0]) from None


def _review(namespace: str, group: str, resource: str, verb: str) -> object:
    from kubernetes import client

    kind, _, subresource = resource.partition("/")
    attributes = client.V1ResourceAttributes(
        namespace=namespace, group=group, resource=kind, subresource=subresource or None, verb=verb
    )
    return client.V1SelfSubjectAccessReview(spec=client.V1SelfSubjectAccessReviewSpec(resource_attributes=attributes))


def main() -> None:
    """Run one check; a failure is one line on stderr and exit code 1."""
    try:
        app(standalone_mode=True)
    except _Failed as failure:
        typer.echo(f"failed: {failure}", err=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
