"""A workspace in which every station up to evaluation is committed already, under its true content key."""

from __future__ import annotations

import json
from collections.abc import Mapping

from draftline.spec import RunSpec
from draftline.steps import STATIONS, Ledger, StepResult, content_key
from draftline.steps.execute import outside_facts
from draftline.storage.base import ObjectStore
from tests.report import examples


def commit_until_evaluation(spec: RunSpec, store: ObjectStore) -> dict[str, StepResult]:
    """Commit hand-made results, so that a run of ``spec`` skips everything before the report.

    Returns:
        The results by ``station`` or ``station:item``.
    """
    shaped = examples.trained(store)
    outputs = {name: result.outputs for name, result in shaped.items()}
    results: dict[str, StepResult] = {}
    for name in ("prompts", "responses", "tokens", "hidden-states", "draft", "calibration"):
        _commit(name, "", outputs.get(name, {}), spec, store, results)
    draft, calibration = results["draft"], results["calibration"]
    store.put(f"{draft.prefix}/draft/config.json", examples.CONFIG)
    weights = store.get(f"{shaped['draft'].prefix}/draft/model.safetensors")
    store.put(f"{draft.prefix}/draft/model.safetensors", weights)
    history = "".join(json.dumps(line) + "\n" for line in examples.history_lines())
    store.put(f"{draft.prefix}/history.jsonl", history.encode())
    store.put(f"{calibration.prefix}/calibration.json", examples.CALIBRATION)
    for suite in spec.evaluation.suites:
        _commit("evaluation", suite, outputs[f"evaluation:{suite}"], spec, store, results)
    return results


def _commit(
    name: str,
    item: str,
    outputs: Mapping[str, object],
    spec: RunSpec,
    store: ObjectStore,
    results: dict[str, StepResult],
) -> None:
    station = STATIONS[name]
    inputs = {source: results[source].key for source in station.inputs}
    key = content_key(station, spec, inputs, outside_facts(station, spec, item))
    result = StepResult(name, key, item, inputs, outputs, {"made": 1.0})
    results[f"{name}:{item}" if item else name] = Ledger(store).commit(result)
