"""Who holds which row of the KV cache, and whose prefix can be reused; without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from draftline.engine.requests import EngineRequest, SpeculationStats

MIN_SHARED_AHEAD = 64
"""Prompt tokens that another request must be about to compute for a request to wait for them."""


@dataclass
class RunningRequest:
    """A request that holds a slot.

    Attributes:
        request: What was submitted.
        slot: Row of the KV cache.
        num_processed: Tokens whose keys and values are in the cache.
        output_ids: Generated tokens; the last is the anchor, not yet processed.
        has_draft_context: The draft's features cover all processed tokens.
        random: Source of the request's randomness.
        row: Of the scheduler, from admission to the end (slots move).
        stats: Counters.
    """

    request: EngineRequest
    slot: int
    num_processed: int
    random: np.random.Generator
    row: int = 0
    output_ids: list[int] = field(default_factory=list)
    has_draft_context: bool = True
    stats: SpeculationStats = field(default_factory=SpeculationStats)

    @property
    def is_prefilling(self) -> bool:
        """Whether prompt tokens remain to be processed."""
        return self.num_processed < len(self.request.prompt_ids)

    @property
    def num_left(self) -> int:
        """Tokens that it may still emit."""
        return self.request.sampling.max_tokens - len(self.output_ids)


class SlotTable:
    """Slots 0..n-1 are held by the n running requests, always without holes.

    A released slot keeps its content, so a later prompt with the same
    beginning (the fixed system prompt of a desk, an earlier turn) takes it
    over instead of computing it again.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.running: list[RunningRequest] = []
        self._history: list[list[int]] = [[] for _ in range(num_slots)]

    @property
    def has_room(self) -> bool:
        """Whether another request can be admitted."""
        return len(self.running) < self.num_slots

    def best_prefix(self, prompt_ids: Sequence[int], *, minimum: int = 16) -> tuple[int, int]:
        """The slot whose content shares the longest beginning with a prompt.

        At least one prompt token is always left to process, since its output
        is needed. Returns (slot, length), length 0 when below ``minimum``.
        """
        best_slot, best_length = 0, 0
        prompt = list(prompt_ids)
        for slot, history in enumerate(self._history):
            # Comparing slices is quick; most slots share no more than the best one, and fail here.
            if history[: best_length + 1] != prompt[: best_length + 1]:
                continue
            length = common_prefix(history, prompt)
            if length > best_length:
                best_slot, best_length = slot, length
        best_length = min(best_length, len(prompt_ids) - 1)
        return (best_slot, best_length) if best_length >= minimum else (0, 0)

    def is_worth_waiting(self, prompt_ids: Sequence[int], cached: int) -> bool:
        """Whether a running request is about to compute a good part of this prompt's beginning.

        A burst of requests with one system prompt then computes it once and
        not once each. Waiting ends when the shared part is done, or when the
        request that computes it leaves.

        Args:
            prompt_ids: The prompt of a waiting request.
            cached: How much of it :meth:`best_prefix` finds already.
        """
        worth = cached + MIN_SHARED_AHEAD
        prompt = list(prompt_ids)
        return len(prompt) > worth and any(
            request.is_prefilling and list(request.request.prompt_ids[:worth]) == prompt[:worth]
            for request in self.running
        )

    def admit(self, request: RunningRequest) -> None:
        """Give the next slot to a request (``request.slot`` must be it)."""
        assert request.slot == len(self.running) < self.num_slots
        self.running.append(request)
        self._history[request.slot] = list(request.request.prompt_ids[: request.num_processed])

    def extend(self, slot: int, start: int, token_ids: Sequence[int]) -> None:
        """Note tokens whose keys and values have been stored from position ``start`` on."""
        # A forgotten slot whose request runs on has no known beginning: its later text must not be taken for one.
        if len(self._history[slot]) == start:
            self._history[slot].extend(token_ids)

    def release(self, request: RunningRequest) -> tuple[int, int, int] | None:
        """Free a request's slot, keeping the table dense.

        Returns:
            ``(source, destination, length)`` of the cache rows to move, or ``None``.
        """
        last = self.running.pop()
        if last is request:
            return None
        source, destination = last.slot, request.slot
        self._history[destination] = list(self._history[source])
        last.slot = destination
        self.running[destination] = last
        return source, destination, last.num_processed

    def forget(self) -> None:
        """Forget all content for prefix reuse; running requests keep their slots."""
        self._history = [[] for _ in range(self.num_slots)]


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    length = min(len(a), len(b))
    for index in range(length):
        if a[index] != b[index]:
            return index
    return length
