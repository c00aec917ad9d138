"""The same draft trained from each cache codec on the same data: bytes per token and accepted length.

Usage: ``python -m benchmarks.codecs [--workspace .draftline/workspace] [--steps 180] [--codecs bf16 fp8 int4]``

Takes the tokens that a run of the recipe ``smollm2-135m`` left in the workspace, or makes them there (the target
answers the support desk). Every codec then gets a cache of its own in a temporary directory and trains with the same
seed: the same samples, anchors and order. Two lengths are printed:

- offline: teacher-forced, over anchors of the validation split; for all drafts with the laws of the fp32 cache.
- online: decoded by the engine on held-out prompts, greedily, whole blocks verified. The difference to the first codec
  is paired by prompt and has its standard error beside it.

``--quick`` runs all of it on the tests' tiny target in about a minute; its lengths mean nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.timing import with_allocator_settings
from draftline.cache.manifest import KIND, Manifest, ShardInfo
from draftline.cache.shards import Shard, decode_shard
from draftline.capture.capture import capture_shard
from draftline.draft.checkpoint import from_files
from draftline.draft.config import resolve_taps
from draftline.engine.build import run_to_completion
from draftline.engine.engine import Engine, EngineLimits
from draftline.engine.requests import EngineRequest, SamplingParams
from draftline.progress import NullProgress
from draftline.responses.generate import prompt_ids
from draftline.scheduling.policies import FixedPolicy
from draftline.spec import RunSpec, derive, recipe
from draftline.steps.execute import execute
from draftline.storage import open_store
from draftline.target.load import Target, load_target
from draftline.training.loop import DraftTrainer, TrainingInputs

OFFLINE_EPOCHS, OFFLINE_BATCH = 8, 8
"""Passes over the validation split, each with anchors of its own."""


@dataclass(frozen=True)
class Data:
    """What all codecs are measured on.

    Attributes:
        spec: Of the training.
        target: In fp32, as training and exactness want it.
        tokens: Token shards by name, with their entries.
        counts: Token counts, likeliest first.
        prompts: Held-out prompts as token ids.
        max_new_tokens: Of each answer.
    """

    spec: RunSpec
    target: Target
    tokens: Mapping[str, tuple[ShardInfo, Shard]]
    counts: list[tuple[int, int]]
    prompts: Sequence[Sequence[int]]
    max_new_tokens: int


@dataclass(frozen=True)
class Measured:
    """One codec's figures; ``online`` has an accepted length for each prompt, bytes are without the shared ids."""

    bytes_per_token: float
    num_rows: int
    num_tokens: int
    offline: float
    online: tuple[float, ...]
    seconds: float


def main() -> None:
    """Print one line for each codec, relative to the first."""
    with_allocator_settings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the tests' tiny target: shows that it runs")
    parser.add_argument("--workspace", default=".draftline/workspace")
    parser.add_argument("--limit", type=int, default=0, help="use at most so many prompts of the desk, 0 for all")
    parser.add_argument("--steps", type=int, default=180)
    parser.add_argument("--prompts", type=int, default=40, help="held-out prompts decoded for the online length")
    parser.add_argument("--codecs", nargs="+", default=["bf16", "fp8", "int4"])
    parser.add_argument("--no-dedupe", action="store_true", help="store shared beginnings for every sample")
    arguments = parser.parse_args()
    if arguments.quick:
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="draftline-codecs-") as folder:
        scratch = Path(folder)
        data = (
            _tiny(scratch) if arguments.quick else _support_desk(arguments.workspace, arguments.limit, arguments.steps)
        )
        dedupe = not arguments.no_dedupe
        judge = _captured(data, scratch, "fp32", "judge", dedupe=True, splits=("train", "validation"))
        first: Measured | None = None
        for codec in arguments.codecs:
            measured = _measure(data, scratch, codec, judge, arguments.prompts, dedupe)
            first = first or measured
            print(_line(codec, measured, first), flush=True)


def _measure(data: Data, scratch: Path, codec: str, judge: TrainingInputs, num_prompts: int, dedupe: bool) -> Measured:
    started = time.perf_counter()
    inputs = _captured(data, scratch, codec, codec, dedupe=dedupe, splits=("train", "validation"))
    trainer = DraftTrainer(inputs, data.target)
    trainer.run()
    files = trainer.export()
    shards = inputs.manifest.shards
    num_tokens = sum(s.num_tokens for s in shards)
    return Measured(
        sum(s.size_bytes for s in shards) / num_tokens,
        sum(s.num_rows for s in shards),
        num_tokens,
        _offline_length(trainer, judge),
        _online_lengths(data, files, num_prompts),
        time.perf_counter() - started,
    )


def _line(codec: str, measured: Measured, first: Measured) -> str:
    online = statistics.mean(measured.online)
    differences = [a - b for a, b in zip(measured.online, first.online, strict=True)]
    error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else 0.0
    base = statistics.mean(first.online)
    row_bytes = measured.bytes_per_token * measured.num_tokens / measured.num_rows
    share = measured.bytes_per_token / first.bytes_per_token
    return (
        f"{codec:5} {measured.bytes_per_token:7.0f} bytes a token ({share:4.0%}), "
        f"{row_bytes:6.0f} a stored row ({measured.num_rows} of {measured.num_tokens} tokens); "
        f"offline {measured.offline:.3f} ({measured.offline / first.offline - 1:+.1%}); "
        f"online {online:.3f} ({online / base - 1:+.1%}, standard error {error / base:.1%}); "
        f"{measured.seconds:.0f} s"
    )


