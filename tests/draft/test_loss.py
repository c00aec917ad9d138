"""The chunked loss with its hand-written backward against autograd of the plain formulas, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from draftline.draft import loss as loss_module
from draftline.draft.loss import DistillationTargets, LossTerms, confidence_loss, distillation_loss

HIDDEN, VOCAB, OUTSIDE, RANK = 12, 19, 6, 5


def problem(rows: int, seed: int, *, is_pruned: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, DistillationTargets]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    head, outside = normal(VOCAB, HIDDEN), normal(OUTSIDE, HIDDEN)
    target_hidden = normal(rows, HIDDEN) * 0.7
    full = torch.cat([head, outside]) if is_pruned else head
    labels = torch.randint(-1 if is_pruned else 0, VOCAB, (rows,), generator=generator)
    weights = torch.rand(rows, generator=generator, dtype=torch.float64)
    weights[torch.rand(rows, generator=generator) < 0.2] = 0
    targets = DistillationTargets(target_hidden, (target_hidden @ full.T).logsumexp(-1), labels, weights)
    return normal(rows, HIDDEN) * 0.7, normal(rows, RANK), normal(VOCAB, RANK) * 0.5, head, targets


def plain(
    hidden: Tensor, latent: Tensor | None, w2: Tensor | None, head: Tensor, targets: DistillationTargets
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums of CE and TV, acceptance and greedy match, one row after the other."""
    ce, tv = hidden.new_zeros(()), hidden.new_zeros(())
    accepts, matches = [], []
    for n in range(len(hidden)):
        logits = head @ hidden[n]
        if latent is not None and w2 is not None:
            logits = logits + w2 @ latent[n]
        p = logits.softmax(-1)
        q = (head @ targets.hidden_ND[n] - targets.log_normaliser_N[n]).exp()
        variation = 0.5 * ((p - q).abs().sum() + (1 - q.sum()).clamp(min=0))
        weight = targets.weights_N[n]
        tv = tv + weight * variation
        if targets.labels_N[n] >= 0:
            ce = ce - weight * p[targets.labels_N[n]].log()
        accepts.append(1 - variation)
        matches.append(bool(p.argmax() == q.argmax()))
    return ce, tv, torch.stack(accepts).detach(), torch.tensor(matches)


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 40])
@pytest.mark.parametrize("is_pruned", [False, True])
@pytest.mark.parametrize("has_markov", [True, False])
@pytest.mark.parametrize(("ce", "tv"), [(0.1, 0.9), (1.0, 0.0), (0.0, 1.0)])
def test_values_and_gradients_equal_autograd(
    rows: int, is_pruned: bool, has_markov: bool, ce: float, tv: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_ROWS", 8)
    hidden, latent, w2, head, targets = problem(rows, rows, is_pruned=is_pruned)
    leaves = [hidden, latent, w2] if has_markov else [hidden]
    for leaf in leaves:
        leaf.requires_grad_()
    given = (hidden, latent, w2) if has_markov else (hidden, None, None)
    terms = distillation_loss(*given, head, targets, ce=ce, tv=tv)
    # A factor, because the chain rule must reach the stored gradients.
    found = torch.autograd.grad(terms.objective * 3.0, leaves)
    ce_sum, tv_sum, accept, match = plain(*given, head, targets)
    expected = torch.autograd.grad((ce * ce_sum + tv * tv_sum) * 3.0, leaves)
    close = {"atol": 1e-10, "rtol": 1e-8}
    torch.testing.assert_close(terms.objective, ce * ce_sum + tv * tv_sum, **close)
    torch.testing.assert_close(terms.ce_sum, ce_sum.detach(), **close)
    torch.testing.assert_close(terms.tv_sum, tv_sum.detach(), **close)
    torch.testing.assert_close(terms.weight_sum, targets.weights_N.sum(), **close)
    torch.testing.assert_close(terms.accept_N, accept, **close)
    assert torch.equal(terms.is_greedy_match_N, match)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **close)


def test_more_rows_than_a_real_chunk() -> None:
    rows = loss_module.CHUNK_ROWS + 3
    hidden, latent, w2, head, targets = problem(rows, 0, is_pruned=True)
    hidden.requires_grad_()
    terms = distillation_loss(hidden, latent, w2, head, targets, ce=0.3, tv=0.7)
    ce_sum, tv_sum, _, _ = plain(hidden, latent, w2, head, targets)
    (found,) = torch.autograd.grad(terms.objective, hidden)
    (expected,) = torch.autograd.grad(0.3 * ce_sum + 0.7 * tv_sum, hidden)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-8)


def test_the_targets_own_law_loses_nothing() -> None:
    _, _, _, head, targets = problem(30, 1, is_pruned=False)
    terms = distillation_loss(targets.hidden_ND, None, None, head, targets, ce=1.0, tv=1.0)
    assert float(terms.tv_sum) == pytest.approx(0, abs=1e-12)
    assert terms.accept_N.min() == pytest.approx(1)
    assert terms.is_greedy_match_N.all()


def test_slots_without_weight_count_for_nothing() -> None:
    hidden, latent, w2, head, targets = problem(20, 2, is_pruned=False)
    keep = targets.weights_N > 0
    assert 0 < keep.sum() < 20
    kept = DistillationTargets(
        targets.hidden_ND[keep], targets.log_normaliser_N[keep], targets.labels_N[keep], targets.weights_N[keep]
    )
    one = distillation_loss(hidden, latent, w2, head, targets, ce=0.5, tv=0.5)
    other = distillation_loss(hidden[keep], latent[keep], w2, head, kept, ce=0.5, tv=0.5)
    torch.testing.assert_close(one.objective, other.objective)


def test_confidence_loss_is_weighted_binary_cross_entropy() -> None:
    logits = torch.tensor([0.3, -2.0, 5.0], requires_grad=True)
    accept, weights = torch.tensor([0.25, 1.0, -1e-9]), torch.tensor([1.0, 0.5, 0.0])
    value = confidence_loss(logits, accept, weights)
    p = torch.sigmoid(logits.detach())
    expected = -(0.25 * p[0].log() + 0.75 * (1 - p[0]).log()) - 0.5 * p[1].log()
    assert float(value.detach()) == pytest.approx(float(expected), rel=1e-6)
    (gradient,) = torch.autograd.grad(value, logits)
    torch.testing.assert_close(gradient, (p - accept.clamp(0, 1)) * weights)


def test_terms_are_detached_but_for_the_objective() -> None:
    hidden, latent, w2, head, targets = problem(5, 3, is_pruned=False)
    terms: LossTerms = distillation_loss(hidden.requires_grad_(), latent, w2, head, targets, ce=0.5, tv=0.5)
    assert terms.objective.requires_grad
    assert not terms.accept_N.requires_grad and not terms.is_greedy_match_N.requires_grad
