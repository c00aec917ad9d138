"""The tokens station: responses in, ragged token shards out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from draftline.cache.manifest import COUNTS_FILE
from draftline.cache.shards import Manifest, ShardInfo, encode_shard, shard_name
from draftline.errors import InputError
from draftline.steps.context import StepContext, StepOutput
from draftline.steps.ledger import verify_bytes

SPLITS = ("train", "validation", "calibration")


@dataclass(frozen=True)
class TokenSample:
    """One conversation as tokens; ``loss_mask`` is 1 on what the target produced."""

    sample_id: str
    split: str
    input_ids: list[int]
    loss_mask: list[int]


@dataclass
class _Answer:
    """An earlier answer, and where it begins in the text so far; ``None`` where the template has dropped it."""

    ids: list[int]
    start: int | None


def sample_of(record: dict[str, Any], max_length: int) -> tuple[TokenSample, bool]:
    """Turn a response record into a sample.

    The mask comes from token boundaries: each turn records the ids that were
    fed and the ids that came out, and the last turn's prompt contains all
    turns before it, as the target's own template wrote them. An earlier
    answer is marked where its ids reappear in the next turn's prompt, also
    when the template has taken something out before it (an empty thought).

    Returns:
        The sample and whether it was cut to ``max_length``.
    """
    input_ids: list[int] = []
    mask: list[int] = []
    answers: list[_Answer] = []
    for turn in record["turns"]:
        prompt, response = turn["prompt_ids"], turn["response_ids"]
        # A template may rewrite earlier text; only what is equal keeps its mark.
        kept = _common(input_ids, prompt)
        mask = mask[:kept] + [0] * (len(prompt) - kept)
        cursor = kept
        for answer in answers:
            if answer.start is not None and answer.start < kept:
                continue
            answer.start = _find(answer.ids, prompt, cursor)
            if answer.start is not None:
                cursor = answer.start + len(answer.ids)
                mask[answer.start : cursor] = [1] * len(answer.ids)
        answers.append(_Answer(response, len(prompt)))
        input_ids = prompt + response
        mask += [1] * len(response)
    was_cut = len(input_ids) > max_length
    return TokenSample(record["id"], record["split"], input_ids[:max_length], mask[:max_length]), was_cut


def run(context: StepContext) -> StepOutput:
    """Write token shards; see FORMAT.md in :mod:`draftline.cache`.

    Raises:
        InputError: no sample has a token to learn from.
        FormatError: a shard of answers is not what its step wrote.
    """
    spec = context.spec.tokens
    responses = context.inputs["responses"]
    names = list(responses.outputs["shards"])
    pending: dict[str, list[TokenSample]] = {split: [] for split in SPLITS}
    numbers = dict.fromkeys(SPLITS, 0)
    shards: list[ShardInfo] = []
    num_cut = num_empty = 0
    answered: Counter[int] = Counter()
    asked: Counter[int] = Counter()

    def flush(split: str) -> None:
        if pending[split]:
            shards.append(_write(context, split, numbers[split], pending[split], responses.outputs["target"]))
            numbers[split] += 1
            pending[split] = []

    for done, name in enumerate(names):
        path = f"{responses.prefix}/{name}"
        data = context.store.get(path)
        verify_bytes(data, responses.outputs["sha256"][name], origin=path)
        for record in _records(data):
            sample, was_cut = sample_of(record, spec.max_length)
            num_cut += was_cut
            if sum(sample.loss_mask) < 2:
                num_empty += 1
                continue
            if sample.split == "train":
                for token, is_answer in zip(sample.input_ids, sample.loss_mask, strict=True):
                    (answered if is_answer else asked)[token] += 1
            pending[sample.split].append(sample)
            if sum(len(s.input_ids) for s in pending[sample.split]) >= spec.shard_tokens:
                flush(sample.split)
        context.report(done + 1, len(names), "shards")
    for split in SPLITS:
        flush(split)
    if not any(s.split == "train" for s in shards):
        raise InputError("no training sample is left", got=f"{num_empty} without an answer", remedy="Give more prompts")
    # The draft's vocabulary: what the target says, likeliest first, then what it is asked (answers echo it).
    ranked = [*_ranked(answered), *((token, n) for token, n in _ranked(asked) if token not in answered)]
    context.store.put(f"{context.prefix}/{COUNTS_FILE}", json.dumps(ranked).encode())
    order = sorted(shards, key=lambda s: (SPLITS.index(s.split), s.name))
    manifest = Manifest("tokens", responses.outputs["target"], tuple(order))
    metrics = {
        "num_samples": float(sum(s.num_samples for s in order)),
        "num_tokens": float(sum(s.num_tokens for s in order)),
    }
    return StepOutput(
        {**manifest.to_json(), "num_cut": num_cut, "num_empty": num_empty, "counts": COUNTS_FILE}, metrics
    )


def _write(context: StepContext, split: str, number: int, samples: list[TokenSample], target: str) -> ShardInfo:
    lengths = torch.tensor([0] + [len(s.input_ids) for s in samples])
    data = encode_shard(
        {
            "input_ids": torch.tensor([t for s in samples for t in s.input_ids], dtype=torch.int32),
            "loss_mask": torch.tensor([m for s in samples for m in s.loss_mask], dtype=torch.uint8),
            "cu_seqlens": lengths.cumsum(0),
        },
        {"kind": "tokens", "ids": [s.sample_id for s in samples], "target": target},
    )
    name = shard_name(split, number)
    context.store.put(f"{context.prefix}/{name}", data)
    return ShardInfo.of(name, split, len(samples), int(lengths.sum()), data)


def _records(data: bytes) -> Iterator[dict[str, Any]]:
    # Only a line feed separates records: answers may hold other Unicode line ends.
    for line in filter(None, data.split(b"\n")):
        yield json.loads(line)


def _ranked(counts: Counter[int]) -> list[tuple[int, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _common(a: list[int], b: list[int]) -> int:
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))


def _find(wanted: list[int], ids: list[int], start: int) -> int | None:
    """Where a sequence begins in another, from ``start`` on."""
    if not wanted:
        return None
    for place in range(start, len(ids) - len(wanted) + 1):
        if ids[place] == wanted[0] and ids[place : place + len(wanted)] == wanted:
            return place
    return None
