"""The page of one step, for people who watch a run: its part of the card, with the figures that belong to it.

The report's page has everything, but only once all suites are measured.
These stand beside their steps in the Kubeflow UI as soon as each is done.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from draftline.report.card import (
    acceptance_sections,
    calibration_sections,
    confidence_sections,
    headline_tiles,
    sweep_sections,
    training_sections,
)
from draftline.report.collect import ReportData, read_history
from draftline.report.markdown import plain, table
from draftline.report.page import Tile, render_page
from draftline.report.plots import render_plots
from draftline.spec import RunSpec
from draftline.steps.ledger import StepResult
from draftline.storage.base import ObjectStore


def render_step_page(spec: RunSpec, store: ObjectStore, inputs: Mapping[str, StepResult], result: StepResult) -> str:
    """One HTML file that needs no other.

    Args:
        spec: The run spec.
        store: The workspace; the training history is read from it.
        inputs: Results that the step was given, by label.
        result: Its own; of ``draft``, ``calibration``, ``evaluation`` or ``gate``.

    Raises:
        FormatError: the training history is damaged.
        StorageError: the workspace failed.
        ValueError: the step has no page.
    """
    if result.station == "gate":
        return _gate_page(spec, result)
    nothing = StepResult(station="none", key="")
    given = ReportData(spec, inputs.get("draft", nothing), inputs.get("calibration", nothing), {}, (), {}, {})
    tiles: list[Tile] = []
    match result.station:
        case "draft":
            data = replace(given, draft=result, history=read_history(store, result))
            heading, sections = "training", [*training_sections(), _figures(result)]
        case "calibration":
            data = replace(given, calibration=result)
            heading, sections = "calibration", calibration_sections(data)
        case "evaluation":
            data = replace(given, suites={result.item: result.outputs})
            heading, tiles = f"suite {result.item}", headline_tiles(data.suites)
            sections = [*acceptance_sections(data), *confidence_sections(data), *sweep_sections(data)]
        case other:
            raise ValueError(f"the step {other} has no page")
    title = f"Draft model {spec.name}: {heading}"
    text = "\n\n".join([f"# {plain(title)}", *sections]) + "\n"
    return render_page(text, render_plots(data, mentioned_in=text), title=title, tiles=tiles)


def _figures(result: StepResult) -> str:
    rows = [(plain(name), f"{value:,.4g}") for name, value in sorted(result.metrics.items())]
    return "## Figures\n\n" + table(("figure", "value"), rows)


def _gate_page(spec: RunSpec, result: StepResult) -> str:
    outputs = result.outputs
    rows = [
        ("holds" if reason["ok"] else "**fails**", *(plain(str(reason[name])) for name in ("rule", "got", "needs")))
        for reason in outputs["reasons"]
    ]
    title = f"Draft model {spec.name}: the gate"
    verdict = "Passed" if outputs["passed"] else "Not passed"
    text = f"# {plain(title)}\n\n{verdict}: the version is `{outputs['alias']}` now. Every rule must hold.\n\n" + table(
        ("", "rule", "found", "needed"), rows
    )
    return render_page(text + "\n", {}, title=title)
