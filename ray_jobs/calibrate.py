"""The calibration station: decode, fit, profile."""

from __future__ import annotations

from draftline.calibration.station import calibrate, read_prompts
from draftline.draft.stored import stored_draft
from draftline.steps import StepContext, StepOutput
from draftline.target.load import load_target
from ray_jobs.on_worker import run_on_worker
from ray_jobs.runtime import main

_FILE = "calibration.json"
_DETAILS = (
    *(name + when for name in ("auc", "brier", "log_loss", "reliability") for when in ("", "_before")),
    "candidates",
    "rule",
    "held_out",
)


def run(context: StepContext) -> StepOutput:
    """Fit confidences and measure step costs on one worker."""
    return run_on_worker(_calibrate, context)


def _calibrate(context: StepContext) -> StepOutput:
    prompts = context.inputs["prompts"]
    records = read_prompts(
        context.store.get(f"{prompts.prefix}/{prompts.outputs['files']['calibration']}"),
        context.spec.calibration.max_prompts,
    )
    target = load_target(context.spec.target)
    fitted = calibrate(
        context.spec,
        target,
        stored_draft(context.store, context.inputs["draft"]),
        records,
        lambda done, total: context.report(done, total, "prompts"),
    )
    context.store.put(f"{context.prefix}/{_FILE}", fitted.to_json().encode())
    outputs = {
        "file": _FILE,
        "ece_before": list(fitted.ece_before),
        "ece_after": list(fitted.ece_after),
        "method": fitted.method,
        **{name: fitted.extra[name] for name in _DETAILS if name in fitted.extra},
        "cost_table": fitted.extra.get("cost_table", {}),
        "num_samples": fitted.num_samples,
    }
    metrics = {}
    if fitted.ece_after:
        metrics["ece_before"] = sum(fitted.ece_before) / len(fitted.ece_before)
        metrics["ece_after"] = sum(fitted.ece_after) / len(fitted.ece_after)
    return StepOutput(outputs, metrics)


if __name__ == "__main__":
    main(run)
