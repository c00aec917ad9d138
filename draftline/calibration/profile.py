"""Measure what a step costs on this machine: verify by tokens and requests, draft by requests."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from draftline.draft.checkpoint import DraftModel
from draftline.draft.proposer import EngineRoom
from draftline.draft.serve import new_proposer
from draftline.target.batch import Chunk, build_batch
from draftline.target.load import Target

CONTEXT_TOKENS = 256
_REPEATS = 3
REQUESTS = (1, 2, 4, 8)
TOKENS_PER_REQUEST = (1, 2, 4, 8)


@dataclass(frozen=True)
class CostTable:
    """Milliseconds of a step; medians.

    Attributes:
        verify_ms: ``requests -> tokens of all requests -> ms``.
        draft_ms: ``requests -> ms`` of one block.
        context_tokens: Context length measured at.
        threads: CPU threads.
    """

    verify_ms: dict[int, dict[int, float]]
    draft_ms: dict[int, float] = field(default_factory=dict)
    context_tokens: int = CONTEXT_TOKENS
    threads: int = 1

    def to_json(self) -> dict[str, Any]:
        """Plain mapping; integer keys become text as JSON wants."""
        document: dict[str, Any] = json.loads(json.dumps(self.__dict__))
        return document

    def sps_table(self) -> dict[str, Any]:
        """SGLang's one-dimensional table: steps per second by tokens, at the fewest requests that carry them."""
        best: dict[int, float] = {}
        for requests in sorted(self.verify_ms, reverse=True):
            best.update(self.verify_ms[requests])
        tokens = sorted(best)
        return {
            "sample_batch_tokens": tokens,
            "sample_steps_per_sec": [1000 / best[t] for t in tokens],
            "max_batch_tokens": tokens[-1],
        }


def profile_costs(target: Target, draft: DraftModel | None) -> CostTable:
    """Time target steps and draft blocks at a few sizes (a few seconds).

    The costs are made monotone in tokens: a dip is noise.
    """
    positions = CONTEXT_TOKENS + 64
    cache = target.model.new_cache(max(REQUESTS), positions)
    verify: dict[int, dict[int, float]] = {}
    for requests in REQUESTS:
        verify[requests] = {}
        worst = 0.0
        for each in TOKENS_PER_REQUEST:
            chunks = [Chunk(slot, CONTEXT_TOKENS, list(range(each))) for slot in range(requests)]

            def step(chunks: list[Chunk] = chunks) -> None:
                batch = build_batch(chunks, positions, target.model.dtype, target.model.device)
                target.model.logits(target.model.forward(batch, cache).hidden_ND).argmax(-1)

            worst = max(worst, _median_ms(step))
            verify[requests][requests * each] = worst
    drafts: dict[int, float] = {}
    if draft is not None:
        proposer = new_proposer(draft, target, EngineRoom(max(REQUESTS), positions))
        for requests in REQUESTS:

            def propose(count: int = requests) -> None:
                proposer.propose(range(count), [0] * count, [CONTEXT_TOKENS] * count, [0.0] * count, None)

            drafts[requests] = _median_ms(propose)
    return CostTable(verify, drafts, CONTEXT_TOKENS, torch.get_num_threads())


def _median_ms(run: Any) -> float:
    run()
    times = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times)
