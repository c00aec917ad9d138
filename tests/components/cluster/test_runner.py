"""A step's RayJob, against a Kubernetes API over real HTTP and an operator that really runs the entry point."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client

from components.cluster.api import POD_NAME_ENV, Cluster
from components.cluster.manifest import PodFacts, job_name
from components.cluster.runner import EXIT_TERMINATED, RayJobRunner, read_status
from components.cluster.settings import JobSettings
from draftline.errors import AccessDenied, InputError, PlatformError, StepError
from draftline.progress import ListProgress
from draftline.spec import RunSpec
from draftline.steps.context import StepContext, StepOutput
from draftline.steps.ledger import StepResult
from draftline.steps.stations import STATIONS, Station
from draftline.storage.local import LocalStore
from tests.servers.kubernetes_api import FakeKubeRay, FakeKubernetes

ROOT = Path(__file__).parents[3]
JOB = """
import os, sys, time
from pathlib import Path
from draftline.errors import InputError
from draftline.jobs import read_request, report_result
from draftline.steps.context import StepOutput
context = read_request(sys.argv[1])
print("hello from the job", flush=True)
context.report(1, 2, "shards", values={"loss": 1.5})
if context.spec.name == "refuses":
    sys.exit(report_result(sys.argv[2], InputError("bad data", got=3, remedy="Give more")))
if context.spec.name == "dies" or context.spec.name == "dies-once" and os.environ["FAKE_ATTEMPT"] == "0":
    sys.exit(9)
while context.spec.name == "waits" and not Path(os.environ["FAKE_GATE"]).exists():
    time.sleep(0.02)
