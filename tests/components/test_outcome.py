"""The exit handler's work: it says how a run ended, whatever else is broken."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from components.outcome.step import report_outcome
from draftline.spec import RunSpec, dump_spec
from draftline.storage import open_store
from tests.components.test_runtime import FakeArtifact


@dataclass
class Status:
    state: str
    pipeline_job_resource_name: str = "projects/1/pipelines/train-draft-x7"
    error_message: str | None = None


def test_a_run_that_went_well(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(dump_spec(RunSpec(name="tickets")))
    store = open_store(str(tmp_path / "workspace"), create=True)
    summary = FakeArtifact(str(tmp_path / "summary"))
    report_outcome(Status("SUCCEEDED"), str(tmp_path / "spec.yaml"), store.uri, summary)
    page = Path(summary.path).read_text()
    assert page.startswith("# Run tickets succeeded\n") and "start the same run" not in page
    assert summary.metadata["state"] == "SUCCEEDED"
    document = json.loads(store.get("outcomes/projects-1-pipelines-train-draft-x7.json"))
    assert (document["run"], document["state"], document["error"]) == ("tickets", "SUCCEEDED", "")


def test_a_failure_is_told_even_where_nothing_can_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    summary = FakeArtifact(str(tmp_path / "summary"))
    status = Status("FAILED", error_message="\x1b[91mTask draft failed.\x1b[0m")
    report_outcome(status, str(tmp_path / "missing.yaml"), str(tmp_path / "file" / "workspace"), summary)
    page = Path(summary.path).read_text()
    assert "# Run run failed" in page and "\nTask draft failed.\n" in page
    assert "spec could not be read" in page and "workspace could not be written" in page
    assert "continues where it stopped" in page and page in capsys.readouterr().out
