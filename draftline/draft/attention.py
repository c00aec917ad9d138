"""Attention of packed blocks: each slot sees its sample's context before the anchor, and its own block.

Samples lie one after the other without padding. Slots and context tokens are
bound by indices (which sample, which anchor), not by masks over everything,
so the cost follows the real context: "anchor-bounded packing" (paper
section 3.3). Two implementations with equal results: on a CPU, SDPA over
groups of neighbouring anchors; on CUDA, ``flex_attention`` with a block mask
made from the same indices. The CUDA path has never run on a GPU: tests run
the same code uncompiled on a CPU.

Dimension letters: S samples, C context tokens of all samples, G blocks of all
samples, B slots of a block (gamma), M = G * B slots, H query heads, K key
heads, E head size, R query rows of a bucket, T keys of a bucket.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

BUCKET_OVERHEAD_PAIRS = 2048
"""What one more call of SDPA costs, in query-key pairs of one slot."""

Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""Queries ``[M, H, E]``, context keys and values ``[C, K, E]``, the blocks' ``[M, K, E]``, to ``[M, H, E]``."""


@dataclass(frozen=True)
class Bucket:
    """Neighbouring anchors of one sample that are computed together.

    Attributes:
        first_block: Of the step's blocks.
        num_blocks: In the bucket.
        num_keys: Context tokens that its last anchor sees; no later one is computed.
    """

    first_block: int
    num_blocks: int
    num_keys: int


@dataclass(frozen=True)
class BlockLayout:
    """Where the packed blocks of a step see context. Plain integers, on no device.

    Attributes:
        block_size: Slots of a block.
        context_lengths_S: Context tokens of every sample, up to its last anchor.
        anchors_S: Anchors of every sample, ascending: as many blocks, in this order.
    """

    block_size: int
    context_lengths_S: tuple[int, ...]
    anchors_S: tuple[tuple[int, ...], ...]

    @classmethod
    def of_anchors(cls, block_size: int, anchors: Sequence[Sequence[int]]) -> BlockLayout:
        """The layout of samples with these ascending anchors."""
        lengths = tuple(int(a[-1]) if len(a) else 0 for a in anchors)
        return cls(block_size, lengths, tuple(tuple(int(x) for x in a) for a in anchors))

    @property
    def num_blocks(self) -> int:
        """G."""
        return sum(len(anchors) for anchors in self.anchors_S)

    @property
    def num_context(self) -> int:
        """C."""
        return sum(self.context_lengths_S)

    @property
    def num_pairs(self) -> int:
        """Query-key pairs that exist: what attention has to cost at least."""
        return sum(self.block_size * (a + self.block_size) for anchors in self.anchors_S for a in anchors)

    @functools.cached_property
    def buckets_S(self) -> tuple[tuple[Bucket, ...], ...]:
        """Buckets of every sample; they part its blocks."""
        found, first = [], 0
        for anchors in self.anchors_S:
            found.append(tuple(_buckets(anchors, first, self.block_size)))
            first += len(anchors)
        return tuple(found)

    def context_positions(self) -> Tensor:
        """``[C]`` position of every context token in its sample."""
        return torch.cat([torch.arange(n) for n in self.context_lengths_S] or [torch.arange(0)])

    def context_samples(self) -> Tensor:
        """``[C]`` sample of every context token."""
        return torch.repeat_interleave(
            torch.arange(len(self.context_lengths_S)), torch.tensor(self.context_lengths_S, dtype=torch.long)
        )

    def block_anchors(self) -> Tensor:
        """``[G]`` anchors."""
        return torch.tensor([a for anchors in self.anchors_S for a in anchors], dtype=torch.long)

    def block_samples(self) -> Tensor:
        """``[G]`` sample of every block."""
        counts = torch.tensor([len(anchors) for anchors in self.anchors_S], dtype=torch.long)
        return torch.repeat_interleave(torch.arange(len(self.anchors_S)), counts)


def block_attention(layout: BlockLayout, num_groups: int, device: torch.device) -> Attend:
    """The attention of one step, used by every layer: what depends on indices alone is made here, once.

    Args:
        layout: The step.
        num_groups: Query heads that share a key head.
        device: Of the tensors.
    """
    if device.type == "cuda":
        return flex_blocks(layout, device, _compiled_flex_attention())
    return sdpa_blocks(layout, num_groups, device)


# -- SDPA ----------------------------------------------------------------------------------------------------------


