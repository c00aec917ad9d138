"""The proposer of a trained draft, whatever its algorithm."""

from __future__ import annotations

import torch

from draftline.draft.dialects.model import DraftModel
from draftline.draft.eagle3_runner import Eagle3Runner
from draftline.draft.proposer import EngineRoom, Proposer
from draftline.draft.runner import DraftRunner
from draftline.draft.serving_vocabulary import TargetEnds
from draftline.target.load import Target


def new_proposer(draft: DraftModel, target: Target, room: EngineRoom) -> Proposer:
    """A proposer for an engine of this size, in the target's arithmetic."""
    return proposer_between(draft, TargetEnds(target.embedding_VD, target.lm_head_VD), target.dtype, room)


def proposer_between(draft: DraftModel, ends: TargetEnds, dtype: torch.dtype, room: EngineRoom) -> Proposer:
    """The same where there is no whole target."""
    if draft.config.is_eagle3:
        return Eagle3Runner(draft.config, draft.weights, ends, dtype, room)
    return DraftRunner(
        draft.config, draft.weights, ends.embedding_VD, ends.lm_head_VD, dtype, room.num_slots, room.num_positions
    )
