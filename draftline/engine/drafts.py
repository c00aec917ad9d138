"""What one engine step drafts and verifies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from draftline.draft.proposer import Proposal
from draftline.engine.slots import RunningRequest


@dataclass(frozen=True)
class StepDrafts:
    """What one step drafts.

    Attributes:
        proposal: The blocks; ``None`` without any.
        row_by_slot: Row of each request's block.
        ids_by_slot: What is verified of each; empty lists included.
    """

    proposal: Proposal | None
    row_by_slot: dict[int, int]
    ids_by_slot: dict[int, list[int]]

    def ids(self, slot: int) -> list[int]:
        """Drafts that a slot verifies."""
        return self.ids_by_slot.get(slot, [])


def step_drafts(proposal: Proposal | None, drafting: Sequence[RunningRequest], lengths: Sequence[int]) -> StepDrafts:
    """Cut the blocks of a proposal to what is verified of each.

    Args:
        proposal: The blocks.
        drafting: Whose they are.
        lengths: Drafts that each verifies.
    """
    if proposal is None:
        return StepDrafts(None, {}, {})
    ids = proposal.token_ids_RB.tolist()
    return StepDrafts(
        proposal,
        {r.slot: row for row, r in enumerate(drafting)},
        {r.slot: ids[row][: lengths[row]] for row, r in enumerate(drafting)},
    )
