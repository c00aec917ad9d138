"""Run one station: skip it when its result is committed, else do the work and commit."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping

from draftline.errors import StepError
from draftline.evaluation.suites import suite_digest
from draftline.jobs import JobRunner, run_job
from draftline.progress import Progress, ProgressEvent
from draftline.prompts.overlap import overlap_digest
from draftline.prompts.source import source_digest
from draftline.spec import RunSpec
from draftline.steps.context import StepContext, StepOutput
from draftline.steps.ledger import STANDS_FOR, Ledger, StepResult
from draftline.steps.stations import STATIONS, Station, content_key, neutral_key
from draftline.storage.base import ObjectStore
from draftline.target.fingerprint import target_fingerprint
from draftline.target.hardware import machine_name, preferred_dtype

StationFunction = Callable[[StepContext], StepOutput]


def execute(
    name: str,
    spec: RunSpec,
    store: ObjectStore,
    inputs: Mapping[str, StepResult],
    progress: Progress,
    *,
    item: str = "",
    runner: JobRunner = run_job,
) -> StepResult:
    """Bring one station (or one fan-out branch) to its committed result.

    Args:
        name: Station name.
        spec: The run spec.
        store: The workspace.
        inputs: Results of the input stations; fan-out branches as ``station:item``.
        progress: Receives started/running/skipped/finished/failed events.
        item: Fan-out item.
        runner: Runs the work of stations that compute on Ray.

    Returns:
        The committed result.

    Raises:
        DraftlineError: whatever the station's work raises.
    """
    station = STATIONS[name]
    input_keys = _identities(inputs)
    facts = outside_facts(station, spec, item)
    key = content_key(station, spec, input_keys, facts)
    context = StepContext(name, key, spec, store, inputs, item, progress)
    ledger = Ledger(store)
    if not station.is_effect and (found := ledger.find(name, key)) is not None:
        _empty_scratch(context)  # a kill may have come between commit and clearing
        progress.emit(ProgressEvent(context.label, "skipped", note=f"already done ({key})"))
        return found
    progress.emit(ProgressEvent(context.label, "started"))
    try:
        output = runner(station, context) if station.on_ray else load_function(station.run)(context)
    except BaseException as error:
        progress.emit(ProgressEvent(context.label, "failed", note=str(error).splitlines()[0] if str(error) else ""))
        raise
    outputs = dict(output.outputs)
    if (neutral := neutral_key(station, spec, input_keys, facts)) != key:
        outputs[STANDS_FOR] = neutral
    result = StepResult(name, key, item, {k: r.key for k, r in inputs.items()}, outputs, dict(output.metrics))
    if not station.is_effect:
        result = ledger.commit(result)
        _empty_scratch(context)
    progress.emit(ProgressEvent(context.label, "finished", note=output.note, values=result.metrics))
    return result


def step_key(name: str, spec: RunSpec, inputs: Mapping[str, StepResult], item: str = "") -> str:
    """The content key of a step, facts of the outside world looked up.

    Raises:
        DraftlineError: a file or the target that the spec names is not there.
        StepError: an input is missing.
    """
    station = STATIONS[name]
    return content_key(station, spec, _identities(inputs), outside_facts(station, spec, item))


def _identities(inputs: Mapping[str, StepResult]) -> dict[str, str]:
    return {name: result.identity for name, result in inputs.items()}


def _empty_scratch(context: StepContext) -> None:
    for info in list(context.store.list(f"{context.scratch}/")):
        context.store.delete(info.key)


def load_function(path: str) -> StationFunction:
    """Import ``module:function``.

    Raises:
        StepError: the module lacks the function.
    """
    module_name, _, function_name = path.partition(":")
    function = getattr(importlib.import_module(module_name), function_name, None)
    if not callable(function):
        raise StepError(f"station function {path!r} does not exist")
    loaded: StationFunction = function
    return loaded


def outside_facts(station: Station, spec: RunSpec, item: str) -> dict[str, str]:
    """What a step depends on beyond its spec and inputs: digests of files it reads, choices made by the hardware.

    Raises:
        DraftlineError: a file or the target that the spec names is not there.
    """
    facts = {"item": item} if item else {}
    if station.name == "prompts":
        facts["source"] = source_digest(spec.prompts)
        if (overlap := overlap_digest(spec)) is not None:
            facts["overlap"] = overlap
    if station.name == "responses":
        facts["target"] = target_fingerprint(spec.target)
        if spec.target.dtype == "auto":
            facts["dtype"] = preferred_dtype()
    if station.name in ("calibration", "evaluation"):
        # Both measure time, and a time belongs to the machine it was taken on.
        facts["machine"] = machine_name()
    if station.name == "evaluation" and (suite := suite_digest(item, spec.evaluation)) is not None:
        facts["suite"] = suite
    return facts
