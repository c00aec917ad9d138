"""D-PACE: position weights that follow what limits the accepted length.

Wu et al., "D-PACE: Dynamic Position-Aware Cross-Entropy for Parallel
Speculative Drafting", arXiv 2605.18810. With q_i the draft's probability of
the target's token at position i of a block:

    q~_i = (1 - alpha) q_i + alpha                     (eq. 7)
    w_j  = sum_{m >= j} prod_{i <= m} q~_i             (eq. 8)

and the loss of a block is sum_j w_j (-log q_j), the weights detached (eq. 9).
w_j is the credit that position j has in the expected accepted length, so the
sum over blocks is divided by the number of blocks, not by the sum of weights:
that would cancel the credit (the authors, in sgl-project/SpecForge issue 828).

Dimension letters: N slots, G blocks, B slots of the longest block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DPace:
    """D-PACE instead of fixed weights.

    Attributes:
        block_N: Block of every slot; slots of one block are consecutive, in
            order of position.
        alpha: Smoothing towards 1, in (0, 1]; the paper uses 0.5 and finds 0.3
            to 0.7 stable.
    """

    block_N: Tensor
    alpha: float


def dpace_weights(confidence_N: Tensor, is_counted_N: Tensor, block_N: Tensor, alpha: float) -> Tensor:
    """Weights ``[N]`` of eq. 8.

    Args:
        confidence_N: Draft probability of the token that followed; 0 where it
            cannot be drafted.
        is_counted_N: Slots that count; the others weigh nothing and do not
            lower what comes after them.
        block_N: See :class:`DPace`.
        alpha: See :class:`DPace`.
    """
    if len(confidence_N) == 0:
        return confidence_N.clone()
    _, inverse, counts = torch.unique_consecutive(block_N, return_inverse=True, return_counts=True)
    offset = torch.arange(len(block_N), device=block_N.device) - (counts.cumsum(0) - counts)[inverse]
    smoothed_GB = confidence_N.new_ones(len(counts), int(counts.max()))
    counted_GB = torch.zeros_like(smoothed_GB)
    place = (inverse, offset)
    smoothed = (1 - alpha) * confidence_N + alpha
    smoothed_GB[place] = torch.where(is_counted_N, smoothed, torch.ones_like(smoothed))
    counted_GB[place] = is_counted_N.to(smoothed_GB.dtype)
    survival_GB = smoothed_GB.cumprod(1) * counted_GB
    weights_GB = survival_GB.flip(1).cumsum(1).flip(1) * counted_GB
    return weights_GB[place]


def num_blocks(is_counted_N: Tensor, block_N: Tensor) -> Tensor:
    """How many blocks hold a slot that counts: what the weighted sum is divided by."""
    blocks = torch.unique_consecutive(block_N[is_counted_N])
    return torch.tensor(float(len(blocks)), device=block_N.device)