def _captured(
    data: Data, scratch: Path, codec: str, name: str, *, dedupe: bool, splits: Sequence[str]
) -> TrainingInputs:
    """A cache of the tokens in one codec, and the inputs of a training from it."""
    store = open_store(str(scratch / name), create=True)
    draft = data.spec.draft
    taps = resolve_taps(draft.target_layer_ids, draft.num_taps, data.target.config.num_layers)
    infos = []
    for shard_name, (info, tokens) in data.tokens.items():
        if info.split not in splits:
            continue
        shard = capture_shard(data.target, tokens, taps, codec, dedupe=dedupe)
        store.put(f"cache/{shard_name}", shard)
        infos.append(ShardInfo.of(shard_name, info.split, info.num_samples, info.num_tokens, shard))
    target = data.target
    manifest = Manifest(KIND, target.fingerprint, tuple(infos), codec, taps, target.config.hidden_size)
    return TrainingInputs(data.spec, store, "cache", manifest, data.counts, f"draft/{name}")


@torch.no_grad()
def _offline_length(trainer: DraftTrainer, judge: TrainingInputs) -> float:
    """Teacher-forced accepted length of the trained draft, under the exact laws."""
    objective = trainer._objective
    source = judge.source("validation")
    assert source is not None, "the data has a validation split"
    total = None
    for first in range(0, OFFLINE_EPOCHS * source.num_samples, OFFLINE_BATCH):
        positions = range(first, first + OFFLINE_BATCH)
        samples = [source.at(position) for position in positions]
        sums = objective.validate(objective.validation_batch(samples, positions))
        total = sums if total is None else total.unpack(total.pack() + sums.pack())
    source.close()
    assert total is not None
    return objective.validation_figures(total)["accepted_length"]


def _online_lengths(data: Data, files: Mapping[str, bytes], num_prompts: int) -> tuple[float, ...]:
    """Tokens a verify step of each prompt, bonus included."""
    prompts = data.prompts[:num_prompts]
    context = max(len(ids) for ids in prompts) + data.max_new_tokens + data.spec.draft.block_size + 1
    engine = Engine(data.target, EngineLimits(8, context), FixedPolicy())
    engine.swap_draft(from_files(files["config.json"], files["model.safetensors"]))
    requests = [
        EngineRequest(str(number), tuple(ids), SamplingParams(data.max_new_tokens, temperature=0.0))
        for number, ids in enumerate(prompts)
    ]
    lengths: dict[str, float] = {}
    for event in run_to_completion(engine, requests):
        if event.finish_reason is not None and event.stats.num_spec_steps:
            lengths[event.request_id] = 1 + event.stats.num_accepted_tokens / event.stats.num_spec_steps
    return tuple(lengths.get(request.request_id, 1.0) for request in requests)


def _support_desk(workspace: str, limit: int, steps: int) -> Data:
    """The shipped support desk, answered by SmolLM2; steps that a run has done already are not done again."""
    spec = derive(recipe("smollm2-135m"), {"prompts.limit": limit})
    store = open_store(workspace, create=True)
    prompts = execute("prompts", spec, store, {}, NullProgress())
    responses = execute("responses", spec, store, {"prompts": prompts}, NullProgress())
    result = execute("tokens", spec, store, {"responses": responses}, NullProgress())
    prefix = f"tokens/{result.key}"
    tokens = {}
    for info in Manifest.from_json(result.outputs, kind="tokens").shards:
        key = f"{prefix}/{info.name}"
        tokens[info.name] = (info, decode_shard(store.get(key), origin=key, expected=info))
    counts = [(int(t), int(n)) for t, n in json.loads(store.get(f"{prefix}/{result.outputs['counts']}"))]
    target = load_target(spec.target, dtype="fp32")
    held_out = []
    test_file = f"prompts/{prompts.key}/{prompts.outputs['files']['test']}"
    for line in filter(None, store.get(test_file).split(b"\n")):
        record = json.loads(line)
        opening = [{"role": "system", "content": record["system"]}] if record["system"] else []
        held_out.append(prompt_ids(target, [*opening, {"role": "user", "content": record["turns"][0]}]))
    spec = derive(spec, {"train.steps": steps, "train.validate_every_steps": steps})
    return Data(spec, target, tokens, counts, held_out, spec.evaluation.max_new_tokens)


def _tiny(scratch: Path) -> Data:
    """The grammar of the tests on their tiny target."""
    from tests.servers.tiny_target import make_tiny_target
    from tests.training.cases import SPEC, conversations, token_shard

    folder = make_tiny_target(scratch / "target")
    spec = derive(SPEC, {"target.source": str(folder), "train.steps": 25, "train.validate_every_steps": 25})
    target = load_target(spec.target, dtype="fp32")
    tokens, counts = {}, dict.fromkeys(range(target.vocab_size), 0)
    for split, number in (("train", 40), ("validation", 12)):
        samples = conversations(target, number, seed=len(split))
        data = token_shard(samples, target.fingerprint)
        name = f"{split}-00000.safetensors"
        info = ShardInfo.of(name, split, number, sum(len(ids) for _, ids, _ in samples), data)
        tokens[name] = (info, decode_shard(data, origin=name))
        for _, ids, mask in samples:
            for token, produced in zip(ids, mask, strict=True):
                counts[token] += produced
    ranked = sorted(((t, n) for t, n in counts.items() if n), key=lambda item: (-item[1], item[0]))
    prompts = [ids[: mask.index(1)] for _, ids, mask in conversations(target, 16, seed=99)]
    return Data(spec, target, tokens, ranked, prompts, 24)


if __name__ == "__main__":
    main()
