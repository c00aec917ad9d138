"""The chunked loss with its hand-written backward against autograd of the plain formulas, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from draftline.draft import loss as loss_module
from draftline.draft import loss_chunks
from draftline.draft.dpace import DPace, dpace_weights
from draftline.draft.loss import DistillationTargets, LossOptions, chunk_rows, confidence_loss, distillation_loss
from tests.draft.plain_loss import Problem, make_problem, plain_terms

CLOSE = {"atol": 1e-10, "rtol": 1e-8}


def small_chunks(monkeypatch: pytest.MonkeyPatch, problem: Problem) -> None:
    """Chunks of 8 rows, passes of 3."""
    row_bytes = problem.head.shape[0] * 8
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 8 * row_bytes)
    monkeypatch.setattr(loss_chunks, "PASS_BYTES", 3 * row_bytes)
    assert chunk_rows(problem.head.shape[0], torch.float64) == 8


@pytest.mark.parametrize("rows", [1, 9, 40])
@pytest.mark.parametrize("is_pruned", [False, True])
@pytest.mark.parametrize("has_markov", [True, False])
@pytest.mark.parametrize("is_shared", [True, False])
@pytest.mark.parametrize("alpha", [None, 0.5])
@pytest.mark.parametrize(("ce", "tv", "kl"), [(0.1, 0.9, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0.2, 0.5, 0.3)])
def test_values_and_gradients_equal_autograd(
    rows: int,
    is_pruned: bool,
    has_markov: bool,
    is_shared: bool,
    alpha: float | None,
    ce: float,
    tv: float,
    kl: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem = make_problem(rows, rows, is_pruned=is_pruned, has_markov=has_markov, is_shared=is_shared)
    small_chunks(monkeypatch, problem)
    leaves = problem.leaves()
    dpace = DPace(problem.blocks, alpha) if alpha is not None else None
    terms = distillation_loss(*problem.given, LossOptions(ce=ce, tv=tv, kl=kl, dpace=dpace))
    # A factor, because the chain rule must reach the stored gradients.
    found = torch.autograd.grad(terms.objective * 3.0, leaves)
    plain = plain_terms(problem, alpha)
    objective = ce * plain.ce + tv * plain.tv + kl * plain.kl
    expected = torch.autograd.grad(objective * 3.0, leaves)
    torch.testing.assert_close(terms.objective, objective, **CLOSE)
    torch.testing.assert_close(terms.ce_sum, plain.ce.detach(), **CLOSE)
    torch.testing.assert_close(terms.tv_sum, plain.tv.detach(), **CLOSE)
    torch.testing.assert_close(terms.kl_sum, plain.kl.detach() if kl else torch.zeros_like(terms.kl_sum), **CLOSE)
    torch.testing.assert_close(terms.weight_sum.double(), plain.weight, **CLOSE)
    torch.testing.assert_close(terms.accept_N, plain.accept, **CLOSE)
    assert torch.equal(terms.is_greedy_match_N, plain.match)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


@pytest.mark.parametrize("has_markov", [True, False])
@pytest.mark.parametrize("alpha", [None, 0.5])
def test_capped_logits_equal_autograd(has_markov: bool, alpha: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma's soft cap, tight enough to bend these logits; the normaliser is that of capped logits."""
    problem = make_problem(30, 4, has_markov=has_markov, is_shared=True)
    targets = problem.targets
    capped = 1.5 * torch.tanh(targets.hidden_UD @ problem.head.T / 1.5)
    problem = replace(problem, targets=replace(targets, log_normaliser_U=capped.logsumexp(-1)))
    small_chunks(monkeypatch, problem)
    leaves = problem.leaves()
    dpace = DPace(problem.blocks, alpha) if alpha is not None else None
    terms = distillation_loss(*problem.given, LossOptions(ce=0.2, tv=0.5, kl=0.3, dpace=dpace, softcap=1.5))
    plain = plain_terms(problem, alpha, 1.5)
    found = torch.autograd.grad(terms.objective, leaves)
    expected = torch.autograd.grad(0.2 * plain.ce + 0.5 * plain.tv + 0.3 * plain.kl, leaves)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
    torch.testing.assert_close(terms.accept_N, plain.accept, **CLOSE)


def test_without_gradients_the_terms_are_the_same() -> None:
    problem = make_problem(20, 5, is_pruned=True, is_shared=True)
    problem.leaves()
    with_gradient = distillation_loss(*problem.given, LossOptions(ce=0.3, tv=0.7, kl=0.1))
    with torch.no_grad():
        without = distillation_loss(*problem.given, LossOptions(ce=0.3, tv=0.7, kl=0.1))
    assert with_gradient.objective.requires_grad and not without.objective.requires_grad
    for name in ("objective", "ce_sum", "tv_sum", "kl_sum", "accept_N"):
        assert torch.equal(getattr(with_gradient, name).detach(), getattr(without, name))