facts = {"key": context.key, "prompts": context.inputs["prompts"].key}
sys.exit(report_result(sys.argv[2], StepOutput(facts, {"n": 1.5})))
"""
KEY = "k" * 20


@pytest.fixture
def kubernetes() -> Iterator[FakeKubernetes]:
    with FakeKubernetes() as fake:
        yield fake


@pytest.fixture
def station(tmp_path: Path) -> Station:
    (tmp_path / "a_ray_job.py").write_text(textwrap.dedent(JOB))
    return replace(STATIONS["responses"], run="a_ray_job:run")


@pytest.fixture
def operator(kubernetes: FakeKubernetes, tmp_path: Path) -> FakeKubeRay:
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "FAKE_GATE": str(tmp_path / "gate")}
    return FakeKubeRay(kubernetes, environment)


def context(tmp_path: Path, name: str = "run") -> StepContext:
    prompts = StepResult("prompts", "p" * 20)
    store = LocalStore(tmp_path / "workspace")
    store.create()
    return StepContext("responses", KEY, RunSpec(name=name), store, {"prompts": prompts}, progress=ListProgress())


def runner(fake: FakeKubernetes, **settings: Any) -> RayJobRunner:
    given = JobSettings(**{"retries": 0, "unreachable_s": 5, **settings})
    configuration = client.Configuration(host=fake.url)
    return RayJobRunner(Cluster("ml", given.unreachable_s, configuration), PodFacts("draftline:1"), given)


def name_of(given: StepContext) -> str:
    return job_name("responses", given.store.uri, KEY)


def in_background(call: Callable[[], StepOutput]) -> tuple[threading.Thread, list[StepOutput]]:
    outputs: list[StepOutput] = []
    thread = threading.Thread(target=lambda: outputs.append(call()), daemon=True)
    thread.start()
    return thread, outputs


def until(condition: Callable[[], object], within_s: float = 10.0) -> None:
    deadline_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def test_submits_follows_and_brings_the_result_back(
    kubernetes: FakeKubernetes,
    operator: FakeKubeRay,
    station: Station,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = context(tmp_path)
    output = runner(kubernetes)(station, given)
    assert output == StepOutput({"key": KEY, "prompts": "p" * 20}, {"n": 1.5})
    printed = capsys.readouterr().out
    assert printed.count("hello from the job\n") == 1
    assert "submitted RayJob" in printed and "Complete (SUCCEEDED)" in printed
    assert isinstance(given.progress, ListProgress)
    assert [(e.done, e.total, e.unit, dict(e.values)) for e in given.progress.events] == [
        (1, 2, "shards", {"loss": 1.5})
    ]
    job = kubernetes.get("rayjobs", name_of(given))
    assert job is not None and job["metadata"]["annotations"]["draftline.io/workspace"] == given.store.uri


def test_a_step_that_starts_again_finds_its_job(
    kubernetes: FakeKubernetes, operator: FakeKubeRay, station: Station, tmp_path: Path
) -> None:
    given = context(tmp_path, "waits")
    first, _ = in_background(lambda: runner(kubernetes)(station, given))
    until(lambda: operator.num_jobs == 1)
    # The first pod is gone without a word; a second one has the same work.
    second, outputs = in_background(lambda: runner(kubernetes)(station, given))
    until(lambda: kubernetes.count("GET") > 4)
    (tmp_path / "gate").touch()
    second.join(10)
    first.join(10)
    assert outputs[0].outputs["key"] == KEY
    assert operator.num_jobs == 1 and kubernetes.count("POST") == 1


def test_two_that_create_at_once_share_one_job(
    kubernetes: FakeKubernetes, operator: FakeKubeRay, station: Station, tmp_path: Path
) -> None:
    given = context(tmp_path)
    other = {"metadata": {"name": name_of(given)}, "spec": {}}

    def appear(method: str, path: str) -> int | None:
        if method == "POST" and kubernetes.get("rayjobs", name_of(given)) is None:
            kubernetes.put("rayjobs", other)
            given.store.put(
                f"{given.scratch}/job/result.json", json.dumps({"outputs": {"a": 1}, "metrics": {}}).encode()
            )
            kubernetes.set_status("rayjobs", name_of(given), jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")
        return None

    kubernetes.faults = appear
    assert runner(kubernetes)(station, given).outputs == {"a": 1}
    assert operator.num_jobs == 0


def test_a_finished_job_that_its_ttl_removed_is_not_run_again(
    kubernetes: FakeKubernetes, operator: FakeKubeRay, station: Station, tmp_path: Path
) -> None:
    given = context(tmp_path)
    runner(kubernetes)(station, given)
    kubernetes.remove("rayjobs", name_of(given))
    assert runner(kubernetes)(station, given).metrics == {"n": 1.5}
    assert operator.num_jobs == 1


def test_a_finished_job_whose_result_was_removed_is_run_again(
    kubernetes: FakeKubernetes, operator: FakeKubeRay, station: Station, tmp_path: Path
) -> None:
    given = context(tmp_path)
    runner(kubernetes)(station, given)
    given.store.delete(f"{given.scratch}/job/result.json")
    assert runner(kubernetes)(station, given).metrics == {"n": 1.5}
    assert operator.num_jobs == 2


def test_the_job_s_own_error_comes_back_at_once(
    kubernetes: FakeKubernetes, operator: FakeKubeRay, station: Station, tmp_path: Path
) -> None:
    given = context(tmp_path, "refuses")
    for attempt in (1, 2):
        with pytest.raises(InputError, match=r"bad data; got 3\. Give more"):
            runner(kubernetes, retries=5)(station, given)
        # A run that is started again tries again: the reason may be gone.
        assert operator.num_jobs == attempt


def test_a_job_that_died_is_tried_again(
    kubernetes: FakeKubernetes, operator: FakeKubeRay, station: Station, tmp_path: Path
) -> None:
    assert runner(kubernetes, retries=1)(station, context(tmp_path, "dies-once")).metrics == {"n": 1.5}
    assert operator.num_jobs == 2


def test_a_job_that_dies_for_good_says_why(
    kubernetes: FakeKubernetes, operator: FakeKubeRay, station: Station, tmp_path: Path
) -> None:
    with pytest.raises(StepError, match=r"'responses' failed; got AppFailed: exit code 9.*describe rayjob"):
        runner(kubernetes, retries=1)(station, context(tmp_path, "dies"))
    assert operator.num_jobs == 2


def test_a_job_that_is_not_valid_or_too_late_is_not_tried_again(
    kubernetes: FakeKubernetes, station: Station, tmp_path: Path
) -> None:
    kubernetes.after_create = lambda job: kubernetes.set_status(
        "rayjobs", job["metadata"]["name"], jobDeploymentStatus="ValidationFailed", message="no such mode"
    )
    with pytest.raises(StepError, match="ValidationFailed: no such mode"):
        runner(kubernetes, retries=3)(station, context(tmp_path))
    assert kubernetes.count("POST") == 1


def test_a_job_that_somebody_deletes_ends_the_step(
    kubernetes: FakeKubernetes, station: Station, tmp_path: Path
) -> None:
    kubernetes.after_create = lambda job: kubernetes.remove("rayjobs", job["metadata"]["name"]) and None
    with pytest.raises(StepError, match="was deleted"):
        runner(kubernetes, retries=3)(station, context(tmp_path))


def test_an_api_server_s_bad_minutes_are_outlasted(
    kubernetes: FakeKubernetes, operator: FakeKubeRay, station: Station, tmp_path: Path
) -> None:
    turns = {"GET": iter([503, 0, 500, *[None] * 2, 0, 429]), "POST": iter([0, 504])}
    kubernetes.faults = lambda method, path: next(turns.get(method, iter(())), None)
    assert runner(kubernetes)(station, context(tmp_path)).metrics == {"n": 1.5}
    assert operator.num_jobs == 1


def test_an_api_server_that_stays_away_fails_the_step(
    kubernetes: FakeKubernetes, station: Station, tmp_path: Path
) -> None:
    kubernetes.faults = lambda method, path: 503
    with pytest.raises(PlatformError, match=r"cannot read rayjobs/.*503 injected"):
        runner(kubernetes, unreachable_s=1)(station, context(tmp_path))


def test_a_missing_right_is_named(kubernetes: FakeKubernetes, station: Station, tmp_path: Path) -> None:
    kubernetes.faults = lambda method, path: 403 if method == "POST" else None
    with pytest.raises(AccessDenied, match=r"may not create rayjobs.*pipeline\.subjects"):
        runner(kubernetes)(station, context(tmp_path))
    assert kubernetes.count("POST") == 1


def test_a_missing_right_to_watch_ends_the_step(kubernetes: FakeKubernetes, station: Station, tmp_path: Path) -> None:
    kubernetes.faults = lambda method, path: 403 if method == "GET" and path.endswith("/rayjobs") else None
    with pytest.raises(AccessDenied, match="may not watch rayjobs"):
        runner(kubernetes)(station, context(tmp_path))


def test_a_log_that_breaks_off_is_read_on(
    kubernetes: FakeKubernetes, station: Station, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = context(tmp_path)

    def operate(job: dict[str, Any]) -> None:
        name = job["metadata"]["name"]
        kubernetes.add_pod("submitter", {"job-name": name})
        kubernetes.cut_log_after("submitter", 2)
        for line in ("one", "two", "three"):
            kubernetes.write_log("submitter", line)
        time.sleep(0.3)
        kubernetes.write_log("submitter", "four")
        given.store.put(f"{given.scratch}/job/result.json", json.dumps({"outputs": {}, "metrics": {}}).encode())
        kubernetes.end_pod("submitter")
        kubernetes.set_status("rayjobs", name, jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")

    kubernetes.after_create = operate
    runner(kubernetes)(station, given)
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if line in ("one", "two", "three", "four")] == ["one", "two", "three", "four"]


def test_terminating_the_step_deletes_its_job(kubernetes: FakeKubernetes, station: Station, tmp_path: Path) -> None:
    kubernetes.add_pod("step", {}, containers=[{"name": "main", "image": "draftline:1"}])
    kubernetes.after_create = lambda job: kubernetes.set_status(
        "rayjobs", job["metadata"]["name"], jobDeploymentStatus="Running"
    )
    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.write_text(json.dumps({
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "clusters": [{"name": "k", "cluster": {"server": kubernetes.url}}],
        "users": [{"name": "u", "user": {}}],
        "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
    }))  # fmt: skip
    program = f"""
