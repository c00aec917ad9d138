"""The deploy step: serve the draft that the gate let through."""

from __future__ import annotations

from dataclasses import replace

from draftline.jobs import run_job
from draftline.steps import STATIONS, StepContext, StepOutput

_CHILD = "serving.deploy:run"
"""Named, not imported: the child process needs Ray Serve, this one does not."""


def run(context: StepContext) -> StepOutput:
    """Deploy target and draft, or say why not.

    A draft that failed the gate is no error of this step: the endpoint keeps
    serving the champion it has.

    Returns:
        ``{"deployed": True, "endpoint", "model", "app", "draft"}``, or
        ``{"deployed": False, "reason"}``.

    Raises:
        PlatformError: Ray or Serve is not there or does not come up.
        DraftlineError: the draft cannot be had or is not what was registered.
    """
    gate = context.inputs["gate"].outputs
    if not gate["passed"]:
        failed = [str(reason["rule"]) for reason in gate.get("reasons", []) if not reason["ok"]]
        reason = f"the gate refused the draft: {'; '.join(failed) or 'no reason recorded'}"
        context.report(1, 1, "endpoints", note=reason)
        return StepOutput({"deployed": False, "reason": reason})
    return run_job(replace(STATIONS["deploy"], run=_CHILD), context)
