"""The real training DAG through kfp.local: skipping, failing, and leaving nothing behind."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from draftline.errors import DraftlineError, FormatError, StepError
from draftline.jobs import EVENTS_ENV
from draftline.spec import RunSpec, derive, dump_spec
from draftline.storage import open_store
from pipelines.preflight import store_spec
from pipelines.run_local import LocalRun, RunFailed, collect_results, new_folder, run_local
from tests.pipelines.committed import commit_until_evaluation

pytestmark = pytest.mark.slow

END_TIMEOUT_S = 20.0


def prepared(tmp_path: Path, **overrides: object) -> LocalRun:
    """A run whose workspace holds everything up to evaluation."""
    spec = derive(RunSpec(), {"workspace": str(tmp_path / "workspace"), **overrides})
    store = open_store(spec.workspace, create=True)
    commit_until_evaluation(spec, store)
    stored = store_spec(spec, store)
    return LocalRun(spec, stored.spec_uri, spec.workspace, new_folder(tmp_path / "home", stored.run_id), {})


def lines_of(run: LocalRun) -> tuple[list[str], DraftlineError | None]:
    """What a run prints when it is not on a terminal, and how it failed."""
    output, failure = io.StringIO(), None
    try:
        run_local(run, Console(file=output, width=120))
    except DraftlineError as error:
        failure = error
    return output.getvalue().splitlines(), failure


def test_finished_steps_are_skipped_and_a_failure_is_one_clear_line(tmp_path: Path) -> None:
    run = prepared(tmp_path)
    store = open_store(run.workspace)
    damaged = next(item.key for item in store.list("tokens/") if item.key.endswith("result.json"))
    store.put(damaged, b"not json")
    lines, failure = lines_of(run)

    assert "[prompts] already done" in lines and "[responses] already done" in lines
    assert not any(line.startswith("[hidden-states]") for line in lines)
    assert isinstance(failure, RunFailed)
    assert failure.exit_code == FormatError.exit_code
    text = str(failure)
    assert text.startswith(f"step tokens failed: {damaged} is damaged") and "\x1b" not in text and "\n" not in text
    assert text.endswith(f"The log is {run.log}.")
    assert "FormatError" in run.log.read_text()
    assert set(collect_results(run.artifacts)) == {"prompts", "responses"}


def test_a_refused_draft_is_reported_registered_and_not_deployed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole DAG with a real MLflow database; the gate says no, so the run ends well and deploys nothing."""
    run = prepared(tmp_path, **{"gate.min_speedup": 99.0})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    results = run_local(run, Console(file=io.StringIO()))

    assert "deploy" not in results
    assert {name for name in results if name.startswith("evaluation")} == {
        "evaluation:held-out",
        "evaluation:humaneval",
    }
    assert results["report"].inputs["evaluation:humaneval"] == results["evaluation:humaneval"].key
    assert results["register"].outputs["version"] == "1"
    assert results["gate"].outputs["passed"] is False
    pages = {path.name: path.read_text() for path in run.artifacts.rglob("*") if path.name in ("card", "page")}
    assert "accepted length" in pages["card"].lower() and "<html" in pages["page"].lower()
    events = [json.loads(line) for line in run.events.read_text().splitlines()]
    assert {event["step"] for event in events if event["state"] == "skipped"} >= {"draft", "evaluation:held-out"}
    assert [event["step"] for event in events if event["state"] == "finished"] == ["report", "register", "gate"]


def test_a_pipeline_that_dies_without_a_word_is_told_apart(tmp_path: Path) -> None:
    run = prepared(tmp_path)
    run.artifacts.write_text("a file where a folder must be")
    _, failure = lines_of(run)
    assert isinstance(failure, StepError)
    assert "exit code 1" in str(failure) and str(run.log) in str(failure)


def test_attempts_get_folders_of_their_own(tmp_path: Path) -> None:
    assert [new_folder(tmp_path, "abc").name for _ in range(3)] == ["001", "002", "003"]
    (tmp_path / "file").write_text("")
    with pytest.raises(DraftlineError, match="--home"):
        new_folder(tmp_path / "file", "abc")


def start_hanging_run(tmp_path: Path) -> tuple[subprocess.Popen[bytes], list[psutil.Process]]:
    """A driver whose first step waits forever on a FIFO, and all processes below it."""
    fifo = tmp_path / "prompts.jsonl"
    os.mkfifo(fifo)
    spec = tmp_path / "spec.yaml"
    spec.write_text(
        dump_spec(derive(RunSpec(), {"prompts.source": str(fifo), "workspace": str(tmp_path / "workspace")}))
    )
    driver = subprocess.Popen(
        [sys.executable, "-m", "tests.pipelines.run_driver", str(spec), str(tmp_path / "home")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        below = psutil.Process(driver.pid).children(recursive=True)
        if any("executor_main" in " ".join(process.cmdline()) for process in below):
            # The shell that kfp starts replaces itself or waits for Python; either way give it a moment to read.
            time.sleep(0.5)
            return driver, psutil.Process(driver.pid).children(recursive=True)
        time.sleep(0.1)
    driver.kill()
    pytest.fail("the step did not start")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_nothing_is_left_when_the_run_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    driver, below = start_hanging_run(tmp_path)
    assert len(below) >= 2
    assert list(scratch.iterdir()) != []
    driver.send_signal(number)
    try:
        driver.wait(END_TIMEOUT_S)
        _, alive = psutil.wait_procs(below, timeout=END_TIMEOUT_S)
        assert alive == []
        assert list(scratch.iterdir()) == []
    finally:
        for process in below:
            if process.is_running():
                process.kill()
        driver.kill()
        driver.wait()


def test_steps_see_the_environment_of_the_run(tmp_path: Path) -> None:
    """A variable given for the steps decides where the first step looks for its object."""
    run = prepared(tmp_path)
    environment = {"AWS_ENDPOINT_URL_S3": "not a url", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    wrong = LocalRun(run.spec, "s3://bucket/spec.yaml", run.workspace, run.folder, environment)
    _, failure = lines_of(wrong)
    assert re.match("step prompts failed: .*not a url", str(failure))
    assert EVENTS_ENV not in os.environ
