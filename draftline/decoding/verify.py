"""Verification: accept a prefix of the draft, then draw one token more.

A token x drafted from law p_d is accepted with probability
min(1, p_t(x) / p_d(x)); at the first rejection the next token comes from
max(0, p_t - p_d), renormalised; if all are accepted, from p_t. The output then
follows p_t exactly, whatever the draft (Leviathan et al. 2023; Chen et al.
2023). At temperature 0 this is: keep the drafts that equal the argmax.

Dimension letters: N rows (tokens of the step that need logits), V target
vocabulary, W draft vocabulary, B drafted slots of one request.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_NUCLEUS_TOKENS = 256


@dataclass(frozen=True)
class SamplingLaw:
    """What turns logits into the law that a request samples from.

    Attributes:
        temperature: Above 0.
        top_p: Nucleus mass.
        top_k: 0 keeps everything.
    """

    temperature: float
    top_p: float = 1.0
    top_k: int = 0


def law_of(logits_NV: Tensor, law: SamplingLaw) -> Tensor:
    """Probabilities ``[N, V]`` (fp32) after temperature, top-k and top-p.

    Top-k keeps all ties of the k-th; top-p keeps the smallest set of likeliest
    tokens whose mass reaches ``top_p``, computed after top-k.
    """
    scaled = logits_NV.float() / law.temperature
    if 0 < law.top_k < scaled.shape[-1]:
        kth = scaled.topk(law.top_k, dim=-1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < kth, float("-inf"))
    probabilities = scaled.softmax(-1)
    if law.top_p < 1.0:
        # Sorting a whole vocabulary costs more than the forward of a small target; the nucleus is nearly
        # always among a few hundred tokens, and where it is not the sort still decides.
        ordered, order = probabilities.topk(min(_NUCLEUS_TOKENS, probabilities.shape[-1]), dim=-1)
        if bool((ordered.sum(-1) < law.top_p).any()):
            ordered, order = probabilities.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        kept = torch.where(before < law.top_p, ordered, torch.zeros_like(ordered))
        # A mass that is zero in fp32 would keep nothing at all.
        kept[..., :1] = ordered[..., :1]
        probabilities = torch.zeros_like(probabilities).scatter_(-1, order, kept)
        probabilities /= probabilities.sum(-1, keepdim=True)
    return probabilities


def draw(probabilities_NV: Tensor, uniforms_N: Tensor) -> Tensor:
    """One index per row by inverse CDF; weights need not sum to 1.

    Rows of zeros give the last index, so callers never pass one.
    """
    cumulative = probabilities_NV.double().cumsum(-1)
    wanted = uniforms_N.double().unsqueeze(-1) * cumulative[..., -1:]
    index = torch.searchsorted(cumulative, wanted, right=True).squeeze(-1)
    # u close to 1 may round past the end; the last index with weight is meant.
    last = (cumulative < cumulative[..., -1:]).sum(-1)
    return torch.minimum(index, last)


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
    """Accept or reject the drafts of one request and draw the next token.

    Args:
        target_law_NV: ``[l + 1, V]``: the target's law after the anchor and
            after each of the l drafts.
        draft_law_BW: ``[>= l, W]``: the law each draft was drawn from.
        drafted_ids: The l drafts, as target ids.
        drafted_columns: The same as columns of ``draft_law_BW``.
        draft_to_target_W: Target id of every draft column, ``None`` when equal.
        uniforms: ``[l + 1]`` in [0, 1): one per draft, the last for the draw.

    Returns:
        Number of accepted drafts and the token that follows them.
    """
    count = len(drafted_ids)
    accepted = count
    for k in range(count):
        p_target = float(target_law_NV[k, drafted_ids[k]])
        p_draft = float(draft_law_BW[k, drafted_columns[k]])
        # u < p_t / p_d, without dividing.
        if not float(uniforms[k]) * p_draft < p_target:
            accepted = k
            break
    law = target_law_NV[accepted]
    if accepted < count:
        law = residual_law(law, draft_law_BW[accepted], draft_to_target_W)
    return accepted, int(draw(law[None], uniforms[count : count + 1])[0])


def residual_law(target_law_V: Tensor, draft_law_W: Tensor, draft_to_target_W: Tensor | None) -> Tensor:
    """max(0, p_t - p_d), unnormalised, over the target's vocabulary.

    When rounding leaves nothing (p_d equals p_t and a draft was rejected all
    the same, which has probability about 1e-7), the target's law is returned.
    """
    residual = target_law_V.clone()
    if draft_to_target_W is None:
        residual -= draft_law_W
    else:
        residual[draft_to_target_W] -= draft_law_W
    residual.clamp_(min=0)
    return residual if float(residual.sum()) > 0 else target_law_V
