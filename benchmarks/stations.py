"""Bring the training stations of a workspace to their results, as a run would."""

from __future__ import annotations

from collections.abc import Sequence

from draftline.jobs import progress_from_environment
from draftline.spec import RunSpec
from draftline.steps import STATIONS, StepResult
from draftline.steps.execute import execute
from draftline.storage.base import ObjectStore

TRAINING = ("prompts", "responses", "tokens", "hidden-states", "draft")


def run_stations(spec: RunSpec, store: ObjectStore, names: Sequence[str] = TRAINING) -> dict[str, StepResult]:
    """Results by station; a finished station is only looked up.

    Args:
        spec: The run spec.
        store: The workspace.
        names: Stations without a fan-out, each after its inputs.
    """
    done: dict[str, StepResult] = {}
    for name in names:
        inputs = {needed: done[needed] for needed in STATIONS[name].inputs}
        done[name] = execute(name, spec, store, inputs, progress_from_environment())
    return done
