"""Registered versions for tests: hand-made results through the real register and gate steps."""

from __future__ import annotations

from typing import Any

from mlflow import MlflowClient

from components.gate import step as gate_step
from components.register import step as register_step
from draftline.spec import RunSpec, derive
from draftline.steps import StepContext, StepOutput, StepResult
from draftline.storage.base import ObjectStore
from tests.report import examples

NAME = "support-desk"


def register_context(
    store: ObjectStore, tag: str, *, spec: RunSpec | None = None, name: str = NAME, **figures: Any
) -> StepContext:
    """A trained, reported draft, ready to be registered."""
    suites = {suite: examples.evaluation_outputs(suite, **figures) for suite in ("held-out", "humaneval")}
    weights = examples.weights_bytes(f"weights {tag}")
    results = examples.trained(store, weights=weights, suites=suites, tag=tag)
    report = examples.reported(store, results, key="f" * 19 + tag)
    inputs = {"draft": results["draft"], "calibration": results["calibration"], "report": report}
    named = derive(spec or RunSpec(), {"name": name})
    return examples.context("register", store, inputs, key="9" * 19 + tag, spec=named)


def gate_context(registering: StepContext, registered: StepOutput, spec: RunSpec | None = None) -> StepContext:
    """The gate step's context after a register step."""
    result = StepResult("register", registering.key, "", {}, dict(registered.outputs))
    inputs = {"report": registering.inputs["report"], "register": result}
    return examples.context("gate", registering.store, inputs, key="8" * 20, spec=spec or registering.spec)


def register_and_judge(store: ObjectStore, tag: str, **options: Any) -> tuple[StepOutput, StepOutput]:
    """Both steps' outputs."""
    context = register_context(store, tag, **options)
    registered = register_step.run(context)
    return registered, gate_step.run(gate_context(context, registered))


def aliases(client: MlflowClient, name: str = NAME) -> dict[str, str]:
    """Version by alias."""
    return {alias: str(version) for alias, version in client.get_registered_model(name).aliases.items()}