def sdpa_blocks(layout: BlockLayout, num_groups: int, device: torch.device) -> Attend:
    """Attention by SDPA, bucket after bucket."""
    block = layout.block_size
    masks = [[_mask(layout, bucket, num_groups).to(device) for bucket in buckets] for buckets in layout.buckets_S]
    slots = [bucket.num_blocks * block for buckets in layout.buckets_S for bucket in buckets]

    def attend(q: Tensor, context_k: Tensor, context_v: Tensor, own_k: Tensor, own_v: Tensor) -> Tensor:
        # Splitting is undone by one concatenation in the backward; slices would each fill a whole gradient.
        parts = zip(q.split(slots), own_k.split(slots), own_v.split(slots), strict=True)
        lengths = list(layout.context_lengths_S)
        outputs = []
        for sample, (k, v) in enumerate(zip(context_k.split(lengths), context_v.split(lengths), strict=True)):
            for bucket, mask in zip(layout.buckets_S[sample], masks[sample], strict=True):
                part_q, part_k, part_v = next(parts)
                keys = torch.cat([k[: bucket.num_keys], part_k])
                values = torch.cat([v[: bucket.num_keys], part_v])
                outputs.append(_attend_bucket(part_q, keys, values, mask, num_groups))
        return torch.cat(outputs) if outputs else q

    return attend


def _attend_bucket(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, num_groups: int) -> Tensor:
    slots, num_heads, size = q.shape
    # Query heads that share a key head become further query rows: one product with the keys serves them all.
    rows = q.view(slots, num_heads // num_groups, num_groups, size).transpose(0, 1).flatten(1, 2)
    out = functional.scaled_dot_product_attention(
        rows[None], keys.transpose(0, 1)[None], values.transpose(0, 1)[None], attn_mask=mask.to(q.dtype)
    )
    return out[0].view(-1, slots, num_groups, size).transpose(0, 1).reshape(slots, num_heads, size)


def _mask(layout: BlockLayout, bucket: Bucket, num_groups: int) -> Tensor:
    """Additive mask ``[R, T]``: context before each anchor, then the bucket's own blocks."""
    anchors = layout.block_anchors()[bucket.first_block : bucket.first_block + bucket.num_blocks]
    before = torch.arange(bucket.num_keys)[None] < anchors[:, None]
    own = torch.eye(bucket.num_blocks, dtype=torch.bool).repeat_interleave(layout.block_size, dim=1)
    visible = torch.cat([before, own], 1).repeat_interleave(layout.block_size * num_groups, dim=0)
    return torch.zeros(visible.shape).masked_fill_(~visible, float("-inf"))


def _buckets(anchors: Sequence[int], first_block: int, block_size: int) -> list[Bucket]:
    """The cheapest cut of ascending anchors into neighbours, by dynamic programming over the number of blocks.

    A bucket of n blocks whose last anchor is a costs n B (a + n B) pairs, of
    which some are masked out, plus a call.
    """
    count = len(anchors)
    cost: NDArray[np.int64] = np.zeros(count + 1, dtype=np.int64)
    cut = np.zeros(count + 1, dtype=np.int64)
    for end in range(1, count + 1):
        slots = block_size * (end - np.arange(end))
        totals = cost[:end] + slots * (anchors[end - 1] + slots) + BUCKET_OVERHEAD_PAIRS
        cut[end] = int(totals.argmin())
        cost[end] = totals[cut[end]]
    found, end = [], count
    while end:
        start = int(cut[end])
        found.append(Bucket(first_block + start, end - start, int(anchors[end - 1])))
        end = start
    return found[::-1]


# -- flex_attention ------------------------------------------------------------------------------------------------


def flex_blocks(layout: BlockLayout, device: torch.device, attention: Callable[..., Any]) -> Attend:
    """Attention by ``flex_attention``, with a mask from token-level indices.

    Args:
        layout: The step.
        device: Of the tensors.
        attention: ``torch.nn.attention.flex_attention.flex_attention``, compiled or not.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    num_context, num_slots = layout.num_context, layout.num_blocks * layout.block_size
    block_size = layout.block_size
    # One entry past the end, so that an index of the other kind of key is always valid.
    positions = _padded(layout.context_positions(), num_slots).to(device)
    samples = _padded(layout.context_samples(), num_slots).to(device)
    anchors, owners = layout.block_anchors().to(device), layout.block_samples().to(device)

    def is_visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        block = query // block_size
        is_context = key < num_context
        before_anchor = (samples[key] == owners[block]) & (positions[key] < anchors[block])
        own = (key - num_context) // block_size == block
        return (is_context & before_anchor) | (~is_context & own)

    mask = create_block_mask(is_visible, None, None, num_slots, num_context + num_slots, device=device)

    def attend(q: Tensor, context_k: Tensor, context_v: Tensor, own_k: Tensor, own_v: Tensor) -> Tensor:
        keys, values = torch.cat([context_k, own_k]), torch.cat([context_v, own_v])
        out = attention(
            q.transpose(0, 1)[None],
            keys.transpose(0, 1)[None],
            values.transpose(0, 1)[None],
            block_mask=mask,
            enable_gqa=True,
        )
        attended: Tensor = out[0].transpose(0, 1)
        return attended

    return attend


def _padded(index_C: Tensor, count: int) -> Tensor:
    return torch.cat([index_C, index_C.new_full((count,), -1)])


@functools.cache
def _compiled_flex_attention() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    # Uncompiled it would make the whole matrix of scores.
    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=True)
    return compiled
