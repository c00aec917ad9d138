"""The deploy step: serve the draft that the gate let through."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import httpx

from components.cluster.api import NAMESPACE_ENV
from draftline.errors import PlatformError
from draftline.jobs import run_job
from draftline.steps import STATIONS, StepContext, StepOutput

_CHILD = "serving.deploy:run"
"""Named, not imported: the child process needs Ray Serve, this one does not."""

ENDPOINT_ENV = "DRAFTLINE_ENDPOINT"
"""Root URL of an endpoint that follows the champion by itself, as the chart's does."""

RAY_ENV = "RAY_ADDRESS"
_WITHIN_S = 1800.0
_LOOK_EVERY_S = 5.0
_TIMEOUT_S = 10.0


def run(context: StepContext, environ: Mapping[str, str] = os.environ) -> StepOutput:
    """Deploy target and draft, or say why not.

    On a cluster the gate's promotion is the deployment: replicas follow the
    alias, and this step waits until they use the draft. Elsewhere it starts
    the endpoint on the Ray at ``RAY_ADDRESS``.

    A draft that failed the gate is no error of this step: the endpoint keeps
    serving the champion it has.

    Returns:
        ``{"deployed": True, "endpoint", "model", "app", "draft"}``, or
        ``{"deployed": False, "reason"}``.

    Raises:
        PlatformError: Ray or Serve is not there or does not come up, or the endpoint does not take the draft.
        DraftlineError: the draft cannot be had or is not what was registered.
    """
    gate = context.inputs["gate"].outputs
    if not gate["passed"]:
        failed = [str(reason["rule"]) for reason in gate.get("reasons", []) if not reason["ok"]]
        reason = f"the gate refused the draft: {'; '.join(failed) or 'no reason recorded'}"
        context.report(1, 1, "endpoints", note=reason)
        return StepOutput({"deployed": False, "reason": reason})
    if endpoint := environ.get(ENDPOINT_ENV, "").rstrip("/"):
        return wait_for_draft(context, endpoint)
    if environ.get(NAMESPACE_ENV) and not environ.get(RAY_ENV):
        reason = "no endpoint follows the champion yet: set serving.draft.uri in the chart's values"
        context.report(1, 1, "endpoints", note=reason)
        return StepOutput({"deployed": False, "reason": reason})
    return run_job(replace(STATIONS["deploy"], run=_CHILD), context)


def wait_for_draft(
    context: StepContext, endpoint: str, *, within_s: float = _WITHIN_S, look_every_s: float = _LOOK_EVERY_S
) -> StepOutput:
    """Wait until an endpoint that follows the champion is healthy and uses the registered draft.

    Raises:
        PlatformError: it does not within the time.
    """
    registered = context.inputs["register"].outputs
    wanted = f"{registered['model_name']}/{registered['version']}"

    def say(text: str) -> None:
        context.report(0, 1, "endpoints", note=text)

    wait_for_champion(endpoint, wanted, say, within_s=within_s, look_every_s=look_every_s)
    context.report(1, 1, "endpoints", note=f"{endpoint} uses {wanted}")
    model = context.spec.serving.model_name
    return StepOutput({"deployed": True, "endpoint": f"{endpoint}/v1", "model": model, "draft": wanted})


def wait_for_champion(
    endpoint: str,
    wanted: str,
    say: Callable[[str], None],
    *,
    within_s: float = _WITHIN_S,
    look_every_s: float = _LOOK_EVERY_S,
) -> None:
    """Wait until an endpoint is healthy and uses a draft, ``MODEL/VERSION``.

    Raises:
        PlatformError: it does not within the time.
    """
    deadline_s = time.monotonic() + within_s
    while True:
        draft, problem = _draft_in_use(endpoint)
        if draft == wanted:
            return
        say(f"{problem}; waiting for {wanted}")
        if time.monotonic() + look_every_s > deadline_s:
            raise PlatformError(
                f"{endpoint} does not take the draft {wanted}",
                got=problem,
                remedy="It is champion all the same. Does the endpoint follow it (serving.draft.uri)? Its log says why "
                "a draft was refused",
            )
        time.sleep(look_every_s)


def _draft_in_use(endpoint: str) -> tuple[str | None, str]:
    """The draft, and what to say of the endpoint when it is another one."""
    try:
        response = httpx.get(f"{endpoint}/health", timeout=_TIMEOUT_S)
        if response.status_code != 200:
            return None, f"status {response.status_code}"
        draft = response.json()["draft"]
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        return None, f"no answer ({type(error).__name__})"
    return draft, f"the draft in use is {draft or 'none'}"
