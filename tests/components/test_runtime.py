"""The shim's runtime, in process, on the real prompts station."""

from __future__ import annotations

import errno
import io
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from components.runtime import (
    FAILURE_ENV,
    copy_page,
    read_inputs,
    read_spec,
    record_failure,
    run_station,
    summarise,
    write_metrics,
)
from draftline.errors import FormatError, InputError, NoSpace, SpecError
from draftline.jobs import EVENTS_ENV
from draftline.spec import RunSpec, derive, dump_spec
from draftline.steps import StepResult
from draftline.storage import open_store
from tests.full_disk import full_disk


@dataclass
class FakeArtifact:
    """A kfp artifact: a path, metadata, and numbers."""

    path: str
    metadata: dict[str, Any] = field(default_factory=dict)
    logged: dict[str, float] = field(default_factory=dict)

    def log_metric(self, metric: str, value: float) -> None:
        self.logged[metric] = value


@pytest.fixture
def spec_file(tmp_path: Path) -> Path:
    """A stored spec over a small prompts file."""
    prompts = tmp_path / "prompts.jsonl"
    texts = [f"Ticket {n}: {word} has not arrived at my new address in town {n * 7}" for n in range(20)
             for word in ("the lamp", "a bicycle", "my invoice")]  # fmt: skip
    prompts.write_text("".join(json.dumps({"turns": [text]}) + "\n" for text in texts))
    spec = derive(RunSpec(), {"prompts.source": str(prompts), "prompts.near_duplicate_threshold": 1.0,
                              "workspace": str(tmp_path / "workspace")})  # fmt: skip
    path = tmp_path / "spec.yaml"
    path.write_text(dump_spec(spec))
    return path


