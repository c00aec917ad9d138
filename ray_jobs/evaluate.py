"""The evaluation station: one suite on one worker."""

from __future__ import annotations

from draftline.evaluation.station import evaluate
from draftline.steps import StepContext, StepOutput
from ray_jobs.on_worker import run_on_worker
from ray_jobs.runtime import main


def run(context: StepContext) -> StepOutput:
    """Measure the suite ``context.item``."""
    return run_on_worker(evaluate, context)


if __name__ == "__main__":
    main(run)
