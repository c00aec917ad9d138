"""The distillation loss, chunked, with a hand-written backward through the frozen LM head.

L = ce * CE + tv * TV + kl * KL + confidence * BCE (paper section 3.3; KL is
an option of ours), every slot weighted by exp(-k / decay) or by D-PACE
(:mod:`draftline.draft.dpace`). Logits ``[rows, W]`` exist for one chunk of
rows at a time, in the forward only: the gradients with respect to hidden
states, Markov latents and ``markov_w2`` are accumulated there, so peak memory
does not grow with anchors x block x vocabulary.

Products run in the dtype of the LM head, everything else in at least fp32.
Terms come back as sums and counts; dividing happens once, in the loop.

Dimension letters: N slots, U target positions, D hidden, W draft vocabulary,
r Markov rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from draftline.draft.dpace import DPace, dpace_weights, num_blocks
from draftline.draft.loss_chunks import RowTerms, TargetLaws, TermWeights, product, row_terms, target_laws

CHUNK_BYTES = 96 << 20
"""Of one buffer of logits; the draft's and the target's are held at a time."""


@dataclass(frozen=True)
class DistillationTargets:
    """What the draft is trained towards, per slot.

    Attributes:
        hidden_UD: The target's last hidden state at every position that some
            slot predicts from; slots of overlapping blocks share them.
        log_normaliser_U: Log-sum-exp of the target's full-vocabulary logits there.
        labels_N: Draft-vocabulary id of the token that followed, -1 when it
            is outside the draft vocabulary.
        weights_N: Position weights, 0 for slots past the end of the answer.
        row_N: Row of ``hidden_UD`` of every slot; ``None`` when slot n has row n.
    """

    hidden_UD: Tensor
    log_normaliser_U: Tensor
    labels_N: Tensor
    weights_N: Tensor
    row_N: Tensor | None = None


@dataclass(frozen=True)
class LossTerms:
    """Sums over slots; ``objective`` alone carries gradients.

    Attributes:
        objective: ``ce * ce_sum + tv * tv_sum + kl * kl_sum``, differentiable once.
        ce_sum: Weighted cross-entropy, where the label is in the vocabulary.
        tv_sum: Weighted total variation to the target's law.
        kl_sum: Weighted KL of the target's law to the draft's; 0 where ``kl`` is 0.
        weight_sum: What the sums are divided by: the sum of all weights, or
            with D-PACE the number of blocks.
        accept_N: 1 - TV, the chance that a sampled draft token survives.
        is_greedy_match_N: Whether both argmaxes agree.
    """

    objective: Tensor
    ce_sum: Tensor
    tv_sum: Tensor
    kl_sum: Tensor
    weight_sum: Tensor
    accept_N: Tensor
    is_greedy_match_N: Tensor


@dataclass(frozen=True)
class LossOptions:
    """What is summed and how.

    Attributes:
        ce: Weight of cross-entropy in the objective.
        tv: Weight of total variation.
        kl: Weight of KL(target, draft).
        dpace: D-PACE's weights instead of ``weights_N``, of which only "more
            than 0" is then read.
        softcap: Logits that the head makes of hidden states become
            ``c * tanh(logits / c)``, the target's too (Gemma); the Markov bias
            is added after.
        count_matches: Compare argmaxes; all are reported as different without.
    """

    ce: float
    tv: float
    kl: float = 0.0
    dpace: DPace | None = None
    softcap: float | None = None
    count_matches: bool = True


def distillation_loss(
    hidden_ND: Tensor,
    latent_Nr: Tensor | None,
    markov_w2_Wr: Tensor | None,
    head_WD: Tensor,
    targets: DistillationTargets,
    options: LossOptions,
) -> LossTerms:
    """Cross-entropy, total variation and KL of draft logits to the target's law.

    Args:
        hidden_ND: Draft hidden states after the final norm.
        latent_Nr: Markov latents, or ``None`` without a sequential head.
        markov_w2_Wr: Their map to the draft vocabulary.
        head_WD: The target's LM head rows of the draft vocabulary; frozen.
        targets: See :class:`DistillationTargets`. With a pruned vocabulary the
            target's mass outside it counts as lost (it can never be drafted).
        options: See :class:`LossOptions`.
    """
    inputs = (hidden_ND, latent_Nr, markov_w2_Wr)
    wants_gradient = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    objective, ce_sum, tv_sum, kl_sum, accept, match = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        *inputs, head_WD, targets, options, wants_gradient
    )
    dpace = options.dpace
    weight = targets.weights_N.sum() if dpace is None else num_blocks(targets.weights_N > 0, dpace.block_N)
    return LossTerms(objective, ce_sum, tv_sum, kl_sum, weight, accept, match)


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
        options: LossOptions,
        wants_gradient: bool,
    ) -> tuple[Tensor, ...]:
        # Autocast would round the products' results and the gradients' accumulators.
        with torch.autocast(hidden.device.type, enabled=False):
            run = _Run(hidden, latent, w2, head, targets, options, wants_gradient)
            for part in run.chunks():
                run.add(part)
        ctx.gradients = run.gradients
        ce, tv, kl = (value.clone() for value in run.sums)
        ctx.mark_non_differentiable(ce, tv, kl, run.accept, run.match)
        return options.ce * ce + options.tv * tv + options.kl * kl, ce, tv, kl, run.accept, run.match

    @staticmethod
    def backward(ctx: Any, grad_objective: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # Scaled in place and handed over: a copy of the gradient of markov_w2 is as large as markov_w2.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the chunked loss is differentiable once; compute it again for a second backward")
        return (*(None if g is None else g.mul_(grad_objective) for g in gradients), None, None, None, None)


class _Run:
    """Accumulates terms and gradients over chunks."""

    def __init__(
        self,
        hidden: Tensor,
        latent: Tensor | None,
        w2: Tensor | None,
        head: Tensor,
        targets: DistillationTargets,
        options: LossOptions,
        wants_gradient: bool,
    ) -> None:
        self._hidden, self._latent, self._w2, self._head = hidden, latent, w2, head
        self._targets, self._options = targets, options
        self._weights_of_terms = TermWeights(options.ce, options.tv, options.kl)
        self._dtype = torch.promote_types(head.dtype, torch.float32)
        rows = hidden.shape[0]
        self.sums = hidden.new_zeros(3, dtype=self._dtype)
        self.accept = hidden.new_empty(rows, dtype=self._dtype)
        self.match = torch.zeros(rows, dtype=torch.bool, device=hidden.device)
        self.gradients = (
            torch.empty_like(hidden) if wants_gradient else None,
            torch.empty_like(latent) if wants_gradient and latent is not None else None,
            torch.zeros_like(w2) if wants_gradient and w2 is not None else None,
        )

    def chunks(self) -> Iterator[slice]:
        """Rows that fit ``CHUNK_BYTES``; with D-PACE, whole blocks of them."""
        rows = self._hidden.shape[0]
        size = chunk_rows(self._head.shape[0], self._dtype)
        first = 0
        while first < rows:
            last = min(first + size, rows)
            if self._options.dpace is not None and last < rows:
                last = _block_start(self._options.dpace.block_N, first, last)
            yield slice(first, last)
            first = last

    def add(self, part: slice) -> None:
        """Take one chunk through."""
        wants_gradient = self.gradients[0] is not None
        logits = self._product(self._hidden[part], self._head)
        slope = _cap(logits, self._options.softcap) if self._options.softcap else None
        if self._latent is not None and self._w2 is not None:
            logits += self._product(self._latent[part], self._w2)
        laws = self._laws(part, logits)
        labels = self._targets.labels_N[part]
        terms = row_terms(logits, laws, labels, self._weights_of_terms, with_gradient=wants_gradient)
        weights = self._weights(part, terms)
        weighted = weights * (labels >= 0)
        self.sums += torch.stack(
            [(terms.surprise_R * weighted).sum(), terms.variation_R @ weights, terms.divergence_R @ weights]
        )
        self.accept[part] = 1 - terms.variation_R
        if wants_gradient:
            self._add_gradients(part, logits, slope, weights)

    def _laws(self, part: slice, logits: Tensor) -> TargetLaws:
        targets = self._targets
        if targets.row_N is None:
            inverse = None
            hidden, normaliser = targets.hidden_UD[part], targets.log_normaliser_U[part]
        else:
            used, inverse = torch.unique(targets.row_N[part], return_inverse=True)
            hidden, normaliser = targets.hidden_UD[used], targets.log_normaliser_U[used]
        target_logits = self._product(hidden, self._head)
        if self._options.softcap:
            _cap(target_logits, self._options.softcap)
        if self._options.count_matches:
            best = target_logits.argmax(-1)
            self.match[part] = logits.argmax(-1) == (best if inverse is None else best[inverse])
        has_kl = self._options.kl > 0
        return target_laws(target_logits, normaliser.to(self._dtype), inverse, with_information=has_kl)

    def _weights(self, part: slice, terms: RowTerms) -> Tensor:
        weights = self._targets.weights_N[part].to(self._dtype)
        dpace = self._options.dpace
        if dpace is None:
            return weights
        confidence = torch.exp(-terms.surprise_R) * (self._targets.labels_N[part] >= 0)
        return dpace_weights(confidence, weights > 0, dpace.block_N[part], dpace.alpha)

    def _add_gradients(self, part: slice, gradient: Tensor, slope: Tensor | None, weights: Tensor) -> None:
        # Position weights scale rows, so they can wait until after the product, where a row is D wide, not W.
        to_hidden, to_latent, to_w2 = self.gradients
        assert to_hidden is not None
        # Rounded once for all products, and only there: markov_w2 gets a sum over all slots.
        rounded = gradient.to(self._head.dtype)
        if to_latent is not None and to_w2 is not None and self._latent is not None and self._w2 is not None:
            to_latent[part] = self._product(rounded, self._w2.t()) * weights[:, None]
            latent = self._latent[part].to(self._dtype) * weights[:, None]
            to_w2.addmm_(gradient.t().to(to_w2.dtype), latent.to(to_w2.dtype))
        if slope is not None:
            rounded = gradient.mul_(slope).to(self._head.dtype)
        to_hidden[part] = self._product(rounded, self._head.t()) * weights[:, None]

    def _product(self, rows: Tensor, weight: Tensor) -> Tensor:
        dtype = self._head.dtype
        return product(rows.to(dtype), weight.to(dtype)).to(self._dtype)


def chunk_rows(vocab_size: int, dtype: torch.dtype) -> int:
    """Rows of logits in a buffer of ``CHUNK_BYTES``."""
    return max(1, CHUNK_BYTES // (vocab_size * dtype.itemsize))


def _cap(logits: Tensor, cap: float) -> Tensor:
    """Soft-cap in place; returns the slope, ``1 - tanh(logits / cap) ** 2``."""
    tanh = logits.div_(cap).tanh_()
    slope = 1 - tanh.square()
    tanh.mul_(cap)
    return slope


def _block_start(block_N: Tensor, first: int, last: int) -> int:
    """The last place up to ``last`` at which a block starts; past ``last`` if one block is longer than a chunk."""
    starts = block_N[first + 1 :] != block_N[first:-1]
    places = torch.nonzero(starts).flatten() + first + 1
    before = places[places <= last]
    if len(before):
        return int(before[-1])
    return int(places[0]) if len(places) else len(block_N)
