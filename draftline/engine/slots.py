"""Who holds which row of the KV cache, and whose prefix can be reused; without torch."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from draftline.engine.requests import EngineRequest, FinishReason, SpeculationStats

MIN_SHARED_AHEAD = 64
"""Prompt tokens that another request must be about to compute for a request to wait for them."""

BLOCK_TOKENS = 64
"""Beginnings are compared by the hashes of blocks of this many tokens."""


@dataclass
class WaitingRequest:
    """A request that has no slot yet.

    Attributes:
        request: What was submitted.
        blocks: Chained hashes of its prompt's whole blocks: the n-th tells the first n + 1 blocks.
        leader: The request whose prompt begins alike and that is about to compute this beginning.
        num_shared: How much of it they share.
    """

    request: EngineRequest
    blocks: list[int]
    leader: RunningRequest | None = None
    num_shared: int = 0

    @classmethod
    def of(cls, request: EngineRequest) -> WaitingRequest:
        """Hash the prompt once; every later comparison is by blocks."""
        return cls(request, chain(request.prompt_ids))


@dataclass
class RunningRequest:
    """A request that holds a slot.

    Attributes:
        request: What was submitted.
        slot: Row of the KV cache.
        num_processed: Tokens whose keys and values are in the cache.
        random: Source of the request's randomness.
        blocks: Hashes of the prompt's blocks.
        num_known: Tokens to process before it decodes: its prompt, or all its text when that is processed again for
            another draft.
        output_ids: Generated tokens; the last is the anchor, not yet processed.
        has_draft_context: The draft knows all processed tokens.
        row: Of the scheduler, from admission to the end (slots move).
        stats: Counters.
    """

    request: EngineRequest
    slot: int
    num_processed: int
    random: np.random.Generator
    row: int = 0
    blocks: list[int] = field(default_factory=list)
    num_known: int = field(init=False)
    output_ids: list[int] = field(default_factory=list)
    has_draft_context: bool = True
    stats: SpeculationStats = field(default_factory=SpeculationStats)

    def __post_init__(self) -> None:
        self.num_known = len(self.request.prompt_ids)

    def text(self, start: int, end: int) -> list[int]:
        """Tokens of prompt and answer."""
        prompt = self.request.prompt_ids
        first = len(prompt)
        return [*prompt[start:end], *self.output_ids[max(0, start - first) : max(0, end - first)]]

    def grow(self, new_ids: Sequence[int], eos_token_ids: Sequence[int]) -> tuple[list[int], FinishReason | None]:
        """Append new tokens to the answer, up to the one that ends it.

        Args:
            new_ids: What a step decided; a block may run past the end.
            eos_token_ids: The target's own end tokens.

        Returns:
            The tokens appended, and why the answer ended, if it did.
        """
        sampling = self.request.sampling
        stops = set(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            stops.update(eos_token_ids)
        reason: FinishReason | None = None
        emitted: list[int] = []
        for token in new_ids:
            emitted.append(token)
            count = len(self.output_ids) + len(emitted)
            if token in stops and count > sampling.min_tokens:
                reason = "stop"
                break
            if count >= sampling.max_tokens:
                reason = "length"
                break
        self.output_ids.extend(emitted)
        return emitted, reason

    def process_again(self) -> None:
        """Process the text from its start, so that a new draft learns of it; the cache gets the same content again."""
        self.num_known = max(self.num_processed, self.num_known)
        self.num_processed = 0
        self.has_draft_context = True

    @property
    def is_prefilling(self) -> bool:
        """Whether known tokens remain to be processed."""
        return self.num_processed < self.num_known

    @property
    def num_left(self) -> int:
        """Tokens that it may still emit."""
        return self.request.sampling.max_tokens - len(self.output_ids)


class SlotTable:
    """Slots 0..n-1 are held by the n running requests, always without holes.

    A released slot keeps its content, so a later prompt with the same
    beginning (the fixed system prompt of a desk, an earlier turn) takes it
    over instead of computing it again. An index from block hashes to slots
    finds it without a look at the texts: what admission costs grows with the
    logarithm of a prompt.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.running: list[RunningRequest] = []
        self._history: list[list[int]] = [[] for _ in range(num_slots)]
        self._blocks: list[list[int]] = [[] for _ in range(num_slots)]
        self._slots_by_block: dict[int, set[int]] = {}

    @property
    def has_room(self) -> bool:
        """Whether another request can be admitted."""
        return len(self.running) < self.num_slots

    def content(self, slot: int) -> list[int]:
        """Tokens at the beginning of a slot that are known to be there."""
        return self._history[slot]

    def best_prefix(self, waiting: WaitingRequest, *, minimum: int = 16) -> tuple[int, int]:
        """The slot whose content shares the longest beginning with a prompt.

        At least one prompt token is always left to process, since its output
        is needed. Returns (slot, length), length 0 when below ``minimum``.
        """
        prompt, blocks = waiting.request.prompt_ids, waiting.blocks
        # Whoever knows n blocks knows those before them, so the longest known chain is found by bisection.
        known = bisect_left(range(len(blocks)), True, key=lambda n: blocks[n] not in self._slots_by_block)
        slots = self._slots_by_block[blocks[known - 1]] if known else range(self.num_slots)
        start = known * BLOCK_TOKENS
        ahead = prompt[start : start + BLOCK_TOKENS]
        best_slot, best_length = 0, 0
        for slot in slots:
            length = start + common_prefix(self._history[slot][start : start + BLOCK_TOKENS], ahead)
            if length > best_length:
                best_slot, best_length = slot, length
        best_length = min(best_length, len(prompt) - 1)
        # Hashes are no proof, and another's text must never be taken for this one.
        if best_length < minimum or self._history[best_slot][:best_length] != list(prompt[:best_length]):
            return 0, 0
        return best_slot, best_length

    def is_held(self, waiting: WaitingRequest) -> bool:
        """Whether what a request waits for is still to come; costs nothing."""
        leader = waiting.leader
        return (
            leader is not None
            and leader.is_prefilling
            and leader.slot < len(self.running)
            and self.running[leader.slot] is leader
            and waiting.num_shared - leader.num_processed >= MIN_SHARED_AHEAD
        )

    def is_worth_waiting(self, waiting: WaitingRequest, cached: int) -> bool:
        """Whether a running request is about to compute a good part of this prompt's beginning.

        A burst of requests with one system prompt then computes it once and
        not once each. Waiting ends when the shared part is done, or when the
        request that computes it leaves.

        Args:
            waiting: A waiting request; it notes whom it waits for.
            cached: How much of its prompt :meth:`best_prefix` finds already.
        """
        prompt, blocks = waiting.request.prompt_ids, waiting.blocks
        if len(prompt) <= cached + MIN_SHARED_AHEAD:
            return False
        for request in self.running:
            if not request.is_prefilling:
                continue
            theirs, others = request.request.prompt_ids, request.blocks
            count = min(len(blocks), len(others))
            known = bisect_left(range(count), True, key=lambda n: blocks[n] != others[n])
            start, end = known * BLOCK_TOKENS, (known + 1) * BLOCK_TOKENS
            shared = start + common_prefix(prompt[start:end], theirs[start:end])
            if shared >= max(cached, request.num_processed) + MIN_SHARED_AHEAD:
                waiting.leader, waiting.num_shared = request, shared
                return True
        return False

    def admit(self, request: RunningRequest) -> None:
        """Give the next slot to a request (``request.slot`` must be it)."""
        assert request.slot == len(self.running) < self.num_slots
        self.running.append(request)
        count = request.num_processed
        self._note(request.slot, list(request.request.prompt_ids[:count]), request.blocks[: count // BLOCK_TOKENS])

    def extend(self, slot: int, start: int, token_ids: Sequence[int]) -> None:
        """Note tokens whose keys and values have been stored from position ``start`` on."""
        history, blocks = self._history[slot], self._blocks[slot]
        # A forgotten slot whose request runs on has no known beginning: its later text must not be taken for one.
        if len(history) != start:
            return
        history.extend(token_ids)
        while len(history) >= (len(blocks) + 1) * BLOCK_TOKENS:
            blocks.append(next_block(history, blocks))
            self._slots_by_block.setdefault(blocks[-1], set()).add(slot)

    def release(self, request: RunningRequest) -> tuple[int, int, int] | None:
        """Free a request's slot, keeping the table dense.

        Returns:
            ``(source, destination, length)`` of the cache rows to move, or ``None``.
        """
        last = self.running.pop()
        if last is request:
            return None
        source, destination = last.slot, request.slot
        # No more than what is moved: a text that is processed again is known as far as it got.
        length = min(len(self._history[source]), last.num_processed)
        self._note(destination, self._history[source][:length], self._blocks[source][: length // BLOCK_TOKENS])
        last.slot = destination
        self.running[destination] = last
        return source, destination, last.num_processed

    def forget(self) -> None:
        """Forget all content for prefix reuse; running requests keep their slots."""
        for slot in range(self.num_slots):
            self._note(slot, [], [])

    def forget_slot(self, slot: int) -> None:
        """Forget one slot's content: its text is about to be written again."""
        self._note(slot, [], [])

    def _note(self, slot: int, history: list[int], blocks: list[int]) -> None:
        for block in self._blocks[slot]:
            slots = self._slots_by_block[block]
            slots.discard(slot)
            if not slots:
                del self._slots_by_block[block]
        self._history[slot], self._blocks[slot] = history, blocks
        for block in blocks:
            self._slots_by_block.setdefault(block, set()).add(slot)


def chain(token_ids: Sequence[int]) -> list[int]:
    """Hashes of the whole blocks of a text, each over all tokens up to its end."""
    blocks: list[int] = []
    while len(token_ids) >= (len(blocks) + 1) * BLOCK_TOKENS:
        blocks.append(next_block(token_ids, blocks))
    return blocks


def next_block(token_ids: Sequence[int], blocks: Sequence[int]) -> int:
    """Hash of the block after some."""
    start = len(blocks) * BLOCK_TOKENS
    return hash((blocks[-1] if blocks else 0, *token_ids[start : start + BLOCK_TOKENS]))


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    length = min(len(a), len(b))
    for index in range(length):
        if a[index] != b[index]:
            return index
    return length
