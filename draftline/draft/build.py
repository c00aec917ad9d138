"""A new module for a draft of any algorithm and family."""

from __future__ import annotations

import torch
from torch import nn

from draftline.draft.config import DraftConfig
from draftline.draft.model import DSparkDraft
from draftline.errors import SpecError


def new_draft(config: DraftConfig, max_positions: int) -> nn.Module:
    """The trainable module of an architecture, weights not yet drawn.

    Args:
        config: Architecture.
        max_positions: Longest sequence, for the rotary table.
    """
    if config.is_eagle3:
        raise SpecError("Eagle3 drafts cannot be built yet", remedy="Set draft.algorithm to dspark or dflash")
    return DSparkDraft(config, max_positions)


def num_parameters(config: DraftConfig) -> int:
    """Trained parameters of a draft of this architecture; nothing is allocated."""
    with torch.device("meta"):
        return sum(p.numel() for p in new_draft(config, 1).parameters())
