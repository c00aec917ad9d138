"""Verification: accept a prefix of each draft, then draw one token more; all requests of a step at once.

A token x drafted from law p_d is accepted with probability
min(1, p_t(x) / p_d(x)); at the first rejection the next token comes from
max(0, p_t - p_d), renormalised; if all are accepted, from p_t. The output then
follows p_t exactly, whatever the draft (Leviathan et al. 2023; Chen et al.
2023). At temperature 0 this is: keep the drafts that equal the argmax.

Nothing here reads a tensor on the host, but for one look at nuclei on a CPU:
on an accelerator a step is verified without waiting for it.

Dimension letters: N rows (tokens of the step that need logits), V target
vocabulary, W draft vocabulary, R requests, B drafted slots of the longest
block, P rows of the proposal.
"""

from __future__ import annotations

from collections.abc import Sequence
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


def law_of(logits_NV: Tensor, laws: SamplingLaw | Sequence[SamplingLaw]) -> Tensor:
    """Probabilities ``[N, V]`` (fp32) after temperature, top-k and top-p.

    Top-k keeps all ties of the k-th; top-p keeps the smallest set of likeliest
    tokens whose mass reaches ``top_p``, computed after top-k.

    Args:
        logits_NV: Logits.
        laws: Of each row, or one for all.
    """
    count, size = logits_NV.shape
    rows = [laws] * count if isinstance(laws, SamplingLaw) else laws
    device = logits_NV.device
    facts = torch.tensor([(law.temperature, law.top_p) for law in rows], dtype=torch.float32, device=device).view(-1, 2)
    scaled = logits_NV.float()
    if any(law.temperature != 1.0 for law in rows):
        scaled = scaled / facts[:, :1]
    kept = [law.top_k if 0 < law.top_k < size else 0 for law in rows]
    if any(kept):
        values = scaled.topk(max(kept), dim=-1).values
        k_N1 = torch.tensor(kept, device=device)[:, None]
        kth = values.gather(-1, (k_N1 - 1).clamp_(min=0)).masked_fill_(k_N1 == 0, float("-inf"))
        scaled = scaled.masked_fill(scaled < kth, float("-inf"))
    probabilities = scaled.softmax(-1)
    cut = [row for row, law in enumerate(rows) if law.top_p < 1.0]
    if len(cut) == count:
        return _nucleus(probabilities, facts[:, 1:])
    if cut:
        index = torch.tensor(cut, device=device)
        probabilities[index] = _nucleus(probabilities[index], facts[index, 1:])
    return probabilities


