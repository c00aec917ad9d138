"""The distillation loss by its formulas, one row after the other, for autograd: what the chunked loss must equal."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from draftline.draft.loss import DistillationTargets


@dataclass(frozen=True)
class Problem:
    """Inputs of the loss in float64.

    Attributes:
        hidden: ``[N, D]`` draft hidden states.
        latent: ``[N, r]`` Markov latents, or ``None``.
        w2: ``[W, r]``, or ``None``.
        head: ``[W, D]``.
        targets: See :class:`DistillationTargets`.
        blocks: Block of each slot.
    """

    hidden: Tensor
    latent: Tensor | None
    w2: Tensor | None
    head: Tensor
    targets: DistillationTargets
    blocks: Tensor

    def leaves(self) -> list[Tensor]:
        """What gets a gradient."""
        found = [x for x in (self.hidden, self.latent, self.w2) if x is not None]
        for leaf in found:
            leaf.requires_grad_()
        return found

    @property
    def given(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, DistillationTargets]:
        """Positional arguments of the loss."""
        return self.hidden, self.latent, self.w2, self.head, self.targets


def make_problem(
    rows: int, seed: int, *, is_pruned: bool = False, has_markov: bool = True, is_shared: bool = False
) -> Problem:
    """Random inputs with blocks of one to five slots; ``is_shared``: slots share target positions."""
    hidden_size, vocab, outside_vocab, rank = 12, 19, 6, 5
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    head, outside = normal(vocab, hidden_size), normal(outside_vocab, hidden_size)
    row_N = torch.randint(0, rows // 2 + 1, (rows,), generator=generator) if is_shared else None
    target_hidden = normal(rows // 2 + 1 if is_shared else rows, hidden_size) * 0.7
    full = torch.cat([head, outside]) if is_pruned else head
    labels = torch.randint(-1 if is_pruned else 0, vocab, (rows,), generator=generator)
    weights = torch.rand(rows, generator=generator, dtype=torch.float64)
    weights[torch.rand(rows, generator=generator) < 0.2] = 0
    lengths = torch.randint(1, 6, (rows,), generator=generator)
    blocks = torch.repeat_interleave(torch.arange(rows), lengths)[:rows]
    return Problem(
        normal(rows, hidden_size) * 0.7,
        normal(rows, rank) if has_markov else None,
        normal(vocab, rank) * 0.5 if has_markov else None,
        head,
        DistillationTargets(target_hidden, (target_hidden @ full.T).logsumexp(-1), labels, weights, row_N),
        blocks,
    )


@dataclass(frozen=True)
class PlainTerms:
    """Differentiable sums, and per-slot facts."""

    ce: Tensor
    tv: Tensor
    kl: Tensor
    weight: Tensor
    accept: Tensor
    match: Tensor


def plain_terms(problem: Problem, dpace_alpha: float | None = None, cap: float | None = None) -> PlainTerms:
    """Row by row."""

    def scores(hidden: Tensor) -> Tensor:
        logits = problem.head @ hidden
        return logits if cap is None else cap * torch.tanh(logits / cap)

    targets = problem.targets
    surprises, variations, divergences, matches = [], [], [], []
    for n in range(len(problem.hidden)):
        logits = scores(problem.hidden[n])
        if problem.latent is not None and problem.w2 is not None:
            logits = logits + problem.w2 @ problem.latent[n]
        row = n if targets.row_N is None else int(targets.row_N[n])
        p = logits.softmax(-1)
        q = (scores(targets.hidden_UD[row]) - targets.log_normaliser_U[row]).exp()
        variations.append(0.5 * ((p - q).abs().sum() + (1 - q.sum()).clamp(min=0)))
        conditional = q / q.sum()
        divergences.append(q.sum() * (conditional * (conditional.log() - p.log())).sum())
        label = int(targets.labels_N[n])
        surprises.append(-p[label].log() if label >= 0 else None)
        matches.append(bool(p.argmax() == q.argmax()))
    weights = targets.weights_N.tolist()
    if dpace_alpha is not None:
        weights = _dpace_by_definition(surprises, weights, problem.blocks.tolist(), dpace_alpha)
    zero = problem.hidden.new_zeros(())
    ce = sum((w * s for w, s in zip(weights, surprises, strict=True) if s is not None), zero)
    tv = sum((w * v for w, v in zip(weights, variations, strict=True)), zero)
    kl = sum((w * d for w, d in zip(weights, divergences, strict=True)), zero)
    counted = {b for b, w in zip(problem.blocks.tolist(), targets.weights_N.tolist(), strict=True) if w > 0}
    weight = torch.tensor(float(len(counted)) if dpace_alpha is not None else sum(weights), dtype=torch.float64)
    return PlainTerms(ce, tv, kl, weight, 1 - torch.stack(variations).detach(), torch.tensor(matches))


def _dpace_by_definition(
    surprises: list[Tensor | None], weights: list[float], blocks: list[int], alpha: float
) -> list[float]:
    """Equation 8, slot by slot: the sum over later ends m of the product of what comes up to m."""
    found = []
    for j, block in enumerate(blocks):
        total = 0.0
        for m in range(j, len(blocks)):
            if blocks[m] != block or weights[m] == 0 or weights[j] == 0:
                continue
            chance = 1.0
            for i in range(blocks.index(block), m + 1):
                surprise = surprises[i]
                confidence = float(torch.exp(-surprise.detach())) if surprise is not None else 0.0
                chance *= (1 - alpha) * confidence + alpha if weights[i] else 1.0
            total += chance
        found.append(total)
    return found
