"""Drafting without a model: what followed the last tokens the time before.

The baseline known as prompt lookup or n-gram speculation (Saxena 2023,
"Prompt Lookup Decoding"; ``prompt_lookup_num_tokens`` in transformers,
``ngram`` in vLLM): the longest suffix of the text, of at most ``max_ngram``
tokens, is looked for further up, latest place first, and what stands behind
it is the draft.

Dimension letters: R requests, B block size, W = V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from draftline.draft.proposer import EngineRoom, ProcessedTokens, Proposal

Ids = NDArray[np.int64]


class PromptLookup:
    """Proposes continuations that the text itself holds; see :class:`~draftline.draft.proposer.Proposer`.

    Args:
        room: Sizes of the engine.
        vocab_size: V, of the target.
        block_size: Tokens of one proposal at most.
        max_ngram: Longest suffix looked for.
    """

    tap_ids: tuple[int, ...] = ()
    draft_to_target: Tensor | None = None

    def __init__(self, room: EngineRoom, vocab_size: int, block_size: int = 7, max_ngram: int = 3) -> None:
        self.block_size = block_size
        self._vocab_size = vocab_size
        self._max_ngram = max_ngram
        self._num_positions = room.num_positions
        self._ids_SP = np.zeros((room.num_slots, room.num_positions), dtype=np.int64)

    def append(self, tokens: ProcessedTokens) -> None:
        """Remember the tokens."""
        self._ids_SP.reshape(-1)[tokens.cache_index_N.cpu().numpy()] = tokens.token_ids_N.cpu().numpy()

    def move(self, source: int, destination: int, length: int) -> None:
        """Copy a slot's first ``length`` tokens over another slot's."""
        self._ids_SP[destination, :length] = self._ids_SP[source, :length]

    def propose(
        self,
        slots: Sequence[int],
        anchor_ids: Sequence[int],
        starts: Sequence[int],
        temperatures: Sequence[float],
        uniforms_RB: Tensor | None,
    ) -> Proposal:
        """See :meth:`draftline.draft.proposer.Proposer.propose`; its law is certain of one token at any temperature."""
        rows, lengths = [], []
        for slot, anchor, start in zip(slots, anchor_ids, starts, strict=True):
            text = np.append(self._ids_SP[slot, :start], anchor)
            found = continuation(text, self._max_ngram, self.block_size)
            lengths.append(len(found))
            rows.append(np.pad(found, (0, self.block_size - len(found))))
        ids_RB = torch.from_numpy(np.stack(rows))
        law = None
        if any(t > 0 for t in temperatures):
            law = torch.zeros(*ids_RB.shape, self._vocab_size).scatter_(-1, ids_RB[..., None], 1.0)
        return Proposal(ids_RB, ids_RB, None, law, tuple(lengths))


def continuation(text: Ids, max_ngram: int, count: int) -> Ids:
    """What followed the latest earlier occurrence of the longest suffix that has one; at most ``count`` tokens.

    Args:
        text: All tokens so far.
        max_ngram: Longest suffix tried; shorter ones follow down to a single token.
        count: Most tokens returned; none when no suffix occurs again.
    """
    for size in range(min(max_ngram, len(text) - 1), 0, -1):
        windows = np.lib.stride_tricks.sliding_window_view(text[:-1], size)
        places = np.flatnonzero((windows == text[-size:]).all(axis=1))
        if len(places):
            # A suffix may overlap its own repetition ("a b a b"), so what follows can run into the suffix itself.
            start = int(places[-1]) + size
            return text[start : start + count]
    return text[:0]