def _nucleus(probabilities_NV: Tensor, top_p_N1: Tensor) -> Tensor:
    """Laws without all that is not in the nucleus."""
    size = probabilities_NV.shape[-1]
    # Sorting a whole vocabulary on a CPU costs more than the forward of a small target; the nucleus is nearly
    # always among a few hundred tokens, and where it is not the sort still decides. Elsewhere sorting is cheap, and
    # looking would wait for the device.
    quick = min(_NUCLEUS_TOKENS, size) if probabilities_NV.device.type == "cpu" else size
    ordered, order = probabilities_NV.topk(quick, dim=-1)
    if quick < size and bool((ordered.sum(-1, keepdim=True) < top_p_N1).any()):
        ordered, order = probabilities_NV.sort(dim=-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    kept = torch.where(before < top_p_N1, ordered, torch.zeros_like(ordered))
    # A mass that is zero in fp32 would keep nothing at all.
    kept[..., :1] = ordered[..., :1]
    nucleus = torch.zeros_like(probabilities_NV).scatter_(-1, order, kept)
    return nucleus.div_(nucleus.sum(-1, keepdim=True))


def draw(probabilities_NV: Tensor, uniforms_N: Tensor) -> Tensor:
    """One index per row by inverse CDF; weights need not sum to 1.

    Rows of zeros give the first index, so callers never pass one.
    """
    return _draw(probabilities_NV, uniforms_N)[0]


def _draw(probabilities_NV: Tensor, uniforms_N: Tensor) -> tuple[Tensor, Tensor]:
    """The same, and the sum of each row."""
    cumulative = probabilities_NV.cumsum(-1, dtype=torch.float64)
    wanted = uniforms_N.double().unsqueeze(-1) * cumulative[..., -1:]
    index = torch.searchsorted(cumulative, wanted, right=True).squeeze(-1)
    # u close to 1 may round past the end; the last index with weight is meant.
    last = (cumulative < cumulative[..., -1:]).sum(-1)
    return torch.minimum(index, last), cumulative[..., -1]


@dataclass(frozen=True)
class DraftedBlocks:
    """What is verified of each request; the rows of a request follow each other.

    Attributes:
        first_row_R: Its first row: the target's logits after the anchor, followed by those after each draft.
        ids_RB: Drafts as target ids, padded.
        counts_R: How many of them are drafts, at most B.
    """

    first_row_R: Tensor
    ids_RB: Tensor
    counts_R: Tensor

    def rows_RB(self, num_rows: int) -> Tensor:
        """Row that judges each draft; some row where there is none."""
        slots_B = torch.arange(self.ids_RB.shape[1], device=self.ids_RB.device)
        return (self.first_row_R[:, None] + slots_B).clamp_(max=num_rows - 1)

    def num_leading(self, is_accepted_RB: Tensor) -> Tensor:
        """``[R]``: drafts before the first that is not accepted."""
        slots_B = torch.arange(self.ids_RB.shape[1], device=self.ids_RB.device)
        return (is_accepted_RB & (slots_B < self.counts_R[:, None])).long().cumprod(1).sum(1)


@dataclass(frozen=True)
class DraftLaws:
    """What the drafts were drawn from.

    Attributes:
        row_R: Each request's row of the proposal; any for a request without drafts.
        columns_PB: Drafts as columns of the laws.
        law_PBW: The laws; ``None`` where each draft was certain, its law 1 at the draft.
        draft_to_target_W: Target id of every draft column, ``None`` when equal.
    """

    row_R: Tensor
    columns_PB: Tensor
    law_PBW: Tensor | None
    draft_to_target_W: Tensor | None


def verify_greedy(best_N: Tensor, blocks: DraftedBlocks) -> tuple[Tensor, Tensor]:
    """Keep the drafts that equal the target's likeliest tokens, up to the first that does not.

    Args:
        best_N: The target's likeliest token at every row.
        blocks: What is verified.

    Returns:
        Number of accepted drafts and the token that follows them, ``[R]`` each.
    """
    accepted_R = blocks.num_leading(best_N[blocks.rows_RB(len(best_N))] == blocks.ids_RB)
    return accepted_R, best_N[blocks.first_row_R + accepted_R]


def verify_sampled(
    target_law_NV: Tensor,
    blocks: DraftedBlocks,
    draft: DraftLaws | None,
    uniforms_RB: Tensor,
    last_uniform_R: Tensor,
) -> tuple[Tensor, Tensor]:
    """Accept or reject the drafts of every request and draw the next token.

    Args:
        target_law_NV: The target's law at every row.
        blocks: What is verified.
        draft: The drafts' laws; ``None`` when there are no drafts at all.
        uniforms_RB: Randomness in [0, 1), one per draft.
        last_uniform_R: Randomness of the draw.

    Returns:
        Number of accepted drafts and the token that follows them, ``[R]`` each.
    """
    num_rows, block = len(target_law_NV), blocks.ids_RB.shape[1]
    if draft is None or block == 0:
        accepted_R = torch.zeros_like(blocks.first_row_R)
        return accepted_R, draw(target_law_NV[blocks.first_row_R], last_uniform_R)
    p_target_RB = target_law_NV[blocks.rows_RB(num_rows), blocks.ids_RB].double()
    wanted_RB = uniforms_RB.double()
    if draft.law_PBW is not None:
        slots_B = torch.arange(block, device=draft.row_R.device)
        rows_R1 = draft.row_R[:, None]
        wanted_RB = wanted_RB * draft.law_PBW[rows_R1, slots_B, draft.columns_PB[rows_R1, slots_B]]
    # u < p_t / p_d, without dividing.
    accepted_R = blocks.num_leading(wanted_RB < p_target_RB)
    law_RV = target_law_NV[blocks.first_row_R + accepted_R]
    is_rejected_R = accepted_R < blocks.counts_R
    slot_R = accepted_R.clamp(max=block - 1)
    rejected_R = blocks.ids_RB.gather(-1, slot_R[:, None]).squeeze(-1)
    _subtract_draft(law_RV, is_rejected_R, rejected_R, slot_R, draft)
    following_R, total_R = _draw(law_RV, last_uniform_R)
    # Rounding may leave nothing (p_d equals p_t and a draft was rejected all the same, which has probability about
    # 1e-7). The draft then stands: it was drawn from that law.
    return accepted_R, torch.where(total_R > 0, following_R, rejected_R)


def _subtract_draft(
    law_RV: Tensor, is_rejected_R: Tensor, rejected_R: Tensor, slot_R: Tensor, draft: DraftLaws
) -> None:
    """Make the laws of requests with a rejected draft max(0, p_t - p_d), unnormalised."""
    if draft.law_PBW is None:
        kept_R = law_RV.gather(-1, rejected_R[:, None]).squeeze(-1)
        law_RV.scatter_(-1, rejected_R[:, None], torch.where(is_rejected_R, 0.0, kept_R)[:, None])
        return
    law_RW = draft.law_PBW[draft.row_R, slot_R].mul_(is_rejected_R[:, None])
    if draft.draft_to_target_W is None:
        law_RV -= law_RW
    else:
        law_RV[:, draft.draft_to_target_W] -= law_RW
    law_RV.clamp_(min=0)