@pytest.mark.parametrize("alpha", [None, 0.5])
def test_fp32_and_bf16_products_stay_near_float64(alpha: float | None) -> None:
    """fp32 within its round-off; bf16 within a few of its steps of 2**-8, as products of 12 terms leave them."""
    exact = make_problem(60, 7, is_pruned=True, is_shared=True)
    dpace = DPace(exact.blocks, alpha) if alpha is not None else None
    leaves = exact.leaves()
    expected = torch.autograd.grad(
        distillation_loss(*exact.given, LossOptions(ce=0.1, tv=0.9, kl=0.2, dpace=dpace)).objective, leaves
    )
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        targets = exact.targets
        rough = replace(
            exact,
            hidden=exact.hidden.detach().float(),
            latent=exact.latent.detach().float() if exact.latent is not None else None,
            w2=exact.w2.detach().float() if exact.w2 is not None else None,
            head=exact.head.to(dtype),
            targets=DistillationTargets(
                targets.hidden_UD.float(),
                targets.log_normaliser_U.float(),
                targets.labels_N,
                targets.weights_N.float(),
                targets.row_N,
            ),
        )
        leaves = rough.leaves()
        terms = distillation_loss(*rough.given, LossOptions(ce=0.1, tv=0.9, kl=0.2, dpace=dpace))
        assert terms.objective.dtype == torch.float32
        for one, other in zip(torch.autograd.grad(terms.objective, leaves), expected, strict=True):
            assert one.dtype == torch.float32
            assert (one - other).norm() < bound * other.norm()


def test_more_rows_than_a_chunk_of_the_real_size(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(600, 0, is_pruned=True)
    leaves = problem.leaves()
    whole = torch.autograd.grad(distillation_loss(*problem.given, LossOptions(ce=0.3, tv=0.7)).objective, leaves)
    small_chunks(monkeypatch, problem)
    parts = torch.autograd.grad(distillation_loss(*problem.given, LossOptions(ce=0.3, tv=0.7)).objective, leaves)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


def test_the_targets_own_law_loses_nothing() -> None:
    problem = make_problem(30, 1)
    targets = problem.targets
    terms = distillation_loss(targets.hidden_UD, None, None, problem.head, targets, LossOptions(ce=1.0, tv=1.0, kl=1.0))
    assert float(terms.tv_sum) == pytest.approx(0, abs=1e-12)
    assert float(terms.kl_sum) == pytest.approx(0, abs=1e-12)
    assert terms.accept_N.min() == pytest.approx(1)
    assert terms.is_greedy_match_N.all()


def test_slots_without_weight_count_for_nothing() -> None:
    problem = make_problem(20, 2)
    targets, keep = problem.targets, problem.targets.weights_N > 0
    assert 0 < keep.sum() < 20
    kept = DistillationTargets(
        targets.hidden_UD[keep], targets.log_normaliser_U[keep], targets.labels_N[keep], targets.weights_N[keep]
    )
    assert problem.latent is not None
    one = distillation_loss(*problem.given, LossOptions(ce=0.5, tv=0.5))
    other = distillation_loss(
        problem.hidden[keep], problem.latent[keep], problem.w2, problem.head, kept, LossOptions(ce=0.5, tv=0.5)
    )
    torch.testing.assert_close(one.objective, other.objective)


def test_no_slot_at_all() -> None:
    problem = make_problem(1, 0)
    targets = problem.targets
    none = DistillationTargets(
        targets.hidden_UD[:0], targets.log_normaliser_U[:0], targets.labels_N[:0], targets.weights_N[:0]
    )
    hidden = problem.hidden[:0].requires_grad_()
    for dpace in (None, DPace(problem.blocks[:0], 0.5)):
        terms = distillation_loss(hidden, None, None, problem.head, none, LossOptions(ce=0.5, tv=0.5, dpace=dpace))
        assert float(terms.objective.detach()) == float(terms.weight_sum) == 0
        assert torch.autograd.grad(terms.objective, hidden)[0].shape == hidden.shape


def test_a_second_backward_is_refused() -> None:
    problem = make_problem(3, 0)
    leaves = problem.leaves()
    terms = distillation_loss(*problem.given, LossOptions(ce=0.5, tv=0.5))
    torch.autograd.grad(terms.objective, leaves, retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(terms.objective, leaves)


def test_dpace_weights_of_a_block_worked_by_hand() -> None:
    """Two blocks; alpha 0.5 smooths 0.8, 0.5 and 0 to 0.9, 0.75 and 0.5."""
    confidence = torch.tensor([0.8, 0.5, 0.0, 0.5])
    counted = torch.tensor([True, True, True, True])
    weights = dpace_weights(confidence, counted, torch.tensor([4, 4, 4, 9]), 0.5)
    first, second, third = 0.9, 0.9 * 0.75, 0.9 * 0.75 * 0.5
    assert weights.tolist() == pytest.approx([first + second + third, second + third, third, 0.75])
    counted[1] = False
    weights = dpace_weights(confidence, counted, torch.tensor([4, 4, 4, 9]), 0.5)
    assert weights.tolist() == pytest.approx([0.9 + 0.45, 0, 0.45, 0.75])


def test_dpace_is_the_gradient_of_expected_accepted_length() -> None:
    """Without smoothing, w_j is d E[length] / d log q_j: the reason for the weights (section 3 of the paper)."""
    log_q = torch.tensor([-0.2, -0.7, -0.1, -1.5], dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(log_q.exp().cumprod(0).sum(), log_q)
    found = dpace_weights(log_q.detach().exp(), torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.long), 0.0)
    torch.testing.assert_close(found, expected)


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
    problem = make_problem(5, 3)
    problem.leaves()
    terms = distillation_loss(*problem.given, LossOptions(ce=0.5, tv=0.5))
    assert terms.objective.requires_grad
    for name in ("ce_sum", "tv_sum", "kl_sum", "accept_N", "is_greedy_match_N"):
        assert not getattr(terms, name).requires_grad