def test_runs_the_station_and_describes_it(spec_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = tmp_path / "events.jsonl"
    monkeypatch.setenv(EVENTS_ENV, str(events))
    workspace = str(tmp_path / "workspace")
    result = FakeArtifact(str(tmp_path / "result"))
    outcome = run_station("prompts", str(spec_file), workspace, {}, result=result)

    written = StepResult.from_json(Path(result.path).read_text())
    assert written == outcome
    assert sum(outcome.outputs["counts"].values()) == 60
    assert result.metadata["key"] == outcome.key
    assert result.metadata["count_train"] == outcome.outputs["counts"]["train"]
    assert open_store(workspace).head(f"prompts/{outcome.key}/result.json") is not None

    again = run_station("prompts", str(spec_file), workspace, {}, result=FakeArtifact(str(tmp_path / "again")))
    assert again == outcome
    states = [json.loads(line)["state"] for line in events.read_text().splitlines()]
    assert states[0] == "started" and states[-2:] == ["finished", "skipped"]


def test_failure_is_left_for_the_runner_once(spec_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failure = tmp_path / "failure.json"
    monkeypatch.setenv(FAILURE_ENV, str(failure))
    monkeypatch.setenv(EVENTS_ENV, str(tmp_path / "events.jsonl"))
    (tmp_path / "prompts.jsonl").unlink()
    with pytest.raises(InputError):
        run_station("prompts", str(spec_file), str(tmp_path / "w"), {}, result=FakeArtifact(str(tmp_path / "r")))
    document = json.loads(failure.read_text())
    assert document["step"] == "prompts" and document["exit_code"] == InputError.exit_code
    assert "no prompts file" in document["message"] and document["is_expected"] is True
    assert not (tmp_path / "r").exists()

    record_failure(ValueError("later"), "tokens", {FAILURE_ENV: str(failure)})
    assert json.loads(failure.read_text()) == document


def test_unexpected_failure_names_its_type(tmp_path: Path) -> None:
    failure = tmp_path / "failure.json"
    record_failure(ZeroDivisionError("division by zero"), "evaluation:held-out", {FAILURE_ENV: str(failure)})
    assert json.loads(failure.read_text()) == {
        "step": "evaluation:held-out",
        "message": "ZeroDivisionError: division by zero",
        "exit_code": 1,
        "is_expected": False,
    }


class FullStream(io.StringIO):
    """A log on a full disk."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "full")


def test_a_full_disk_leaves_no_half_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failure = tmp_path / "failure.json"
    monkeypatch.setattr(sys, "stderr", FullStream())
    with full_disk(10):
        record_failure(NoSpace("Cannot write it"), "tokens", {FAILURE_ENV: str(failure)})
    assert not failure.exists()
    record_failure(NoSpace("Cannot write it"), "tokens", {FAILURE_ENV: str(failure)})
    # The second failure has nowhere to go, not even to the log.
    record_failure(ValueError("later"), "cache", {FAILURE_ENV: str(failure)})
    assert json.loads(failure.read_text())["exit_code"] == NoSpace.exit_code


def test_artifacts_that_find_no_room_are_no_space(
    spec_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace = str(tmp_path / "workspace")
    run_station("prompts", str(spec_file), workspace, {}, result=FakeArtifact(str(tmp_path / "result")))
    with full_disk(10), pytest.raises(NoSpace, match="the artifacts of prompts"):
        run_station("prompts", str(spec_file), workspace, {}, result=FakeArtifact(str(tmp_path / "again")))


def test_reads_the_spec_from_a_path_and_a_file_uri(spec_file: Path) -> None:
    assert read_spec(str(spec_file)) == read_spec(spec_file.as_uri())
    with pytest.raises(SpecError, match="no spec at"):
        read_spec(str(spec_file) + ".missing")


def test_inputs_of_a_fan_out_are_named_by_item(tmp_path: Path) -> None:
    draft, one, two = (
        StepResult("draft", "d" * 20),
        StepResult("evaluation", "1" * 20, "held-out"),
        StepResult("evaluation", "2" * 20, "humaneval"),
    )
    artifacts = []
    for number, result in enumerate((draft, one, two)):
        path = tmp_path / str(number)
        path.write_text(result.to_json())
        artifacts.append(FakeArtifact(str(path)))
    found = read_inputs({"draft": artifacts[0], "evaluation": artifacts[1:]})
    assert found == {"draft": draft, "evaluation:held-out": one, "evaluation:humaneval": two}

    Path(artifacts[0].path).write_text("{")
    with pytest.raises(FormatError, match="the input 'draft'"):
        read_inputs({"draft": artifacts[0]})


def test_summary_is_flat() -> None:
    outcome = StepResult(
        "evaluation", "k" * 20, "held-out", {}, {"suite": "held-out", "num_prompts": 3, "lossless": {"verdict": "x"},
                                                 "accepted_length": 2.5, "counts": {"train": 7}}, {"ece": 0.1},
    )  # fmt: skip
    assert summarise(outcome) == {
        "key": "k" * 20,
        "folder": f"evaluation/{'k' * 20}",
        "item": "held-out",
        "suite": "held-out",
        "num_prompts": 3,
        "accepted_length": 2.5,
        "count_train": 7,
        "ece": 0.1,
    }


def test_metrics_artifact_gets_numbers_and_a_file(tmp_path: Path) -> None:
    metrics = FakeArtifact(str(tmp_path / "metrics"))
    write_metrics(StepResult("draft", "k", metrics={"train_loss": 2.0, "a": 1}), metrics)
    assert metrics.logged == {"train_loss": 2.0, "a": 1.0}
    assert Path(metrics.path).read_text() == "{}"


def test_pages_are_copied_from_the_workspace(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "workspace"), create=True)
    outcome = StepResult("report", "k" * 20)
    store.put(f"{outcome.prefix}/card.md", b"# Card")
    page = FakeArtifact(str(tmp_path / "card"))
    copy_page(outcome, store, "card.md", page)
    assert Path(page.path).read_bytes() == b"# Card"