from pathlib import Path
from components.cluster.runner import ray_job_runner
from draftline.steps.stations import STATIONS
from tests.components.cluster.test_runner import context
ray_job_runner({{"cpu": "1"}})(STATIONS["responses"], context(Path({str(tmp_path)!r})))
"""
    environment = {
        **os.environ, "KUBECONFIG": str(kubeconfig), "DRAFTLINE_NAMESPACE": "ml", POD_NAME_ENV: "step",
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    process = subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True)
    name = name_of(context(tmp_path))
    until(lambda: kubernetes.get("rayjobs", name) is not None, 30)
    job = kubernetes.get("rayjobs", name)
    assert job is not None and job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"] == 1
    until(lambda: any(request.startswith("GET") and request.endswith("/rayjobs") for request in kubernetes.requests))
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=15)
    assert process.returncode == EXIT_TERMINATED
    assert f"deleting RayJob {name}" in printed
    assert kubernetes.get("rayjobs", name) is None


@pytest.mark.parametrize(
    ("deployment", "work", "is_over", "has_failed"),
    [
        ("", "", False, False),
        ("Suspended", "", False, False),
        ("Retrying", "FAILED", False, False),
        ("Running", "RUNNING", False, False),
        ("Complete", "SUCCEEDED", True, False),
        ("Complete", "STOPPED", True, True),
        ("Failed", "FAILED", True, True),
        ("ValidationFailed", "", True, True),
    ],
)
def test_states_of_a_ray_job(deployment: str, work: str, is_over: bool, has_failed: bool) -> None:
    end = read_status({"status": {"jobDeploymentStatus": deployment, "jobStatus": work}})
    assert (end.is_over, end.has_failed) == (is_over, has_failed)
