"""The proposer of a trained draft, whatever its algorithm."""

from __future__ import annotations

from draftline.draft.checkpoint import DraftModel
from draftline.draft.eagle3_runner import Eagle3Runner
from draftline.draft.proposer import EngineRoom, Proposer
from draftline.draft.runner import DraftRunner
from draftline.draft.serving_vocabulary import TargetEnds
from draftline.target.load import Target


def new_proposer(draft: DraftModel, target: Target, room: EngineRoom) -> Proposer:
    """A proposer for an engine of this size, in the target's arithmetic."""
    if draft.config.is_eagle3:
        ends = TargetEnds(target.embedding_VD, target.lm_head_VD)
        return Eagle3Runner(draft.config, draft.weights, ends, target.dtype, room)
    return DraftRunner(
        draft.config,
        draft.weights,
        target.embedding_VD,
        target.lm_head_VD,
        target.dtype,
        room.num_slots,
        room.num_positions,
    )
