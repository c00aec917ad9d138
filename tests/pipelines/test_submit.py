"""Submitting, against Kubeflow Pipelines' REST interface over real HTTP and with kfp's own client."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from draftline.errors import PlatformError, SpecError, StepError
from draftline.spec import RunSpec
from pipelines import submit as submitting
from pipelines.cli import app
from pipelines.submit import (
    Server,
    Submission,
    check_cron,
    parse_every,
    parse_parameters,
    store_spec,
    submit,
    watch,
)
from tests.servers.kubeflow import FakeKubeflow

PACKAGE = (
    "pipelineInfo:\n  name: {name}\nroot:\n  dag:\n    tasks: {{}}\nschemaVersion: 2.1.0\nsdkVersion: kfp-2.17.3\n"
)


@pytest.fixture
def kubeflow() -> Iterator[FakeKubeflow]:
    with FakeKubeflow() as fake:
        yield fake


@pytest.fixture(autouse=True)
def small_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes seconds and has tests of its own."""
    monkeypatch.setattr(
        submitting, "compile_pipeline", lambda path, name: path.write_text(PACKAGE.format(name=f"draftline-{name}"))
    )


def task(name: str, state: str) -> dict[str, Any]:
    return {"task_id": name, "display_name": name, "state": state}


def test_first_time_and_again(kubeflow: FakeKubeflow) -> None:
    parameters = {"spec_uri": "s3://b/spec.yaml", "suites": ["a"]}
    submission = Submission("train-draft", parameters, "team", "tickets", "runner")
    first = submit(Server(kubeflow.url), submission)
    second = submit(Server(kubeflow.url), submission)
    assert (first.pipeline_id, first.version_id) == (second.pipeline_id, second.version_id)
    assert [one["display_name"] for one in kubeflow.pipelines] == ["draftline-train-draft"]
    assert len(kubeflow.versions) == len(kubeflow.experiments) == 1
    assert first.run_id != second.run_id and len(kubeflow.runs) == 2
    run = kubeflow.runs[0]
    assert run["runtime_config"]["parameters"] == parameters
    reference = {"pipeline_id": first.pipeline_id, "pipeline_version_id": first.version_id}
    assert run["pipeline_version_reference"] == reference
    assert (run["display_name"], run["service_account"]) == ("tickets", "runner")


def test_a_changed_pipeline_is_a_new_version(kubeflow: FakeKubeflow, monkeypatch: pytest.MonkeyPatch) -> None:
    first = submit(Server(kubeflow.url), Submission("train-draft"))
    changed = PACKAGE + "# changed\n"
    monkeypatch.setattr(submitting, "compile_pipeline", lambda path, name: path.write_text(changed.format(name=name)))
    second = submit(Server(kubeflow.url), Submission("train-draft"))
    assert first.pipeline_id == second.pipeline_id and first.version_id != second.version_id
    assert b"# changed" in kubeflow.uploads[-1]


def test_a_schedule_replaces_the_one_of_its_name(kubeflow: FakeKubeflow) -> None:
    submit(Server(kubeflow.url), Submission("train-draft", run_name="other", every_s=60))
    first = submit(Server(kubeflow.url), Submission("train-draft", run_name="nightly", cron="0 0 3 * * *"))
    second = submit(Server(kubeflow.url), Submission("train-draft", run_name="nightly", every_s=3600))
    assert second.is_recurring and first.run_id != second.run_id and kubeflow.runs == []
    other, kept = kubeflow.recurring
    assert other["display_name"] == "other" and kept["recurring_run_id"] == second.run_id
    assert int(kept["trigger"]["periodic_schedule"]["interval_second"]) == 3600
    assert kept["no_catchup"] is True and int(kept["max_concurrency"]) == 1


def test_watching_shows_each_change_and_outlasts_a_bad_minute(kubeflow: FakeKubeflow) -> None:
    made = submit(Server(kubeflow.url), Submission("train-draft"))
    running = {"state": "RUNNING", "run_details": {"task_details": [task("prompts", "RUNNING")]}}
    done = {"state": "SUCCEEDED", "run_details": {"task_details": [task("prompts", "SUCCEEDED")]}}
    kubeflow.states = [{"state": "PENDING"}, running, 503, running, done]
    shown: list[str] = []
    watch(Server(kubeflow.url), made.run_id, shown.append, poll_s=0.01)
    assert shown == ["prompts: running", "prompts: succeeded", f"run {made.run_id}: succeeded"]


