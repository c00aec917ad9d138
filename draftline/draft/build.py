"""A new module for a draft of any algorithm and family."""

from __future__ import annotations

import torch

from draftline.draft.config import DraftConfig
from draftline.draft.eagle3 import Eagle3Draft
from draftline.draft.model import DSparkDraft

DraftModule = DSparkDraft | Eagle3Draft


def new_draft(config: DraftConfig, max_positions: int) -> DraftModule:
    """The trainable module of an architecture, weights not yet drawn.

    Args:
        config: Architecture.
        max_positions: Longest sequence and block, for the rotary table.
    """
    return Eagle3Draft(config, max_positions) if config.is_eagle3 else DSparkDraft(config, max_positions)


def num_parameters(config: DraftConfig) -> int:
    """Trained parameters of a draft of this architecture; nothing is allocated."""
    with torch.device("meta"):
        return sum(p.numel() for p in new_draft(config, 1).parameters())
