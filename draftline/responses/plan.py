"""Which conversations are answered, and how they form shards; torch-free."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from draftline.spec import ResponsesSpec
from draftline.steps.ledger import StepResult
from draftline.storage.base import ObjectStore

ANSWERED_SPLITS = ("train", "validation", "calibration")


@dataclass(frozen=True)
class Conversation:
    """One prompt to be answered.

    Attributes:
        sample_id: ``<prompt id>/<sample number>``.
        domain: Label, carried along.
        split: Side of the split.
        system: System prompt or ``None``.
        turns: User turns.
        is_greedy: Decode greedily whatever the spec's law.
    """

    sample_id: str
    domain: str
    split: str
    system: str | None
    turns: tuple[str, ...]
    is_greedy: bool


def plan_shards(store: ObjectStore, prompts: StepResult, spec: ResponsesSpec) -> list[list[Conversation]]:
    """All conversations in order, cut into shards of ``spec.shard_prompts``."""
    conversations = list(_conversations(store, prompts, spec))
    size = spec.shard_prompts
    return [conversations[start : start + size] for start in range(0, len(conversations), size)]


def _conversations(store: ObjectStore, prompts: StepResult, spec: ResponsesSpec) -> Iterator[Conversation]:
    for split in ANSWERED_SPLITS:
        data = store.get(f"{prompts.prefix}/{prompts.outputs['files'][split]}")
        samples = spec.samples_per_prompt if split == "train" else 1
        for line in filter(None, data.split(b"\n")):
            record = json.loads(line)
            for number in range(samples):
                yield Conversation(
                    sample_id=f"{record['id']}/{number}",
                    domain=record["domain"],
                    split=split,
                    system=record["system"],
                    turns=tuple(record["turns"]),
                    is_greedy=number == 0 and spec.greedy_first,
                )
