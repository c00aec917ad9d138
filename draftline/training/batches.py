"""From cached samples to one step's inputs: anchors, blocks, masks, targets.

Everything is a pure function of the sample and its place in the stream, so a
step is the same whichever worker makes it and however often it was restarted.

Samples lie one after the other without padding; of each only the context up
to its last anchor, since nobody sees what comes after.

Dimension letters: S samples, A anchors of a sample, B block size, M slots of
the whole step, N valid ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from draftline.cache.reader import CachedSample
from draftline.draft.attention import BlockLayout
from draftline.draft.config import DraftConfig
from draftline.draft.loss import DistillationTargets
from draftline.draft.model import DraftInputs


@dataclass(frozen=True)
class DraftBatch:
    """One step of one worker.

    Attributes:
        inputs: What the draft sees.
        targets: What it is trained towards, for the valid slots only.
        valid_N: Slot of every valid one.
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
        anchors: Anchors of each, ascending.
        config: Of the draft.
        columns_V: Draft column of every target id, -1 outside the draft vocabulary.
        position_decay: Slot k weighs exp(-k / position_decay).
    """
    block = config.block_size
    layout = BlockLayout.of_anchors(block, [a.tolist() for a in anchors])
    decay = position_weights(block, position_decay)
    parts, num_slots, num_rows = [], 0, 0
    for sample, sample_anchors, length in zip(samples, anchors, layout.context_lengths_S, strict=True):
        part = _sample_blocks(sample, torch.from_numpy(sample_anchors), length, config, columns_V, decay)
        parts.append(replace(part, valid=part.valid + num_slots, rows=part.rows + num_rows))
        num_slots, num_rows = num_slots + len(part.positions), num_rows + len(part.hidden)

    def packed(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    return DraftBatch(
        DraftInputs(packed("taps"), packed("block_ids"), packed("previous"), packed("positions"), layout),
        DistillationTargets(
            packed("hidden"), packed("log_normaliser"), packed("labels"), packed("weights"), packed("rows")
        ),
        packed("valid"),
        tuple(s.sample_id for s in samples),
    )


@dataclass(frozen=True)
class _SampleBlocks:
    """One sample's part of a batch; ``valid`` and ``rows`` count from the sample's first slot and row."""

    taps: Tensor
    block_ids: Tensor
    previous: Tensor
    positions: Tensor
    valid: Tensor
    hidden: Tensor
    log_normaliser: Tensor
    rows: Tensor
    labels: Tensor
    weights: Tensor


def _sample_blocks(
    sample: CachedSample, anchor_A: Tensor, length: int, config: DraftConfig, columns_V: Tensor, decay_B: Tensor
) -> _SampleBlocks:
    block = config.block_size
    ids, mask = sample.input_ids_T, sample.loss_mask_T
    slot = (anchor_A[:, None] + torch.arange(block)).flatten()
    block_ids = torch.full((len(slot),), config.mask_token_id)
    block_ids[::block] = ids[anchor_A]
    ends = torch.from_numpy(run_ends(mask.numpy()))[anchor_A].repeat_interleave(block)
    is_valid = (slot + 1 <= ends) & mask[anchor_A].bool().repeat_interleave(block)
    at = slot[is_valid]
    # Overlapping blocks predict from the same positions: the target's law is made once for each.
    used, row_of_slot = torch.unique(at, return_inverse=True)
    return _SampleBlocks(
        taps=sample.taps_TLD[:length].flatten(1).float(),
        block_ids=block_ids,
        previous=ids[slot.clamp(max=len(ids) - 1)],
        positions=slot,
        valid=torch.nonzero(is_valid).squeeze(1),
        hidden=sample.last_hidden_TD[used].float(),
        log_normaliser=sample.log_normaliser_T[used],
        rows=row_of_slot,
        labels=columns_V[ids[at + 1]],
        weights=decay_B.repeat(len(anchor_A))[is_valid],
    )
