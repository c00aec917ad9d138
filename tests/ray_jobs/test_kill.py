"""SIGKILL in the middle of a job, then the same job again: not a byte differs from an undisturbed run.

The jobs run as in production, as child processes on a real Ray.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from draftline.cache.shards import Manifest
from draftline.jobs import EVENTS_ENV
from draftline.spec import RunSpec, derive, dump_spec, recipe
from draftline.steps.context import StepContext, StepOutput
from draftline.steps.ledger import StepResult
from draftline.storage.local import LocalStore
from draftline.target.load import Target
from draftline.tokens.station import run as run_tokens
from pipelines.embedded.platform import Platform
from tests.training.cases import conversations

pytestmark = pytest.mark.slow

NUM_CONVERSATIONS = 160


@dataclass(frozen=True)
class Bench:
    """Where the jobs run."""

    folder: Path
    env: Mapping[str, str]
    spec: RunSpec
    store: LocalStore

    def start(self, module: str, context: StepContext) -> tuple[subprocess.Popen[bytes], Path]:
        """The job as a child in a process group of its own, and its result file."""
        request, result = self.folder / f"{context.key}.json", self.folder / f"{context.key}-result.json"
        request.write_text(
            json.dumps(
                {
                    "station": context.station,
                    "key": context.key,
                    "item": context.item,
                    "workspace": self.store.uri,
                    "spec": dump_spec(self.spec),
                    "inputs": {name: value.to_json() for name, value in context.inputs.items()},
                }
            )
        )
        log = open(self.folder / f"{context.key}.log", "ab")  # noqa: SIM115 (the child keeps it)
        with log:
            process = subprocess.Popen(
                [sys.executable, "-m", module, str(request), str(result)],
                env={**self.env, EVENTS_ENV: str(self.events(context))},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return process, result

    def events(self, context: StepContext) -> Path:
        """The progress file of the job's next (or present) run."""
        return self.folder / f"{context.key}.events"

    def finish(self, module: str, context: StepContext) -> StepOutput:
        """Run the job to its end, with a progress file of its own."""
        if self.events(context).exists():
            self.events(context).rename(self.folder / f"{context.key}.events-before")
        process, result = self.start(module, context)
        try:
            code = process.wait(240)
        finally:
            self.kill(process)
        log = (self.folder / f"{context.key}.log").read_text()
        assert code == 0, log[-3000:]
        return StepOutput(**json.loads(result.read_text()))

    def kill_when(self, module: str, context: StepContext, is_time: Callable[[], bool]) -> None:
        """Start the job and SIGKILL its whole group at the given moment."""
        process, result = self.start(module, context)
        try:
            deadline = time.monotonic() + 240
            while not is_time():
                assert process.poll() is None, (self.folder / f"{context.key}.log").read_text()[-3000:]
                assert time.monotonic() < deadline
                time.sleep(0.005)
        finally:
            self.kill(process)
        assert process.returncode == -signal.SIGKILL
        assert not result.exists()

    @staticmethod
    def kill(process: subprocess.Popen[bytes]) -> None:
        """End the group of a child that may be over already."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)

    def names(self, context: StepContext, folder: str = "") -> list[str]:
        """Objects of a step, relative to its folder."""
        prefix = f"{context.prefix}/{folder}"
        return [info.key.removeprefix(f"{context.prefix}/") for info in self.store.list(prefix)]


@pytest.fixture(scope="module")
def bench(platform: Platform, tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("kill")
    store = LocalStore(folder / "workspace")
    store.create()
    spec = derive(
        recipe("smollm2-135m"),
        {
            "target.source": str(tiny_target),
            "target.dtype": "fp32",
            "workspace": store.uri,
            "tokens.max_length": 120,
            "tokens.shard_tokens": 30,
            "cache.workers": 1,
            "draft.block_size": 4,
            "draft.num_taps": 2,
            "draft.vocab_size": 60,
            "draft.markov_rank": 8,
            "train.steps": 40,
            "train.samples_per_step": 4,
            "train.anchors_per_sample": 8,
            "train.checkpoint_every_steps": 2,
            "train.validate_every_steps": 20,
            "train.threads_per_worker": 1,
        },
    )
    env = {**os.environ, **platform.ray_client_env, "PYTHONUNBUFFERED": "1"}
    return Bench(folder, env, spec, store)


@pytest.fixture(scope="module")
def tokens(bench: Bench, loaded_target: Target) -> StepResult:
    """The tokens step, from hand-made responses."""
    lines = []
    for number, (name, ids, mask) in enumerate(conversations(loaded_target, NUM_CONVERSATIONS)):
        start = mask.index(1)
        turns = [{"prompt_ids": ids[:start], "response_ids": ids[start:]}]
        split = "validation" if number % 20 == 0 else "train"
        lines.append(json.dumps({"id": name, "split": split, "turns": turns}) + "\n")
    name, data = "shard-00000.jsonl", "".join(lines).encode()
    bench.store.put(f"responses/r/{name}", data)
    digests = {name: hashlib.sha256(data).hexdigest()}
    outputs = {"shards": [name], "sha256": digests, "target": loaded_target.fingerprint}
    responses = StepResult("responses", "r", outputs=outputs)
    output = run_tokens(StepContext("tokens", "t", bench.spec, bench.store, {"responses": responses}))
    return StepResult("tokens", "t", outputs=dict(output.outputs))


@pytest.fixture(scope="module")
def captured(bench: Bench, tokens: StepResult) -> StepResult:
    """An undisturbed capture."""
    context = StepContext("hidden-states", "undisturbed-capture", bench.spec, bench.store, {"tokens": tokens})
    output = bench.finish("ray_jobs.capture", context)
    return StepResult("hidden-states", context.key, outputs=dict(output.outputs))


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


def test_a_killed_training_goes_on_to_the_same_weights(bench: Bench, captured: StepResult) -> None:
    context = StepContext("draft", "undisturbed-draft", bench.spec, bench.store, {"hidden-states": captured})
    undisturbed = bench.finish("ray_jobs.train", context)
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


def _figures(output: StepOutput) -> dict[str, float]:
    return {name: value for name, value in output.metrics.items() if name != "train_seconds"}
