"""The page of spec fields is what the models say now."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from draftline.errors import SpecError
from draftline.spec import reference
from draftline.spec.models import Part, RunSpec
from draftline.spec.reference import render_reference
from draftline.steps import STATIONS
from tests.docs.pages import ROOT

FIELDS = {name: station.fields for name, station in STATIONS.items()}


def test_page_is_current(check_golden: Callable[[str, Path], None]) -> None:
    check_golden(render_reference(FIELDS), ROOT / "docs" / "run-spec.md")


def test_every_field_of_a_resolved_spec_has_a_row() -> None:
    rows = _rows(render_reference(FIELDS))
    expected = {path for path, value in _leaves(RunSpec().model_dump(mode="json"), "")}
    assert set(rows) == expected


def test_runs_again_from_the_first_step_that_reads_the_field() -> None:
    rows = _rows(render_reference(FIELDS))
    steps = {path: cells[3] for path, cells in rows.items()}
    assert steps["prompts.limit"] == "`prompts`"
    assert steps["responses.sampling.temperature"] == "`responses`"
    assert steps["draft.num_taps"] == "`hidden-states`"
    assert steps["draft.num_layers"] == "`draft`"
    assert steps["responses.workers"] == steps["workspace"] == "-"


def test_a_field_without_a_meaning_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Bare(Part):
        """A part whose docstring names no field."""

        number: int = 1

    monkeypatch.setattr(reference, "RunSpec", Bare)
    with pytest.raises(SpecError, match="'number' has no meaning"):
        render_reference({})


def _rows(page: str) -> dict[str, list[str]]:
    rows: dict[str, list[str]] = {}
    path = ""
    for line in page.splitlines():
        if line.startswith("## "):
            path = "" if line == "## Top level" else line.removeprefix("## ").strip("`") + "."
        elif line.startswith("| `"):
            cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
            rows[path + cells[0].strip("`")] = cells
    return rows


def _leaves(document: dict[str, object], prefix: str) -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = []
    for name, value in document.items():
        if isinstance(value, dict) and value:
            found += _leaves(value, f"{prefix}{name}.")
        else:
            found.append((prefix + name, value))
    return found
