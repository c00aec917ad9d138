"""From cached samples to one step's Eagle3 chains: anchors, context rows, targets.

An anchor is drawn as for block drafts (:mod:`draftline.training.batches`), so
that every algorithm learns from the same places; step k of its chain predicts
the token at anchor + k + 1, as slot k of a block does. The reference trains
the chain of every position instead, and weighs by the loss mask of the
chain's *first row*, so that it also learns what the target would say after the
end of an answer; here a step counts when the token it predicts was produced.

Dimension letters: S samples, C context rows (padded), A anchors a sample, B
steps of a chain, N valid steps of the whole batch, U distinct target
positions.
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
from draftline.draft.eagle3 import ChainInputs
from draftline.draft.loss import DistillationTargets
from draftline.training.batches import run_ends


@dataclass(frozen=True)
class Eagle3Batch:
    """One step of one worker.

    Attributes:
        inputs: What the draft sees.
        targets: What it is trained towards, for the valid steps only.
        valid_N: Flat index (into ``S * A * B``) of every valid step.
        sample_ids: For error messages.
    """

    inputs: ChainInputs
    targets: DistillationTargets
    valid_N: Tensor
    sample_ids: tuple[str, ...]


def build_eagle3_batch(
    samples: Sequence[CachedSample], anchors: Sequence[NDArray[np.int64]], config: DraftConfig, columns_V: Tensor
) -> Eagle3Batch:
    """Assemble a step.

    Args:
        samples: S samples.
        anchors: Equal numbers of anchors of each; one at position 0, which no row comes before, counts nothing.
        config: Of the draft.
        columns_V: Draft column of every target id, -1 outside the draft vocabulary.
    """
    steps, num_anchors = config.ttt_length, len(anchors[0])
    # Rows from the last anchor on are visible to nobody.
    length = max(1, *(int(a.max()) for a in anchors))
    width = len(config.target_layer_ids) * config.hidden_size
    taps = torch.zeros(len(samples), length, width)
    following = torch.zeros(len(samples), length, dtype=torch.long)
    chain = torch.empty(len(samples), num_anchors, steps, dtype=torch.long)
    first = torch.empty(len(samples), num_anchors, dtype=torch.long)
    weight_B = torch.tensor(config.ttt_decay) ** torch.arange(steps)
    parts = []
    for row, (sample, sample_anchors) in enumerate(zip(samples, anchors, strict=True)):
        anchor = torch.from_numpy(sample_anchors)
        used = min(length, len(sample.input_ids_T) - 1)
        taps[row, :used] = sample.taps_TLD[:used].reshape(used, width)
        following[row, :used] = sample.input_ids_T[1 : used + 1]
        slot = anchor[:, None] + torch.arange(steps)
        chain[row] = sample.input_ids_T[slot.clamp(max=len(sample.input_ids_T) - 1)]
        first[row] = anchor.clamp(min=1)
        parts.append(_targets_of(sample, anchor, slot, weight_B, columns_V))
    offset = torch.tensor([0, *(len(part.hidden_UD) for part, _ in parts)]).cumsum(0)
    targets = DistillationTargets(
        torch.cat([part.hidden_UD for part, _ in parts]),
        torch.cat([part.log_normaliser_U for part, _ in parts]),
        torch.cat([part.labels_N for part, _ in parts]),
        torch.cat([part.weights_N for part, _ in parts]),
        torch.cat([_rows(part) + int(start) for (part, _), start in zip(parts, offset[:-1], strict=True)]),
    )
    valid = torch.cat([index + row * num_anchors * steps for row, (_, index) in enumerate(parts)])
    inputs = ChainInputs(taps, following, first, chain)
    return Eagle3Batch(inputs, targets, valid, tuple(s.sample_id for s in samples))


def _targets_of(
    sample: CachedSample, anchor_A: Tensor, slot_AB: Tensor, weight_B: Tensor, columns_V: Tensor
) -> tuple[DistillationTargets, Tensor]:
    """Targets of a sample's valid steps, and their index into ``A * B``."""
    mask = sample.loss_mask_T
    ends = torch.from_numpy(run_ends(mask.numpy()))[anchor_A]
    is_valid = (slot_AB + 1 <= ends[:, None]) & (mask[anchor_A] & (anchor_A > 0))[:, None]
    at = slot_AB[is_valid]
    # Overlapping chains predict from the same positions: the target's law is made once for each.
    positions, row = torch.unique(at, return_inverse=True)
    targets = DistillationTargets(
        sample.last_hidden_TD[positions].float(),
        sample.log_normaliser_T[positions],
        columns_V[sample.input_ids_T[at + 1]],
        weight_B.expand_as(slot_AB)[is_valid],
        row,
    )
    return targets, torch.nonzero(is_valid.flatten()).squeeze(1)


def _rows(targets: DistillationTargets) -> Tensor:
    assert targets.row_N is not None
    return targets.row_N