@pytest.mark.parametrize(("state", "message"), [("FAILED", "failed; got in draft"), ("CANCELED", "was cancelled")])
def test_a_run_that_ends_badly_is_an_error(kubeflow: FakeKubeflow, state: str, message: str) -> None:
    made = submit(Server(kubeflow.url), Submission("train-draft", run_name="tickets"))
    kubeflow.states = [{"state": state, "run_details": {"task_details": [task("draft", "FAILED")]}}]
    with pytest.raises(StepError, match=f"the run tickets {message}"):
        watch(Server(kubeflow.url), made.run_id, print, poll_s=0.01)


def test_a_host_that_does_not_answer_is_one_clear_line() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(PlatformError, match=r"no Kubeflow Pipelines server answers at .*port-forward"):
        submit(Server(host), Submission("train-draft"))


def test_a_token_is_asked_for_and_sent(kubeflow: FakeKubeflow) -> None:
    kubeflow.token = "secret"
    with pytest.raises(PlatformError, match="KFP_TOKEN"):
        submit(Server(kubeflow.url), Submission("train-draft"))
    submit(Server(kubeflow.url, "secret"), Submission("train-draft"))
    assert len(kubeflow.runs) == 1


def test_a_refusal_is_told_in_the_server_s_words(kubeflow: FakeKubeflow, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = kubeflow.answer
    monkeypatch.setattr(
        kubeflow, "answer",
        lambda method, path, *rest: (400, {"error": "no such account"}) if (method, path) == ("POST", "/runs")
        else answer(method, path, *rest),
    )  # fmt: skip
    with pytest.raises(PlatformError, match="refuses; got 400 no such account"):
        submit(Server(kubeflow.url), Submission("train-draft"))


def test_parameters_have_the_pipeline_s_names_and_types() -> None:
    given = parse_parameters("train-draft", ["gpu_count=8", 'ray_job={"queue": "team"}', 'tolerations=[{"key": "a"}]'])
    assert given == {"gpu_count": "8", "ray_job": {"queue": "team"}, "tolerations": [{"key": "a"}]}
    for wrong in ("gpus=8", "ray_job=team", 'tolerations={"a": 1}'):
        with pytest.raises(SpecError, match="parameter"):
            parse_parameters("train-draft", [wrong])


def test_schedules_are_checked() -> None:
    assert parse_every("90m") == 5400 and check_cron("0 0 3 * * *")
    for wrong in ("3", "0h", "1.5h"):
        with pytest.raises(SpecError, match="interval"):
            parse_every(wrong)
    with pytest.raises(SpecError, match="six fields"):
        check_cron("0 3 * * *")


def test_a_workspace_on_this_machine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="cannot read this workspace"):
        store_spec(RunSpec(), str(tmp_path))


def test_the_command_stores_the_spec_and_starts_the_run(
    kubeflow: FakeKubeflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored: dict[str, bytes] = {}

    class Store:
        def put(self, key: str, data: bytes) -> None:
            stored[key] = data

    monkeypatch.setattr(submitting, "open_store", lambda uri: Store())
    spec = tmp_path / "spec.yaml"
    spec.write_text("name: tickets\n")
    arguments = ["submit", str(spec), "--host", kubeflow.url, "--workspace", "s3://bucket/drafts", "--watch"]
    result = CliRunner().invoke(app, [*arguments, "--param", "gpu_count=0"])
    assert result.exit_code == 0, result.output
    ((key, text),) = stored.items()
    assert yaml.safe_load(text)["workspace"] == "s3://bucket/drafts"
    parameters = kubeflow.runs[0]["runtime_config"]["parameters"]
    assert parameters["spec_uri"] == f"s3://bucket/drafts/{key}"
    assert parameters["gpu_count"] == "0" and parameters["suites"] == list(RunSpec().evaluation.suites)
    assert "succeeded" in result.output and f"{kubeflow.url}/#/runs/details/" in result.output


def test_a_promotion_needs_no_spec(kubeflow: FakeKubeflow) -> None:
    arguments = ["submit", "--pipeline", "promote-draft", "--host", kubeflow.url]
    result = CliRunner().invoke(app, [*arguments, "--param", "model=desk", "--param", "force=true"])
    assert result.exit_code == 0, result.output
    assert kubeflow.runs[0]["runtime_config"]["parameters"] == {"model": "desk", "force": True}
    assert kubeflow.runs[0]["display_name"] == "promote-draft"
