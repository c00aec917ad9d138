"""How far held-out blocks survive, as sums that workers can add.

Dimension letters: K blocks, B block size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from draftline.training.objective import Sums


def survival_sums(match_KB: Tensor) -> dict[str, Tensor]:
    """Blocks, and how many survive each position.

    Args:
        match_KB: 1 where the draft's likeliest token is the target's.
    """
    survived = match_KB.cumprod(1).double().sum(0)
    return {"survived": survived, "blocks": torch.tensor(float(len(match_KB)))}


def survival_figures(sums: Sums) -> dict[str, float]:
    """``accepted_length``, the target's own token included, and ``acceptance/position_k``.

    The acceptance at a position is conditional: of the blocks that survived
    the positions before; left out where none did.
    """
    survived, blocks = sums.vector("survived"), max(sums.scalar("blocks"), 1e-9)
    reached = [sums.scalar("blocks"), *survived[:-1]]
    by_position = {
        f"acceptance/position_{k + 1}": here / before
        for k, (here, before) in enumerate(zip(survived, reached, strict=True))
        if before > 0
    }
    return {"accepted_length": 1 + sum(survived) / blocks, **by_position}
