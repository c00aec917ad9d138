"""Drafting without a model: what followed the last tokens the time before.

The baseline known as prompt lookup or n-gram speculation (Saxena 2023,
"Prompt Lookup Decoding"; ``prompt_lookup_num_tokens`` in transformers,
``ngram`` in vLLM): the longest suffix of the text, of at most ``max_ngram``
tokens, is looked for further up, latest place first, and what stands behind
it is the draft. An index of n-grams grows with each text, so that a step costs
what it adds and not what came before.

Dimension letters: R requests, B block size, S slots, P positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from draftline.draft.proposer import EngineRoom, ProcessedTokens, Proposal

LOOKUP_BLOCK = 7
LOOKUP_NGRAM = 3


class PromptLookup:
    """Proposes continuations that the text itself holds; see :class:`~draftline.draft.proposer.Proposer`.

    Args:
        room: Sizes of the engine.
        block_size: Tokens of one proposal at most.
        max_ngram: Longest suffix looked for.
    """

    tap_ids: tuple[int, ...] = ()
    draft_to_target: Tensor | None = None

    def __init__(self, room: EngineRoom, block_size: int = LOOKUP_BLOCK, max_ngram: int = LOOKUP_NGRAM) -> None:
        self.block_size = block_size
        self._max_ngram = max_ngram
        self._ids_SP = np.zeros((room.num_slots, room.num_positions), dtype=np.int64)
        # Of every slot: where its n-grams were last followed by something, and how many of its tokens are indexed.
        self._places: list[dict[tuple[int, ...], int]] = [{} for _ in range(room.num_slots)]
        self._num_indexed = [0] * room.num_slots

    def append(self, tokens: ProcessedTokens) -> None:
        """Remember the tokens."""
        index, positions = tokens.cache_index_N.cpu().numpy(), tokens.positions_N.cpu().numpy()
        self._ids_SP.reshape(-1)[index] = tokens.token_ids_N.cpu().numpy()
        slots = index // self._ids_SP.shape[1]
        starts = np.flatnonzero(np.diff(slots, prepend=-1))
        for slot, first in zip(slots[starts].tolist(), positions[starts].tolist(), strict=True):
            if first < self._num_indexed[slot]:
                # Another text begins in this slot.
                self._forget(slot)

    def move(self, source: int, destination: int, length: int) -> None:
        """Copy a slot's first ``length`` tokens over another slot's."""
        self._ids_SP[destination, :length] = self._ids_SP[source, :length]
        self._forget(destination)
        if self._num_indexed[source] <= length:
            self._places[destination] = self._places[source].copy()
            self._num_indexed[destination] = self._num_indexed[source]

    def propose(
        self,
        slots: Sequence[int],
        anchor_ids: Sequence[int],
        starts: Sequence[int],
        temperatures: Sequence[float],
        uniforms_RB: Tensor | None,
    ) -> Proposal:
        """See :meth:`draftline.draft.proposer.Proposer.propose`; its law is certain of one token at any temperature."""
        ids_RB = np.zeros((len(slots), self.block_size), dtype=np.int64)
        lengths = []
        for row, slot, anchor, start in zip(ids_RB, slots, anchor_ids, starts, strict=True):
            found = self._continuation(slot, anchor, start)
            row[: len(found)] = found
            lengths.append(len(found))
        ids = torch.from_numpy(ids_RB)
        return Proposal(ids, ids, None, None, tuple(lengths), is_certain=True)

    def _continuation(self, slot: int, anchor: int, start: int) -> list[int]:
        """What followed the latest earlier occurrence of the longest suffix that has one."""
        self._index(slot, start)
        ids_P, places = self._ids_SP[slot], self._places[slot]
        suffix = (*ids_P[max(0, start + 1 - self._max_ngram) : start].tolist(), anchor)
        # The whole text occurs once only.
        for size in range(min(len(suffix), start), 0, -1):
            place = places.get(suffix[-size:])
            if place is not None:
                # A suffix may overlap its own repetition ("a b a b"), so what follows can run into the suffix itself.
                end = place + self.block_size
                return [*ids_P[place : min(end, start)].tolist(), *([anchor] if end > start else [])]
        return []

    def _index(self, slot: int, end: int) -> None:
        done, places = self._num_indexed[slot], self._places[slot]
        first = max(0, done - self._max_ngram + 1)
        ids = self._ids_SP[slot, first:end].tolist()
        for position in range(done, end):
            for size in range(1, min(self._max_ngram, position + 1) + 1):
                places[tuple(ids[position + 1 - size - first : position + 1 - first])] = position + 1
        self._num_indexed[slot] = max(done, end)

    def _forget(self, slot: int) -> None:
        self._places[slot], self._num_indexed[slot] = {}, 0
