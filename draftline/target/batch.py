"""One flattened step: tokens of many requests in one row, attention in rectangles.

Linear layers see ``N`` tokens and nothing else, so their cost follows the
number of tokens. Attention runs per *segment*: a contiguous range of slots
whose queries are padded to the longest of the segment.

Dimension letters: N tokens of the step, R rows (slots) of a segment,
Q queries a row (padded), T key positions, G query heads a key head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class Chunk:
    """The tokens of one request in a step.

    Attributes:
        slot: Its row in the KV cache.
        start: Position of the first token, which is also the number of
            positions before it.
        token_ids: The tokens.
    """

    slot: int
    start: int
    token_ids: Sequence[int]


@dataclass(frozen=True)
class Segment:
    """A rectangle of attention.

    Attributes:
        first_slot: Start of the slot range.
        num_slots: Its length, R.
        length: Key positions read, T.
        gather_RQ: Token index of every query cell (0 where padded).
        scatter_M: Flat query cells that are real, in token order.
        tokens_M: The token of each of those.
        mask_RQT: Additive mask, ``[R, 1, Q, T]``.
    """

    first_slot: int
    num_slots: int
    length: int
    gather_RQ: Tensor
    scatter_M: Tensor
    tokens_M: Tensor
    mask_RQT: Tensor


@dataclass(frozen=True)
class StepBatch:
    """Everything a forward needs besides weights and cache.

    A token sees the keys of its request up to its own. That is said twice: as
    ranges of the cache for the CPU kernels, and as rectangles with a mask for
    torch's attention; the latter are made when asked for.

    Attributes:
        token_ids_N: Token ids.
        positions_N: Position of each token in its request.
        cache_index_N: ``slot * P + position``.
        slots_N: Row of each token's request in the cache.
        num_keys_N: Positions of it that each token sees, from the first on.
        chunks: What the step is made of.
        num_positions: P of the cache that it is for.
        dtype: Of the masks (the model's).
        long_chunk: From this many tokens on, a chunk gets a rectangle of its own.
    """

    token_ids_N: Tensor
    positions_N: Tensor
    cache_index_N: Tensor
    slots_N: Tensor
    num_keys_N: Tensor
    chunks: tuple[Chunk, ...]
    num_positions: int
    dtype: torch.dtype
    long_chunk: int

    @property
    def longest(self) -> int:
        """Positions of the longest request."""
        return max((chunk.start + len(chunk.token_ids) for chunk in self.chunks), default=0)

    @property
    def last_slot(self) -> int:
        """Highest slot in use; -1 for none."""
        return max((chunk.slot for chunk in self.chunks), default=-1)

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """Attention rectangles; together they cover every token once."""
        chunks = self.chunks
        first_token = list(accumulate((len(chunk.token_ids) for chunk in chunks), initial=0))
        short = [i for i, chunk in enumerate(chunks) if len(chunk.token_ids) < self.long_chunk]
        groups = [[i] for i, chunk in enumerate(chunks) if len(chunk.token_ids) >= self.long_chunk]
        if short:
            groups.append(short)
        device = self.token_ids_N.device
        return tuple(
            causal_segment([chunks[i] for i in group], [first_token[i] for i in group], self.dtype, device)
            for group in groups
        )


def build_batch(
    chunks: Sequence[Chunk],
    num_positions: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    long_chunk: int = 33,
) -> StepBatch:
    """Flatten chunks into one step; token order is chunk order.

    Args:
        chunks: Distinct slots, ascending by slot within the short ones.
        num_positions: P of the cache.
        dtype: Of the mask (the model's).
        device: Where the tensors go.
        long_chunk: From this many tokens on, a chunk (a prefill) gets a
            rectangle of its own, so it does not pad the short ones.
    """
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    for chunk in chunks:
        size = len(chunk.token_ids)
        token_ids.extend(chunk.token_ids)
        positions.extend(range(chunk.start, chunk.start + size))
        slots.extend([chunk.slot] * size)
    ids, position, slot = torch.tensor([token_ids, positions, slots], dtype=torch.long, device=device)
    return StepBatch(
        ids,
        position,
        slot * num_positions + position,
        slot,
        position + 1,
        tuple(chunks),
        num_positions,
        dtype,
        long_chunk,
    )


def causal_segment(
    chunks: Sequence[Chunk], first_token: Sequence[int], dtype: torch.dtype, device: torch.device | str
) -> Segment:
    """The rectangle of some chunks: each token sees its request's positions up to its own.

    Rows of the slot range that belong to no chunk see position 0, which keeps
    their softmax finite; their output is dropped.
    """
    first_slot = min(chunk.slot for chunk in chunks)
    num_slots = max(chunk.slot for chunk in chunks) + 1 - first_slot
    longest = max(len(chunk.token_ids) for chunk in chunks)
    length = max(chunk.start + len(chunk.token_ids) for chunk in chunks)
    gather = torch.zeros(num_slots, longest, dtype=torch.long)
    last_seen = torch.zeros(num_slots, longest, dtype=torch.long)
    scatter: list[int] = []
    tokens: list[int] = []
    for chunk, token in zip(chunks, first_token, strict=True):
        row, size = chunk.slot - first_slot, len(chunk.token_ids)
        gather[row, :size] = torch.arange(token, token + size)
        last_seen[row, :size] = torch.arange(chunk.start, chunk.start + size)
        scatter.extend(range(row * longest, row * longest + size))
        tokens.extend(range(token, token + size))
    hidden = torch.arange(length)[None, None, :] > last_seen[:, :, None]
    mask = torch.zeros(num_slots, longest, length, dtype=dtype).masked_fill_(hidden, float("-inf"))
    return Segment(
        first_slot,
        num_slots,
        length,
        gather.to(device),
        torch.tensor(scatter, device=device),
        torch.tensor(tokens, device=device),
        mask[:, None].to(device),
    )
