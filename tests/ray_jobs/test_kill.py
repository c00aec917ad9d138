"""SIGKILL in the middle of a job, then the same job again: not a byte differs from an undisturbed run.

The jobs run as in production, as child processes on a real Ray.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import replace

import psutil
import pytest

from draftline.cache.shards import Manifest
from draftline.errors import TrainingDiverged
from draftline.spec import derive
from draftline.steps.context import StepContext, StepOutput
from draftline.steps.ledger import StepResult
from tests.ray_jobs.bench import Bench

pytestmark = pytest.mark.slow


def test_a_killed_capture_goes_on_to_the_same_bytes(bench: Bench, tokens: StepResult, captured: StepResult) -> None:
    context = StepContext("hidden-states", "killed-capture", bench.spec, bench.store, {"tokens": tokens})
    total = len(tokens.outputs["shards"])
    assert total > 50

    def entries() -> list[str]:
        return [name for name in bench.names(context) if name.endswith(".safetensors.json")]

    bench.kill_when("ray_jobs.capture", context, lambda: len(entries()) > 0)
    # Actors of a killed driver may finish what they hold; they are gone when the count stands still.
    before = entries()
    assert 0 < len(before) < total, "the kill came too late to test anything"
    kept = {name: _digest(bench, context, name.removesuffix(".json")) for name in before}
    output = bench.finish("ray_jobs.capture", context)
    done = [json.loads(line)["done"] for line in bench.events(context).read_text().splitlines()]
    assert min(done) > 0, "the second run began anew"
    assert dict(output.outputs) == dict(captured.outputs)
    for info in Manifest.from_json(output.outputs, kind="hidden-states").shards:
        assert _digest(bench, context, info.name) == info.sha256
        assert bench.store.get(f"{captured.prefix}/{info.name}") == bench.store.get(f"{context.prefix}/{info.name}")
    assert all(_digest(bench, context, name.removesuffix(".json")) == digest for name, digest in kept.items())


def _digest(bench: Bench, context: StepContext, name: str) -> str:
    return hashlib.sha256(bench.store.get(f"{context.prefix}/{name}")).hexdigest()


@pytest.fixture(scope="module")
def trained(bench: Bench, captured: StepResult) -> tuple[StepContext, StepOutput]:
    """An undisturbed training by one worker."""
    context = StepContext("draft", "undisturbed-draft", bench.spec, bench.store, {"hidden-states": captured})
    return context, bench.finish("ray_jobs.train", context)


def test_a_killed_training_goes_on_to_the_same_weights(bench: Bench, trained: tuple[StepContext, StepOutput]) -> None:
    context, undisturbed = trained
    weights = bench.store.get(f"{context.prefix}/draft/model.safetensors")
    assert hashlib.sha256(weights).hexdigest() == undisturbed.outputs["files"]["model.safetensors"]
    killed = replace(context, key="killed-draft")
    bench.kill_when("ray_jobs.train", killed, lambda: bool(bench.names(killed, "scratch/")))
    assert bench.names(killed, "draft/") == [], "the kill came too late to test anything"
    resumed = bench.finish("ray_jobs.train", killed)
    assert bench.store.get(f"{killed.prefix}/draft/model.safetensors") == weights
    assert dict(resumed.outputs) == dict(undisturbed.outputs)
    assert _figures(resumed) == _figures(undisturbed)
    assert bench.store.get(f"{killed.prefix}/history.jsonl") == bench.store.get(f"{context.prefix}/history.jsonl")
    steps = [json.loads(line)["done"] for line in bench.events(killed).read_text().splitlines()]
    # A worker of the killed run may live for a moment and report one step more.
    assert sorted(set(steps)) == list(range(int(min(steps)), 41)) and min(steps) > 1, "the second run began anew"


def test_a_killed_training_goes_on_with_another_number_of_workers(
    bench: Bench, trained: tuple[StepContext, StepOutput]
) -> None:
    """One worker is killed; two, sharded, go on: the same samples, so the same curve but for rounding."""
    context, _ = trained
    killed = replace(context, key="regrouped-draft")
    bench.kill_when("ray_jobs.train", killed, lambda: len(bench.names(killed, "scratch/")) == 2)
    assert bench.names(killed, "draft/") == [], "the kill came too late to test anything"
    pair = replace(killed, spec=derive(bench.spec, {"train.num_workers": 2, "train.parallel": "fsdp"}))
    bench.finish("ray_jobs.train", pair)
    steps = [json.loads(line)["done"] for line in bench.events(pair).read_text().splitlines()]
    assert sorted(set(steps)) == list(range(int(min(steps)), 41)) and min(steps) > 1, "the second run began anew"
    _assert_same_curve(bench, context, pair)


def test_a_killed_worker_is_started_again_and_all_go_on(
    bench: Bench, captured: StepResult, trained: tuple[StepContext, StepOutput]
) -> None:
    """SIGKILL of the second of two workers, the job alive: Ray Train starts both again from the checkpoint."""
    spec = derive(bench.spec, {"train.num_workers": 2})
    hurt = StepContext("draft", "hurt-pair", spec, bench.store, {"hidden-states": captured})
    process, result = bench.start("ray_jobs.train", hurt)
    victims: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 240
        while not bench.names(hurt, "scratch/"):
            assert process.poll() is None and time.monotonic() < deadline
            victims = victims if len(victims) == 2 else _training_workers(bench.ray_pid)
            time.sleep(0.005)
        victims[-1].kill()
        assert process.wait(240) == 0, (bench.folder / f"{hurt.key}.log").read_text()[-3000:]
    finally:
        bench.kill(process)
    assert result.exists()
    done = [json.loads(line)["done"] for line in bench.events(hurt).read_text().splitlines()]
    log = (bench.folder / f"{hurt.key}.log").read_text()
    assert log.count("Started training worker group of size 2") == 2, "the worker died too late to test anything"
    # A step that was saved but not yet reported when the worker died is not done again.
    unreported = set(range(1, 41)) - set(done)
    assert len(unreported) <= 1 and done.count(1) == 1 and done[-1] == 40, "the second attempt began anew"
    _assert_same_curve(bench, trained[0], hurt)


def test_not_a_number_ends_the_job_at_once_with_the_samples(bench: Bench, captured: StepResult) -> None:
    """No second attempt: it would meet the same samples. The last good checkpoint stays."""
    spec = derive(bench.spec, {"train.num_workers": 2, "train.muon_lr": 1e30, "train.lr": 1e30})
    context = StepContext("draft", "diverged", spec, bench.store, {"hidden-states": captured})
    process, result = bench.start("ray_jobs.train", context)
    try:
        assert process.wait(240) == TrainingDiverged.exit_code
    finally:
        bench.kill(process)
    error = json.loads(result.read_text())["error"]
    assert error["type"] == "TrainingDiverged" and error["got"].startswith("samples ")
    done = [json.loads(line)["done"] for line in bench.events(context).read_text().splitlines()]
    assert done == list(range(1, len(done) + 1)), "the workers were started again"


def _training_workers(ray_pid: int) -> list[psutil.Process]:
    """Ray Train's workers of this test's own Ray, the youngest last."""
    found = [
        process
        for process in psutil.Process(ray_pid).children(recursive=True)
        if "RayTrainWorker" in " ".join(process.cmdline())
    ]
    return sorted(found, key=lambda process: process.create_time())


def _assert_same_curve(bench: Bench, one: StepContext, two: StepContext) -> None:
    """Equal to rounding: the figures of forty steps drift apart a little."""
    curves = [
        [json.loads(line) for line in bench.store.get(f"{context.prefix}/history.jsonl").splitlines()]
        for context in (one, two)
    ]
    assert [record["step"] for record in curves[0]] == [record["step"] for record in curves[1]]
    for left, right in zip(*curves, strict=True):
        assert right == pytest.approx(left, rel=5e-3)


def _figures(output: StepOutput) -> dict[str, float]:
    return {name: value for name, value in output.metrics.items() if name != "train_seconds"}
