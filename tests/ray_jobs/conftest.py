"""Fixtures: a bench of jobs, and an undisturbed capture that several tests train from."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from draftline.spec import derive, recipe
from draftline.steps.context import StepContext
from draftline.steps.ledger import StepResult
from draftline.storage.local import LocalStore
from draftline.target.load import Target
from draftline.tokens.station import run as run_tokens
from pipelines.embedded.platform import Platform
from tests.ray_jobs.bench import Bench
from tests.training.cases import conversations

NUM_CONVERSATIONS = 160


@pytest.fixture(scope="session")
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
    return Bench(folder, env, spec, store, platform.pids["ray"])


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def captured(bench: Bench, tokens: StepResult) -> StepResult:
    """An undisturbed capture."""
    context = StepContext("hidden-states", "undisturbed-capture", bench.spec, bench.store, {"tokens": tokens})
    output = bench.finish("ray_jobs.capture", context)
    return StepResult("hidden-states", context.key, outputs=dict(output.outputs))
