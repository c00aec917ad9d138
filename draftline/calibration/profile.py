"""Measure what a step costs on this machine: verify by tokens and requests, draft by requests."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from draftline.draft.checkpoint import DraftModel
from draftline.draft.proposer import EngineRoom, ProposerFactory
from draftline.draft.serve import new_proposer
from draftline.scheduling.costs import CostTable
from draftline.target.batch import Chunk, build_batch
from draftline.target.hardware import machine_name
from draftline.target.load import Target

CONTEXT_TOKENS = 256
_LONG_CONTEXT_TOKENS = 1024
_MOST_REPEATS = 7
_LEAST_REPEATS = 2
_POINT_S = 0.12
"""Time for one point of the table: a quick one is repeated, a slow one is not."""


@dataclass(frozen=True)
class EngineSize:
    """What a table has to cover.

    Attributes:
        num_requests: At a time.
        max_context: Positions of a request.
        block_size: Drafts of a block; a request has one token more in a step.
    """

    num_requests: int
    max_context: int
    block_size: int

    @property
    def requests(self) -> tuple[int, ...]:
        """Numbers of requests to measure at: powers of two and the most."""
        return _doubling(self.num_requests)

    @property
    def tokens_per_request(self) -> tuple[int, ...]:
        """Tokens of each request to measure at: powers of two and a whole block with its anchor."""
        return _doubling(self.block_size + 1)

    @property
    def context(self) -> int:
        """Context to measure at."""
        return max(1, min(CONTEXT_TOKENS, self.max_context // 2))


def machine_facts(target: Target) -> dict[str, str]:
    """What a stored table must agree with to be used here."""
    device = torch.device(target.model.device)
    is_cuda = device.type == "cuda"
    return {
        "machine": torch.cuda.get_device_name(device) if is_cuda else machine_name(),
        "threads": "any" if is_cuda else str(torch.get_num_threads()),
        "dtype": str(target.dtype).removeprefix("torch."),
        "target": target.fingerprint,
    }


def draft_facts(draft: DraftModel) -> dict[str, str]:
    """What the cost of drafting depends on besides machine and target."""
    config = draft.config
    kind = "eagle3" if config.is_eagle3 else f"rank-{config.markov_rank}"
    width = config.draft_vocab_size or config.vocab_size
    return {"draft": f"{kind}, {config.num_layers} layers, block {config.block_size}, vocabulary {width}"}


def profile_costs(target: Target, draft: DraftModel | None, size: EngineSize) -> CostTable:
    """Time target steps and draft blocks over the sizes an engine meets (some seconds)."""
    table = profile_verify(target, size)
    if draft is None:
        return table
    return table.with_draft(profile_draft(lambda room: new_proposer(draft, target, room), size), draft_facts(draft))


@torch.inference_mode()
def profile_verify(target: Target, size: EngineSize) -> CostTable:
    """The target's part of the table, and what longer contexts add."""
    block = size.tokens_per_request[-1]
    long = max(size.context, min(_LONG_CONTEXT_TOKENS, size.max_context - block))
    cache = target.model.new_cache(size.num_requests, long + block)

    def step_ms(requests: int, each: int, context: int) -> float:
        chunks = [Chunk(slot, context, [0] * each) for slot in range(requests)]

        def step() -> None:
            batch = build_batch(chunks, cache.num_positions, target.model.dtype, target.model.device)
            logits = target.model.logits(target.model.forward(batch, cache).hidden_ND)
            logits.argmax(-1).tolist()
            logits.float().logsumexp(-1)

        return _median_ms(step)

    points = {
        (requests, requests * each): step_ms(requests, each, size.context)
        for requests in size.requests
        for each in size.tokens_per_request
    }
    context_ms = 0.0
    if long > size.context:
        most = size.num_requests
        further = step_ms(most, 1, long) - points[most, most]
        context_ms = max(0.0, further / (most * (long - size.context)))
    return CostTable.from_points(
        points, context_tokens=size.context, context_ms=context_ms, facts=machine_facts(target)
    )


def profile_draft(make: ProposerFactory, size: EngineSize) -> dict[int, float]:
    """Milliseconds of a block by requests, with a proposer made for this and dropped."""
    proposer = make(EngineRoom(size.num_requests, size.context + 2 * size.block_size))
    found = {}
    for requests in size.requests:

        def propose(count: int = requests) -> None:
            proposal = proposer.propose(range(count), [0] * count, [size.context] * count, [0.0] * count, None)
            proposal.token_ids_RB.tolist()

        found[requests] = _median_ms(propose)
    return found


def _doubling(most: int) -> tuple[int, ...]:
    numbers: Sequence[int] = [2**power for power in range(most.bit_length()) if 2**power < most]
    return (*numbers, most)


def _median_ms(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    first_s = time.perf_counter() - started
    repeats = min(_MOST_REPEATS, max(_LEAST_REPEATS, int(_POINT_S / max(first_s, 1e-6))))
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times)
