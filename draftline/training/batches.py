"""From cached samples to one step's inputs: anchors, blocks, masks, targets.

Everything is a pure function of the sample and its place in the stream, so a
step is the same whichever worker makes it and however often it was restarted.

Dimension letters: S samples, C context positions (padded), A anchors a
sample, B block size, M = A * B slots, N valid slots of the whole step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from draftline.cache.reader import CachedSample
from draftline.draft.config import DraftConfig
from draftline.draft.loss import DistillationTargets
from draftline.draft.model import DraftInputs


@dataclass(frozen=True)
class DraftBatch:
    """One step of one worker.

    Attributes:
        inputs: What the draft sees.
        targets: What it is trained towards, for the valid slots only.
        valid_N: Flat slot index (into ``S * M``) of every valid slot.
        sample_ids: For error messages.
    """

    inputs: DraftInputs
    targets: DistillationTargets
    valid_N: Tensor
    sample_ids: tuple[str, ...]


def eligible_anchors(loss_mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Positions that the target produced and after which it produced another token."""
    return np.flatnonzero(loss_mask[:-1] & loss_mask[1:])


def run_ends(loss_mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """For each position the last position of its run of produced tokens."""
    length = len(loss_mask)
    ends = np.empty(length, dtype=np.int64)
    end = -1
    for position in range(length - 1, -1, -1):
        if not loss_mask[position]:
            end = position - 1
        elif position == length - 1 or not loss_mask[position + 1]:
            end = position
        ends[position] = end
    return ends


def draw_anchors(loss_mask: NDArray[np.bool_], count: int, seed: Sequence[int]) -> NDArray[np.int64]:
    """``count`` anchors of a sample, ascending; repeated only when it has fewer."""
    eligible = eligible_anchors(loss_mask)
    if len(eligible) == 0:
        return np.zeros(count, dtype=np.int64)
    random = np.random.default_rng(list(seed))
    return np.sort(random.choice(eligible, count, replace=len(eligible) < count))


def position_weights(block_size: int, decay: float) -> Tensor:
    """Weights ``[B]`` of a block's slots: exp(-k / decay), k from 0 (the reference's; the paper's exponent differs)."""
    return torch.exp(-torch.arange(block_size) / decay)


def build_draft_batch(
    samples: Sequence[CachedSample],
    anchors: Sequence[NDArray[np.int64]],
    config: DraftConfig,
    columns_V: Tensor,
    position_decay: float,
) -> DraftBatch:
    """Assemble a step.

    Args:
        samples: S samples.
        anchors: Equal numbers of anchors of each.
        config: Of the draft.
        columns_V: Draft column of every target id, -1 outside the draft vocabulary.
        position_decay: Slot k weighs exp(-k / position_decay).
    """
    block, num_anchors = config.block_size, len(anchors[0])
    # Context after the last anchor is visible to nobody.
    length = max(int(a.max()) for a in anchors) or 1
    width = len(config.target_layer_ids) * config.hidden_size
    taps = torch.zeros(len(samples), length, width)
    block_ids = torch.full((len(samples), num_anchors * block), config.mask_token_id)
    previous = torch.empty(len(samples), num_anchors * block, dtype=torch.long)
    positions = torch.empty_like(previous)
    context_mask = torch.empty(len(samples), num_anchors * block, length, dtype=torch.bool)
    hidden, normalisers, labels, weights, valid, rows = [], [], [], [], [], []
    num_rows = 0
    decay = position_weights(block, position_decay).repeat(num_anchors)
    for row, (sample, sample_anchors) in enumerate(zip(samples, anchors, strict=True)):
        anchor = torch.from_numpy(sample_anchors)
        used = min(length, len(sample.input_ids_T))
        taps[row, :used] = sample.taps_TLD[:used].reshape(used, width)
        slot = (anchor[:, None] + torch.arange(block)).flatten()
        positions[row] = slot
        last = len(sample.input_ids_T) - 1
        block_ids[row, ::block] = sample.input_ids_T[anchor]
        previous[row] = sample.input_ids_T[slot.clamp(max=last)]
        context_mask[row] = torch.arange(length)[None] < anchor.repeat_interleave(block)[:, None]
        mask = sample.loss_mask_T.numpy()
        ends = torch.from_numpy(run_ends(mask))[anchor].repeat_interleave(block)
        is_valid = (slot + 1 <= ends) & torch.from_numpy(mask)[anchor].repeat_interleave(block)
        at = slot[is_valid]
        valid.append(torch.nonzero(is_valid).squeeze(1) + row * num_anchors * block)
        # Overlapping blocks predict from the same positions: the target's law is made once for each.
        used_positions, row_of_slot = torch.unique(at, return_inverse=True)
        rows.append(row_of_slot + num_rows)
        num_rows += len(used_positions)
        hidden.append(sample.last_hidden_TD[used_positions].float())
        normalisers.append(sample.log_normaliser_T[used_positions])
        labels.append(columns_V[sample.input_ids_T[at + 1]])
        weights.append(decay[is_valid])
    block_of = torch.arange(num_anchors * block) // block
    own_block = block_of[:, None] == block_of[None, :]
    visible = torch.cat([context_mask, own_block.expand(len(samples), -1, -1)], 2)
    additive = torch.zeros(visible.shape).masked_fill_(~visible, float("-inf"))
    return DraftBatch(
        DraftInputs(taps, block_ids, previous, positions, additive[:, None]),
        DistillationTargets(
            torch.cat(hidden), torch.cat(normalisers), torch.cat(labels), torch.cat(weights), torch.cat(rows)
        ),
        torch.cat(valid),
        tuple(s.sample_id for s in samples),
    )
