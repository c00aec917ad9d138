"""Stream mode on a real Ray: the draft, its history and its checkpoints are those of a cached run, to the bit."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from draftline.cache.catalogue import find_caches, summarise
from draftline.cache.manifest import STREAM_KIND, Manifest
from draftline.cache.reader import WINDOW_SHARDS
from draftline.cache.verification import plan_checks, run_checks
from draftline.spec import RunSpec, derive
from draftline.steps.context import StepContext
from draftline.steps.ledger import Ledger, StepResult
from tests.ray_jobs.bench import Bench

pytestmark = pytest.mark.slow

KEY = "5" * 20
AHEAD = 2


def streamed_spec(bench: Bench, **overrides: object) -> RunSpec:
    return derive(bench.spec, {"cache.mode": "stream", "cache.stream_ahead_shards": AHEAD, **overrides})


@pytest.fixture(scope="module")
def announced(bench: Bench, tokens: StepResult) -> StepResult:
    """The hidden-states step in mode stream."""
    context = StepContext("hidden-states", KEY, streamed_spec(bench), bench.store, {"tokens": tokens})
    output = bench.finish("ray_jobs.capture", context)
    return StepResult("hidden-states", KEY, outputs=dict(output.outputs), metrics=dict(output.metrics))


def draft(bench: Bench, spec: RunSpec, hidden: StepResult, key: str) -> StepContext:
    return StepContext("draft", key, spec, bench.store, {"hidden-states": hidden})


def trained(bench: Bench, context: StepContext) -> tuple[bytes, bytes]:
    """The draft's weights and history."""
    return (
        bench.store.get(f"{context.prefix}/draft/model.safetensors"),
        bench.store.get(f"{context.prefix}/history.jsonl"),
    )


@pytest.fixture(scope="module")
def cached(bench: Bench, captured: StepResult) -> tuple[bytes, bytes]:
    """What training from the cache gives."""
    context = draft(bench, bench.spec, captured, "from-cache")
    bench.finish("ray_jobs.train", context)
    return trained(bench, context)


def test_no_hidden_states_are_kept(bench: Bench, tokens: StepResult, announced: StepResult) -> None:
    context = StepContext("hidden-states", KEY, bench.spec, bench.store, {})
    assert bench.names(context) == ["counts.json"]
    manifest = Manifest.from_json(announced.outputs, kind=STREAM_KIND)
    assert [info.name for info in manifest.shards] == [shard["name"] for shard in tokens.outputs["shards"]]
    assert announced.outputs["source"] == tokens.prefix
    assert announced.metrics["size_bytes"] == 0 and announced.metrics["num_tokens"] > 1000
    Ledger(bench.store).commit(announced)
    (cache,) = find_caches(bench.store, KEY)
    summary = summarise(bench.store, cache)
    assert (summary.state, summary.mode, summary.num_shards) == ("finished", "stream", len(manifest.shards))
    checks, findings = plan_checks(bench.store, [cache])
    assert [*findings, *run_checks(bench.store, checks)] == [] and len(checks) == len(manifest.shards)


def test_the_draft_is_the_cached_ones(bench: Bench, announced: StepResult, cached: tuple[bytes, bytes]) -> None:
    context = draft(bench, streamed_spec(bench), announced, "streamed")
    output = bench.finish("ray_jobs.train", context)
    assert trained(bench, context) == cached
    num_shards = len(Manifest.from_json(announced.outputs, kind=STREAM_KIND).of_split("train"))
    # 40 steps of 4 samples are a little more than an epoch; what is captured ahead of the end comes on top.
    assert 0 < output.metrics["captures_train"] <= 2 * num_shards
    assert output.metrics["captures_validation"] > 0
    assert output.metrics["most_in_flight"] <= 2 * WINDOW_SHARDS + AHEAD < num_shards


def test_two_trainers_share_each_capture(bench: Bench, captured: StepResult, announced: StepResult) -> None:
    spec = streamed_spec(bench, **{"train.num_workers": 2})
    from_cache = draft(bench, derive(spec, {"cache.mode": "store"}), captured, "two-from-cache")
    bench.finish("ray_jobs.train", from_cache)
    streamed = draft(bench, spec, announced, "two-streamed")
    output = bench.finish("ray_jobs.train", streamed)
    assert trained(bench, streamed) == trained(bench, from_cache)
    manifest = Manifest.from_json(announced.outputs, kind=STREAM_KIND)
    train, validation = len(manifest.of_split("train")), len(manifest.of_split("validation"))
    needed = sum(info.num_samples for info in manifest.of_split("train"))
    epochs = -(-40 * 4 // needed)
    assert output.metrics["captures_train"] <= epochs * train + WINDOW_SHARDS + AHEAD
    assert output.metrics["captures_validation"] <= validation


def test_a_killed_streamed_training_goes_on_to_the_same_bytes(
    bench: Bench, captured: StepResult, announced: StepResult, cached: tuple[bytes, bytes]
) -> None:
    """Killed in mode stream, and killed in mode store: the other mode goes on from the checkpoint."""
    streamed = draft(bench, streamed_spec(bench), announced, "killed-streamed")
    stored = draft(bench, bench.spec, captured, "killed-stored")
    for killed, goes_on in (
        (streamed, streamed),
        (stored, replace(streamed, key=stored.key)),
    ):
        bench.kill_when("ray_jobs.train", killed, lambda killed=killed: bool(bench.names(killed, "scratch/")))  # type: ignore[misc]
        assert bench.names(killed, "draft/") == [], "the kill came too late to test anything"
        bench.finish("ray_jobs.train", goes_on)
        assert trained(bench, goes_on) == cached
        steps = [json.loads(line)["done"] for line in bench.events(goes_on).read_text().splitlines()]
        assert min(steps) > 1, "the second run began anew"


def test_a_missing_token_shard_is_named(bench: Bench, announced: StepResult, cached: tuple[bytes, bytes]) -> None:
    manifest = Manifest.from_json(announced.outputs, kind=STREAM_KIND)
    gone = manifest.of_split("train")[0].name
    key = f"{announced.outputs['source']}/{gone}"
    data = bench.store.get(key)
    bench.store.delete(key)
    context = draft(bench, streamed_spec(bench), announced, "token-shard-missing")
    try:
        process, result = bench.start("ray_jobs.train", context)
        try:
            assert process.wait(240) != 0
        finally:
            bench.kill(process)
        error = json.loads(result.read_text())["error"]
        assert error["type"] == "ObjectNotFound"
        assert gone in error["what"] and "cannot read" in error["what"]
    finally:
        bench.store.put(key, data)
    bench.finish("ray_jobs.train", context)
    assert trained(bench, context) == cached
