"""The hidden-states station: capture actors stream shards straight to the store."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from draftline.cache.manifest import COUNTS_FILE, STREAM_KIND
from draftline.cache.shards import Manifest, ShardInfo, decode_shard
from draftline.capture.capture import capture_shard
from draftline.draft.config import resolve_taps
from draftline.errors import StepError
from draftline.steps import StepContext, StepOutput
from draftline.target.load import load_config, load_target
from ray_jobs.pool import map_shards
from ray_jobs.runtime import main, reserved_cpus


@ray.remote
class CaptureWorker:
    """Holds the frozen target and captures shards.

    Args:
        context: Of the step that captures.
        tokens: Folder of the token shards.
    """

    def __init__(self, context: StepContext, tokens: str) -> None:
        # Sums are ordered by thread: a fixed count makes the bytes independent of the machine's load.
        torch.set_num_threads(context.spec.cache.threads_per_worker)
        self._context = context
        self._tokens = tokens
        self._target = load_target(context.spec.target)
        draft = context.spec.draft
        self._taps = resolve_taps(draft.target_layer_ids, draft.num_taps, self._target.config.num_layers)

    def run(self, info: ShardInfo) -> ShardInfo:
        """Capture one token shard; its entry is stored beside it, after it."""
        context = self._context
        data = self._capture(info)
        captured = ShardInfo.of(info.name, info.split, info.num_samples, info.num_tokens, data)
        context.store.put(f"{context.prefix}/{info.name}", data)
        context.store.put(f"{context.prefix}/{info.name}.json", json.dumps(captured.to_json(), sort_keys=True).encode())
        return captured

    def stream(self, info: ShardInfo) -> tuple[None, NDArray[np.uint8]]:
        """Capture one token shard and keep it nowhere: nothing, for whoever waits, and the bytes, for whoever reads.

        As an array they are read in place from Ray's object store.
        """
        return None, np.frombuffer(self._capture(info), dtype=np.uint8)

    def _capture(self, info: ShardInfo) -> bytes:
        key = f"{self._tokens}/{info.name}"
        tokens = decode_shard(self._context.store.get(key), origin=key, expected=info)
        cache = self._context.spec.cache
        return capture_shard(self._target, tokens, self._taps, cache.codec, dedupe=cache.dedupe)


def run(context: StepContext) -> StepOutput:
    """Capture the shards that no earlier attempt has captured; then write the manifest.

    In mode ``stream`` nothing is captured here: the manifest names the token shards for training to capture from.
    """
    tokens = Manifest.from_json(context.inputs["tokens"].outputs, kind="tokens")
    if context.spec.cache.mode == "stream":
        return _announce(context, tokens)
    done: dict[str, ShardInfo] = {}
    for info in tokens.shards:
        entry = f"{context.prefix}/{info.name}.json"
        if context.store.head(entry) is None:
            continue
        captured = ShardInfo(**json.loads(context.store.get(entry)))
        # A shard that someone deleted or cut is captured again.
        found = context.store.head(f"{context.prefix}/{info.name}")
        if found is not None and found.size_bytes == captured.size_bytes:
            done[info.name] = captured
    total = sum(s.num_tokens for s in tokens.shards)

    def report() -> None:
        context.report(sum(s.num_tokens for s in done.values()), total, "tokens")

    def finished(_: ShardInfo, captured: ShardInfo) -> None:
        done[captured.name] = captured
        report()

    report()
    spec = context.spec.cache
    pending = [s for s in tokens.shards if s.name not in done]
    map_shards(
        CaptureWorker,
        (context, context.inputs["tokens"].prefix),
        pending,
        workers=spec.workers,
        num_cpus=reserved_cpus(spec.threads_per_worker, spec.workers),
        on_done=finished,
    )
    _require_all(context, done)
    _copy_counts(context)
    first = decode_shard(context.store.get(f"{context.prefix}/{tokens.shards[0].name}"), origin=tokens.shards[0].name)
    manifest = Manifest(
        "hidden-states",
        tokens.target,
        tuple(done[s.name] for s in tokens.shards),
        spec.codec,
        tuple(first.metadata["tap_ids"]),
        int(first.metadata["hidden_size"]),
    )
    size = float(sum(s.size_bytes for s in manifest.shards))
    metrics = {
        "num_tokens": float(total),
        "num_rows": float(sum(s.num_rows for s in manifest.shards)),
        "size_bytes": size,
        "bytes_per_token": size / total,
    }
    return StepOutput({**manifest.to_json(), "counts": COUNTS_FILE}, metrics)


def _announce(context: StepContext, tokens: Manifest) -> StepOutput:
    spec = context.spec
    config = load_config(spec.target)
    taps = resolve_taps(spec.draft.target_layer_ids, spec.draft.num_taps, config.num_layers)
    _copy_counts(context)
    manifest = Manifest(STREAM_KIND, tokens.target, tokens.shards, spec.cache.codec, taps, config.hidden_size)
    outputs = {**manifest.to_json(), "counts": COUNTS_FILE, "source": context.inputs["tokens"].prefix}
    total = float(sum(s.num_tokens for s in tokens.shards))
    return StepOutput(outputs, {"num_tokens": total, "size_bytes": 0.0, "bytes_per_token": 0.0})


def _copy_counts(context: StepContext) -> None:
    counts = context.store.get(f"{context.inputs['tokens'].prefix}/{COUNTS_FILE}")
    context.store.put(f"{context.prefix}/{COUNTS_FILE}", counts)


def _require_all(context: StepContext, done: Mapping[str, ShardInfo]) -> None:
    """Somebody may have removed old shards of a capture that was taken up again: its manifest must not name them.

    Raises:
        StepError: a shard is gone.
    """
    present = {info.key for info in context.store.list(f"{context.prefix}/")}
    missing = sorted(name for name in done if f"{context.prefix}/{name}" not in present)
    if missing:
        raise StepError(
            "shards were removed while their capture ran",
            got=f"{len(missing)} missing, {missing[0]} first",
            remedy="Start the same run again: it captures those alone",
        )


if __name__ == "__main__":
    main(run)
