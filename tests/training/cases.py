"""A small hidden-state cache of grammar conversations, and training runs over it."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from draftline.cache.hidden import HiddenIndex
from draftline.cache.shards import Manifest, ShardInfo, decode_shard, encode_shard, shard_name
from draftline.capture.capture import capture_shard
from draftline.draft.config import resolve_taps
from draftline.spec import RunSpec, derive, recipe
from draftline.storage.local import LocalStore
from draftline.target.load import Target
from draftline.training.loop import DraftTrainer, TrainingInputs
from tests.servers.tiny_target import LAYERS, grammar_pair

SPEC = derive(
    recipe("smollm2-135m"),
    {
        "seed": 3,
        "tokens.max_length": 120,
        "cache.codec": "fp32",
        "draft.block_size": 4,
        "draft.num_taps": 2,
        "draft.vocab_size": 60,
        "draft.markov_rank": 8,
        "train.steps": 6,
        "train.samples_per_step": 4,
        "train.anchors_per_sample": 5,
        "train.checkpoint_every_steps": 2,
        "train.validate_every_steps": 3,
        "train.lr": 1e-2,
    },
)
Conversation = tuple[str, list[int], list[int]]
"""Id, token ids, loss mask."""


class Interrupted(Exception):
    """Stands for a kill between two steps."""


def conversations(target: Target, count: int, *, seed: int = 0) -> list[Conversation]:
    """Chats of one or two turns, the answers masked in."""
    source = random.Random(seed)
    found = []
    for number in range(count):
        ids: list[int] = []
        mask: list[int] = []
        messages: list[dict[str, str]] = []
        for _ in range(1 + number % 2):
            question, answer = grammar_pair(source)
            messages.append({"role": "user", "content": question})
            prompt = target.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            mask += [0] * (len(prompt) - len(ids))
            ids = list(prompt)
            said = [*target.tokenizer(answer).input_ids, *target.eos_token_ids]
            ids, mask = ids + said, mask + [1] * len(said)
            messages.append({"role": "assistant", "content": answer})
        found.append((f"{seed}-{number}", ids, mask))
    return found


def token_shard(samples: Sequence[Conversation], target: str) -> bytes:
    """The samples as a token shard."""
    lengths = torch.tensor([0] + [len(ids) for _, ids, _ in samples])
    return encode_shard(
        {
            "input_ids": torch.tensor([t for _, ids, _ in samples for t in ids], dtype=torch.int32),
            "loss_mask": torch.tensor([m for _, _, mask in samples for m in mask], dtype=torch.uint8),
            "cu_seqlens": lengths.cumsum(0),
        },
        {"kind": "tokens", "ids": [name for name, _, _ in samples], "target": target},
    )


def make_inputs(
    target: Target,
    folder: Path,
    splits: dict[str, list[list[Conversation]]],
    spec: RunSpec = SPEC,
    damage: Callable[[str, bytes], bytes] = lambda name, data: data,
) -> TrainingInputs:
    """Capture shards into a store; ``damage`` may change their bytes first."""
    store = LocalStore(folder)
    store.create()
    taps = resolve_taps(spec.draft.target_layer_ids, spec.draft.num_taps, LAYERS)
    infos = []
    counts: dict[int, int] = {}
    for split, shards in splits.items():
        for number, samples in enumerate(shards):
            tokens = decode_shard(token_shard(samples, target.fingerprint), origin="tokens")
            name = shard_name(split, number)
            data = damage(name, capture_shard(target, tokens, taps, spec.cache.codec))
            store.put(f"cache/{name}", data)
            infos.append(ShardInfo.of(name, split, len(samples), len(tokens.tensors["input_ids"]), data))
            for _, ids, mask in samples:
                for token, produced in zip(ids, mask, strict=True):
                    counts[token] = counts.get(token, 0) + produced
    manifest = Manifest(
        "hidden-states", target.fingerprint, tuple(infos), spec.cache.codec, taps, target.config.hidden_size
    )
    ranked = sorted(((t, n) for t, n in counts.items() if n), key=lambda item: (-item[1], item[0]))
    return TrainingInputs(spec, store, "cache", manifest, ranked, "draft/run")


def poisoned(data: bytes, sample: int, *, taps: bool = False) -> bytes:
    """A shard with NaN in one sample, as no capture would write it: in its first tap, or in its last normalisers.

    The record of what only this sample has begins with the taps and ends with the normalisers.
    """
    index = HiddenIndex.of(data, origin="the shard")
    start, size = index.record_range(index.segments(sample)[-1])
    first, count = (start, 4) if taps else (start + size - 32, 32)
    bad = data[:first] + b"\xff" * count + data[first + count :]
    # With the checksum that a writer would have put: the damage is in what was captured.
    before, after = (zlib.crc32(part[start : start + size]).to_bytes(8, "little") for part in (data, bad))
    assert bad.count(before) == 1
    return bad.replace(before, after)


def grammar_splits(target: Target) -> dict[str, list[list[Conversation]]]:
    """Three training shards of unequal sizes and a validation shard."""
    samples = conversations(target, 11)
    return {"train": [samples[:4], samples[4:9], samples[9:]], "validation": [conversations(target, 3, seed=9)]}


def interrupt_at(step: int) -> Callable[[int, dict[str, float]], None]:
    """An ``on_step`` that kills the run after a step."""

    def on_step(done: int, figures: dict[str, float]) -> None:
        if done == step:
            raise Interrupted

    return on_step


def train(inputs: TrainingInputs, target: Target) -> tuple[dict[str, bytes], bytes]:
    """Run to the end; the files and the history."""
    trainer = DraftTrainer(inputs, target)
    trainer.run()
    return trainer.export(), trainer.history_file()


@contextmanager
def deterministic() -> Iterator[None]:
    """As the job runs it."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
