"""The DSpark loss, chunked, with a hand-written backward through the frozen LM head.

L = ce * CE + tv * TV + confidence * BCE (paper section 3.3), every slot
weighted by exp(-k / decay). Logits ``[rows, W]`` exist for one chunk of rows
at a time, in the forward only: the gradients with respect to hidden states,
Markov latents and ``markov_w2`` are accumulated there, so peak memory does
not grow with anchors x block x vocabulary.

Terms come back as sums and counts; dividing happens once, in the loop.

Dimension letters: N slots, D hidden, W draft vocabulary, r Markov rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

CHUNK_ROWS = 512


@dataclass(frozen=True)
class DistillationTargets:
    """What the draft is trained towards, per slot.

    Attributes:
        hidden_ND: The target's last hidden state at the slot's position.
        log_normaliser_N: Log-sum-exp of the target's full-vocabulary logits there.
        labels_N: Draft-vocabulary id of the token that followed, -1 when it
            is outside the draft vocabulary.
        weights_N: Position weights, 0 for slots past the end of the answer.
    """

    hidden_ND: Tensor
    log_normaliser_N: Tensor
    labels_N: Tensor
    weights_N: Tensor


@dataclass(frozen=True)
class LossTerms:
    """Sums over slots; ``objective`` alone carries gradients.

    Attributes:
        objective: ``ce * ce_sum + tv * tv_sum``, differentiable.
        ce_sum: Weighted cross-entropy, where the label is in the vocabulary.
        tv_sum: Weighted total variation to the target's law.
        weight_sum: Of all weights.
        accept_N: 1 - TV, the chance that a sampled draft token survives.
        is_greedy_match_N: Whether both argmaxes agree.
    """

    objective: Tensor
    ce_sum: Tensor
    tv_sum: Tensor
    weight_sum: Tensor
    accept_N: Tensor
    is_greedy_match_N: Tensor


def distillation_loss(
    hidden_ND: Tensor,
    latent_Nr: Tensor | None,
    markov_w2_Wr: Tensor | None,
    head_WD: Tensor,
    targets: DistillationTargets,
    *,
    ce: float,
    tv: float,
    count_matches: bool = True,
) -> LossTerms:
    """Cross-entropy and total variation of draft logits to the target's law.

    Args:
        hidden_ND: Draft hidden states after the final norm.
        latent_Nr: Markov latents, or ``None`` without a sequential head.
        markov_w2_Wr: Their map to the draft vocabulary.
        head_WD: The target's LM head rows of the draft vocabulary; frozen.
        targets: See :class:`DistillationTargets`. With a pruned vocabulary the
            target's mass outside it counts as lost (it can never be drafted).
        ce: Weight of cross-entropy.
        tv: Weight of total variation.
        count_matches: Compare argmaxes; all are reported as different without.
    """
    objective, ce_sum, tv_sum, accept, match = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        hidden_ND, latent_Nr, markov_w2_Wr, head_WD, targets, ce, tv, count_matches
    )
    return LossTerms(objective, ce_sum, tv_sum, targets.weights_N.sum(), accept, match)


def confidence_loss(logits_N: Tensor, accept_N: Tensor, weights_N: Tensor) -> Tensor:
    """Weighted BCE sum of confidence logits against 1 - TV (eq. 8)."""
    each = functional.binary_cross_entropy_with_logits(logits_N, accept_N.clamp(0, 1), reduction="none")
    return (each * weights_N).sum()


class _ChunkedLoss(torch.autograd.Function):
    """See :func:`distillation_loss`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        latent: Tensor | None,
        w2: Tensor | None,
        head: Tensor,
        targets: DistillationTargets,
        ce: float,
        tv: float,
        count_matches: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        rows = hidden.shape[0]
        grad_hidden = torch.empty_like(hidden)
        grad_latent = torch.empty_like(latent) if latent is not None else None
        grad_w2 = torch.zeros_like(w2) if w2 is not None else None
        ce_sum, tv_sum = hidden.new_zeros(()), hidden.new_zeros(())
        accept, match = hidden.new_empty(rows), torch.empty(rows, dtype=torch.bool, device=hidden.device)
        for start in range(0, rows, CHUNK_ROWS):
            part = slice(start, min(start + CHUNK_ROWS, rows))
            chunk = _chunk_terms(
                hidden[part], None if latent is None else latent[part], w2, head, targets, part, ce, tv, count_matches
            )
            ce_sum += chunk.ce_sum
            tv_sum += chunk.tv_sum
            accept[part], match[part] = chunk.accept, chunk.match
            torch.mm(chunk.grad_logits, head, out=grad_hidden[part])
            if grad_latent is not None and w2 is not None and latent is not None and grad_w2 is not None:
                torch.mm(chunk.grad_logits, w2, out=grad_latent[part])
                grad_w2.addmm_(chunk.grad_logits.t(), latent[part])
        ctx.save_for_backward(grad_hidden, grad_latent, grad_w2)
        ctx.mark_non_differentiable(accept, match)
        return ce * ce_sum + tv * tv_sum, ce_sum, tv_sum, accept, match

    @staticmethod
    def backward(ctx: Any, grad_objective: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grads = [g * grad_objective if g is not None else None for g in ctx.saved_tensors]
        return (*grads, None, None, None, None, None)


@dataclass(frozen=True)
class _Chunk:
    ce_sum: Tensor
    tv_sum: Tensor
    accept: Tensor
    match: Tensor
    grad_logits: Tensor


def _chunk_terms(
    hidden: Tensor,
    latent: Tensor | None,
    w2: Tensor | None,
    head: Tensor,
    targets: DistillationTargets,
    part: slice,
    ce: float,
    tv: float,
    count_matches: bool,
) -> _Chunk:
    logits = torch.mm(hidden, head.t())
    if latent is not None and w2 is not None:
        logits.addmm_(latent, w2.t())
    target_logits = torch.mm(targets.hidden_ND[part], head.t())
    match = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    if count_matches:
        match = logits.argmax(-1) == target_logits.argmax(-1)
    q = target_logits.sub_(targets.log_normaliser_N[part, None]).exp_()
    labels, weights = targets.labels_N[part], targets.weights_N[part]
    log_normaliser = logits.logsumexp(-1, keepdim=True)
    known = labels >= 0
    label_index = labels.clamp(min=0)[:, None]
    log_p_label = logits.gather(1, label_index).squeeze(1) - log_normaliser.squeeze(1)
    p = logits.sub_(log_normaliser).exp_()
    # q's mass outside the draft vocabulary is variation that no draft can remove.
    outside = (1 - q.sum(-1)).clamp_(min=0)
    difference = torch.sub(p, q)
    variation = 0.5 * (torch.linalg.vector_norm(difference, ord=1, dim=-1) + outside)
    # dTV/dlogits = p * (s - <p, s>) with s = sign(p - q) / 2; dCE/dlogits = p - onehot.
    sign = difference.sign_().mul_(0.5)
    centre = torch.bmm(p[:, None], sign[:, :, None]).squeeze(1)
    ce_weight = weights * known * ce
    grad = sign.sub_(centre).mul_((tv * weights)[:, None]).add_(ce_weight[:, None]).mul_(p)
    grad.scatter_add_(1, label_index, -ce_weight[:, None])
    return _Chunk(
        ce_sum=-(log_p_label * weights * known).sum(),
        tv_sum=(variation * weights).sum(),
        accept=1 - variation,
        match=match,
        grad_logits=grad,
    )
