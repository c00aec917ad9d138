"""Training figures reach a real MLflow server while the job runs; a killed step goes on in the same run."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from components.live_metrics_process import TAG_LIVE
from draftline.jobs import EVENTS_ENV
from draftline.spec import derive, dump_spec
from draftline.steps.ledger import StepResult
from pipelines.embedded.platform import Platform
from tests.ray_jobs.bench import Bench

pytestmark = pytest.mark.slow

STEPS = 240
WHILE_TRAINING = {"loss", "ce", "tv", "confidence", "acceptance", "tokens_per_s", "data_wait_share"}
AT_VALIDATION = {"accepted_length", "validation_loss"}


def start(bench: Bench, platform: Platform, folder: Path, captured: StepResult) -> subprocess.Popen[bytes]:
    """The draft component, as in a pod: no events file of a local runner."""
    spec = derive(bench.spec, {"name": "live-figures", "train.steps": STEPS})
    (folder / "spec.yaml").write_text(dump_spec(spec))
    (folder / "hidden.json").write_text(captured.to_json())
    env = {**bench.env, "MLFLOW_TRACKING_URI": platform.mlflow_uri}
    env.pop(EVENTS_ENV, None)
    arguments = [folder / "spec.yaml", bench.store.uri, folder / "hidden.json", folder / "result.json"]
    with open(folder / "log", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.ray_jobs.component_driver", *map(str, arguments)],
            env=env,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def live_runs(client: MlflowClient) -> list[Run]:
    experiment = client.get_experiment_by_name("live-figures")
    if experiment is None:
        return []
    return [run for run in client.search_runs([experiment.experiment_id]) if TAG_LIVE in run.data.tags]


def test_figures_arrive_while_the_job_runs_and_a_killed_one_goes_on_in_its_run(
    bench: Bench, platform: Platform, captured: StepResult, tmp_path: Path
) -> None:
    client = MlflowClient(tracking_uri=platform.mlflow_uri)
    process = start(bench, platform, tmp_path, captured)
    try:
        deadline = time.monotonic() + 200
        seen: set[str] = set()
        while not seen >= {f"train/{name}" for name in WHILE_TRAINING | AT_VALIDATION}:
            assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
            assert time.monotonic() < deadline, seen
            time.sleep(0.2)
            seen = {name for run in live_runs(client) for name in run.data.metrics}
        assert process.poll() is None and live_runs(client)[0].info.status == "RUNNING"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)
    assert not (tmp_path / "result.json").exists()

    process = start(bench, platform, tmp_path, captured)
    try:
        assert process.wait(240) == 0, (tmp_path / "log").read_text()[-3000:]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    result = StepResult.from_json((tmp_path / "result.json").read_text())
    (run,) = live_runs(client)
    assert run.info.status == "FINISHED"
    assert run.data.tags[TAG_LIVE] == result.key and result.key[:8] in (run.info.run_name or "")
    history = {
        name: client.get_metric_history(run.info.run_id, f"train/{name}") for name in ("loss", "accepted_length")
    }
    # The kill took the follower along, and what it had not sent: about a second, one gap before the resumed steps.
    steps = [point.step for point in history["loss"]]
    assert steps == sorted(set(steps)) and (steps[0], steps[-1]) == (1, STEPS)
    assert sum(after - before > 1 for before, after in itertools.pairwise(steps)) <= 1
    assert history["loss"][-1].value == result.metrics["train_loss"]
    validated = [point.step for point in history["accepted_length"]]
    assert set(validated) <= set(range(20, STEPS + 1, 20)) and (validated[0], validated[-1]) == (20, STEPS)
    assert "[draft] running" in (tmp_path / "log").read_text(), "the pod's log must still show the progress"
