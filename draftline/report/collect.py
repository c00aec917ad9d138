"""Everything the report tells, gathered once into one value."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from draftline.errors import FormatError
from draftline.spec import RunSpec
from draftline.steps.context import StepContext
from draftline.steps.ledger import Ledger, StepResult
from draftline.storage.base import ObjectStore

METRICS_VERSION = 1

SUMMARY_FIGURES = (
    "num_prompts",
    "num_tokens",
    "accepted_length",
    "bytes_per_call",
    "speedup_over_plain",
    "speedup_over_transformers",
    "ece",
)

_EVALUATION = "evaluation:"


@dataclass(frozen=True)
class ReportData:
    """Input of the card, the plots and the page.

    Attributes:
        spec: The run spec; only parts that enter the ancestors' keys may be
            shown, or equal keys would not mean equal bytes.
        draft: Result of the draft station.
        calibration: Result of the calibration station.
        suites: Evaluation outputs by suite, the held-out suite first.
        history: Training log, one mapping a logged step.
        prompts: Outputs of the prompts station, empty when not found.
        keys: Content key by step, of all ancestors.
    """

    spec: RunSpec
    draft: StepResult
    calibration: StepResult
    suites: Mapping[str, Mapping[str, Any]]
    history: tuple[Mapping[str, float], ...]
    prompts: Mapping[str, Any]
    keys: Mapping[str, str]


def collect(context: StepContext) -> ReportData:
    """Gather the report's input from the results and the workspace.

    Raises:
        FormatError: the training history is damaged.
        StorageError: the workspace failed.
    """
    draft, calibration = context.inputs["draft"], context.inputs["calibration"]
    named = [(n.removeprefix(_EVALUATION), r) for n, r in context.inputs.items() if n.startswith(_EVALUATION)]
    suites = {name: result.outputs for name, result in sorted(named, key=lambda n: (n[0] != "held-out", n[0]))}
    keys = _ancestor_keys(context)
    prompts = _find(context, "prompts", keys["prompts"]) if "prompts" in keys else None
    history = read_history(context.store, draft)
    return ReportData(context.spec, draft, calibration, suites, history, prompts.outputs if prompts else {}, keys)


def metrics_document(data: ReportData) -> dict[str, Any]:
    """The machine-readable report (``metrics.json``); the gate reads it of both sides.

    Figures that are not finite become ``None``: JSON has no NaN.
    """
    document = {
        "version": METRICS_VERSION,
        "name": data.spec.name,
        "suites": data.suites,
        "calibration": {**data.calibration.outputs, "metrics": data.calibration.metrics},
        "draft": {**data.draft.outputs, "metrics": data.draft.metrics},
        "prompts": data.prompts.get("counts", {}),
        "keys": data.keys,
    }
    cleaned: dict[str, Any] = finite(document)
    return cleaned


def summary(data: ReportData) -> dict[str, dict[str, Any]]:
    """The scalars by suite that one table shows."""
    return {
        suite: {
            **{name: finite(outputs.get(name)) for name in SUMMARY_FIGURES},
            **{
                f"accepted_length_at_{one['temperature']:g}": finite(one.get("accepted_length"))
                for one in (outputs.get("by_temperature") or ())[1:]
            },
            "lossless": (outputs.get("lossless") or {}).get("verdict", "not-checked"),
        }
        for suite, outputs in data.suites.items()
    }


def headline_sweep(outputs: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The sweep at a suite's first temperature; empty when none was recorded."""
    by_temperature = outputs.get("by_temperature") or ()
    points: Sequence[Mapping[str, Any]] = (by_temperature[0].get("threshold_sweep") or ()) if by_temperature else ()
    return points


def finite(value: Any) -> Any:
    """The value with every NaN and infinity replaced by ``None``, at any depth."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def read_history(store: ObjectStore, draft: StepResult) -> tuple[Mapping[str, float], ...]:
    """The training log, one mapping a logged step; empty when the draft has none.

    Raises:
        FormatError: it is damaged.
        StorageError: the workspace failed.
    """
    name = draft.outputs.get("history")
    if not name:
        return ()
    path = f"{draft.prefix}/{name}"
    try:
        return tuple(json.loads(line) for line in store.get(path).split(b"\n") if line)
    except ValueError as error:
        raise FormatError(
            f"the training history {path} is damaged ({error})", remedy="Delete the draft step's folder; it runs again"
        ) from None


def _ancestor_keys(context: StepContext) -> dict[str, str]:
    """Keys of everything this report rests on; results no longer in the workspace end their branch."""
    keys: dict[str, str] = {}

    def visit(inputs: Mapping[str, str]) -> None:
        for label, key in inputs.items():
            if label in keys:
                continue
            keys[label] = key
            found = _find(context, label, key)
            visit(found.inputs if found else {})

    visit({label: result.key for label, result in context.inputs.items()})
    return dict(sorted(keys.items()))


def _find(context: StepContext, label: str, key: str) -> StepResult | None:
    given = context.inputs.get(label)
    if given is not None and given.key == key:
        return given
    return Ledger(context.store).find(label.partition(":")[0], key)
