"""Jobs: a request out, a result or the very error back."""

from __future__ import annotations

import json
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

from draftline import jobs
from draftline.errors import InputError, NoSpace, StepError
from draftline.jobs import progress_from_environment, read_request, report_result, run_job, write_result
from draftline.progress import JsonlProgress, LineProgress
from draftline.spec import RunSpec, derive
from draftline.steps.context import StepContext, StepOutput
from draftline.steps.ledger import StepResult
from draftline.steps.stations import STATIONS, Station
from draftline.storage.local import LocalStore
from tests.full_disk import full_disk

JOB = """
import resource
import sys
from pathlib import Path
from draftline.errors import InputError
from draftline.jobs import read_request, report_result, write_result
from draftline.steps.context import StepOutput
context = read_request(Path(sys.argv[1]))
if context.item == "die":
    sys.exit(9)
if context.item == "fail":
    write_result(Path(sys.argv[2]), InputError("bad data", got=3, expected="more", remedy="Give more"))
    sys.exit(3)
if context.item == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
    sys.exit(report_result(Path(sys.argv[2]), InputError("bad data")))
prompts = dict(context.inputs["prompts"].outputs)
facts = [context.station, context.key, context.item, context.spec.name, context.store.uri, prompts]
write_result(Path(sys.argv[2]), StepOutput({"facts": facts}, {"n": 1.5}))
"""


@pytest.fixture
def station(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Station:
    (tmp_path / "a_job_for_tests.py").write_text(textwrap.dedent(JOB))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(jobs.__file__).parents[1]}")
    return replace(STATIONS["responses"], run="a_job_for_tests:run")


def context(tmp_path: Path, item: str = "") -> StepContext:
    prompts = StepResult("prompts", "p" * 20, outputs={"files": {"train": "train.jsonl"}})
    spec = derive(RunSpec(), {"name": "über-name".replace("ü", "u")})
    return StepContext("responses", "k" * 20, spec, LocalStore(tmp_path / "ws"), {"prompts": prompts}, item)


def test_the_context_travels_and_the_result_comes_back(station: Station, tmp_path: Path) -> None:
    output = run_job(station, context(tmp_path, "part"))
    uri = LocalStore(tmp_path / "ws").uri
    assert output == StepOutput(
        {"facts": ["responses", "k" * 20, "part", "uber-name", uri, {"files": {"train": "train.jsonl"}}]}, {"n": 1.5}
    )


def test_the_jobs_own_error_comes_back(station: Station, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        run_job(station, context(tmp_path, "fail"))
    error = caught.value
    assert (error.what, error.got, error.expected, error.remedy) == ("bad data", "3", "more", "Give more")


def test_a_job_that_dies_is_a_step_error(station: Station, tmp_path: Path) -> None:
    with pytest.raises(StepError, match="died without a result; got exit code 9"):
        run_job(station, context(tmp_path, "die"))


def test_a_job_whose_disk_is_full_is_no_space(station: Station, tmp_path: Path) -> None:
    with pytest.raises(NoSpace, match=r"could not write its result; got a full disk at .*Free some space"):
        run_job(station, context(tmp_path, "full"))


def test_a_request_that_finds_no_room_is_no_space(tmp_path: Path) -> None:
    with full_disk(10), pytest.raises(NoSpace, match="Cannot hand station 'responses' to its job"):
        run_job(STATIONS["responses"], context(tmp_path))


def test_the_exit_code_tells_what_the_result_cannot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = tmp_path / "result.json"
    with full_disk(10):
        assert report_result(result, StepOutput({"a": 1})) == NoSpace.exit_code
        assert report_result(result, InputError("bad data")) == NoSpace.exit_code
    assert not result.exists()
    assert "bad data" in capsys.readouterr().err
    assert report_result(result, InputError("bad data")) == InputError.exit_code
    assert report_result(result, StepOutput({"a": 1})) == 0
    assert json.loads(result.read_text())["outputs"] == {"a": 1}


def test_requests_read_back_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, StepContext] = {}

    def child(command: list[str], **options: object) -> object:
        seen["read"] = read_request(Path(command[3]))
        write_result(Path(command[4]), StepOutput())
        return None

    monkeypatch.setattr(jobs.subprocess, "run", child)
    given = context(tmp_path)
    run_job(STATIONS["responses"], given)
    read = seen["read"]
    assert (read.station, read.key, read.item, read.spec) == (given.station, given.key, given.item, given.spec)
    assert read.inputs == given.inputs and read.store.uri == given.store.uri
    assert read.prefix == given.prefix == f"responses/{'k' * 20}"


def test_an_unknown_error_type_is_still_a_step_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def child(command: list[str], **options: object) -> object:
        error = {"type": "annotations", "what": "w", "got": None, "expected": None, "remedy": None}
        Path(command[4]).write_text(json.dumps({"error": error}))
        return None

    monkeypatch.setattr(jobs.subprocess, "run", child)
    with pytest.raises(StepError, match="w"):
        run_job(STATIONS["responses"], context(tmp_path))


def test_progress_follows_the_environment(tmp_path: Path) -> None:
    assert isinstance(progress_from_environment({}), LineProgress)
    sink = progress_from_environment({"DRAFTLINE_EVENTS": str(tmp_path / "e.jsonl")})
    assert isinstance(sink, JsonlProgress)
    context(tmp_path).report(1, 2, "turns")
    replace(context(tmp_path, "x"), progress=sink).report(1, 2, "turns", "note", {"a": 1.0})
    line = json.loads((tmp_path / "e.jsonl").read_text())
    assert (line["step"], line["done"], line["unit"], line["values"]) == ("responses:x", 1, "turns", {"a": 1.0})
