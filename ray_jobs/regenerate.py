"""The responses station: the target answers every prompt, shard by shard."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import ray
import torch

from draftline.responses.generate import answer_shard
from draftline.responses.plan import Conversation, plan_shards
from draftline.steps import StepContext, StepOutput
from draftline.target.fingerprint import target_fingerprint
from draftline.target.load import load_target, prepare_target
from ray_jobs.pool import map_shards
from ray_jobs.runtime import main, reserved_cpus


class Tally:
    """Adds up what the workers have done and reports it."""

    def __init__(self, context: StepContext, done: float, total: float) -> None:
        self._context = context
        self._finished = done
        self._total = total
        self._partial: dict[str, float] = {}

    def update(self, shard: str, turns: float) -> None:
        """Note a shard's own progress."""
        self._partial[shard] = turns
        done = self._finished + sum(self._partial.values())
        self._context.report(round(done, 2), self._total, "turns")


@ray.remote
class ResponseWorker:
    """Holds a target and answers shards."""

    def __init__(self, context: StepContext, tally: Any) -> None:
        torch.set_num_threads(context.spec.responses.threads_per_worker)
        self._context = context
        self._tally = tally
        self._target = load_target(context.spec.target)

    def run(self, shard: tuple[str, Sequence[Conversation]]) -> None:
        """Answer one shard and store it."""
        name, conversations = shard
        spec = self._context.spec
        reported = 0.0

        def on_progress(turns: float) -> None:
            nonlocal reported
            if turns - reported >= 1:
                reported = turns
                self._tally.update.remote(name, turns)

        limit = min(spec.tokens.max_length, self._target.max_context)
        data = answer_shard(self._target, spec.responses, spec.seed, conversations, limit, on_progress)
        self._context.store.put(f"{self._context.prefix}/{name}", data)


def run(context: StepContext) -> StepOutput:
    """Answer what no earlier attempt has answered."""
    spec = context.spec.responses
    prepare_target(context.spec.target)
    shards = {
        f"shard-{number:05d}.jsonl": conversations
        for number, conversations in enumerate(plan_shards(context.store, context.inputs["prompts"], spec))
    }
    turns = {name: sum(len(c.turns) for c in conversations) for name, conversations in shards.items()}
    pending = [(n, c) for n, c in shards.items() if context.store.head(f"{context.prefix}/{n}") is None]
    done, total = sum(turns.values()) - sum(turns[n] for n, _ in pending), sum(turns.values())
    context.report(done, total, "turns")
    tally: Any = ray.remote(num_cpus=0)(Tally).remote(context, done, total)
    map_shards(
        ResponseWorker,
        (context, tally),
        pending,
        workers=spec.workers,
        num_cpus=reserved_cpus(spec.threads_per_worker, spec.workers),
        on_done=lambda shard, _: tally.update.remote(shard[0], turns[shard[0]]),
    )
    digests = {name: hashlib.sha256(context.store.get(f"{context.prefix}/{name}")).hexdigest() for name in shards}
    outputs = {"shards": list(shards), "sha256": digests, "target": target_fingerprint(context.spec.target)}
    return StepOutput(outputs, {"num_turns": float(total)})


if __name__ == "__main__":
    main(run)
