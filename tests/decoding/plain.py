"""Verification of one request in plain loops: what the vectorised one is compared with, in tests and benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor

from draftline.decoding.verify import draw


def num_matching(argmax_ids: list[int], drafted_ids: list[int]) -> int:
    """How many leading drafts equal the target's argmax of the row before."""
    count = 0
    for drafted, best in zip(drafted_ids, argmax_ids, strict=False):
        if drafted != best:
            break
        count += 1
    return count


def verify_sampled(
    target_law_NV: Tensor,
    draft_law_BW: Tensor,
    drafted_ids: list[int],
    drafted_columns: list[int],
    draft_to_target_W: Tensor | None,
    uniforms: Tensor,
) -> tuple[int, int]:
    """Accept or reject the drafts of one request, one after the other, and draw the next token."""
    count = len(drafted_ids)
    accepted = count
    for k in range(count):
        p_target = float(target_law_NV[k, drafted_ids[k]])
        p_draft = float(draft_law_BW[k, drafted_columns[k]])
        if not float(uniforms[k]) * p_draft < p_target:
            accepted = k
            break
    law = target_law_NV[accepted]
    if accepted < count:
        law = residual_law(law, draft_law_BW[accepted], draft_to_target_W)
    return accepted, int(draw(law[None], uniforms[count : count + 1])[0])


def residual_law(target_law_V: Tensor, draft_law_W: Tensor, draft_to_target_W: Tensor | None) -> Tensor:
    """max(0, p_t - p_d), unnormalised; the target's law where rounding leaves nothing."""
    residual = target_law_V.clone()
    columns = torch.arange(len(draft_law_W)) if draft_to_target_W is None else draft_to_target_W
    residual[columns] -= draft_law_W
    residual.clamp_(min=0)
    return residual if float(residual.sum()) > 0 else target_law_V
