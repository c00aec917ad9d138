"""Verification keeps the target's law; the wrong ways of doing it are caught by the same test."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from draftline.decoding.verify import DraftedBlocks, DraftLaws, SamplingLaw, draw, law_of, verify_greedy
from draftline.decoding.verify import verify_sampled as verify_all
from tests.decoding import plain
from tests.decoding.plain import residual_law

V = 5
VOCAB = torch.tensor([0, 2, 3])
"""Target ids of the pruned draft vocabulary."""
NUM_TRIALS = 3000
ALARM = 1e-3

Verifier = Callable[[Tensor, Tensor, list[int], list[int], Tensor | None, Tensor], tuple[int, int]]


def verify_sampled(
    target_law: Tensor, draft_law: Tensor, ids: list[int], columns: list[int], vocab: Tensor | None, uniforms: Tensor
) -> tuple[int, int]:
    """One request, through the verification of many."""
    count = len(ids)
    blocks = DraftedBlocks(torch.tensor([0]), torch.tensor([ids]), torch.tensor([count]))
    draft = DraftLaws(torch.tensor([0]), torch.tensor([columns]), draft_law[None], vocab)
    accepted, following = verify_all(target_law, blocks, draft, uniforms[None, :count], uniforms[count:])
    return int(accepted), int(following)


def laws(rows: int, size: int, seed: int, spread: float = 0.5) -> Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)).mul(spread).softmax(-1)


FIRST = laws(1, V, 0)[0]
SECOND = laws(V, V, 1)
"""Law of the second token by the first."""
DRAFT = laws(2, len(VOCAB), 2, spread=1.0)


@pytest.mark.parametrize("column", range(len(VOCAB)))
def test_a_draft_is_accepted_with_the_ratio_of_the_laws(column: int) -> None:
    token = int(VOCAB[column])
    ratio = float(FIRST[token]) / float(DRAFT[0, column])

    def accepted(u: float) -> int:
        uniforms = torch.tensor([u, 0.5], dtype=torch.float64)
        both = torch.stack([FIRST, SECOND[token]])
        return verify_sampled(both, DRAFT, [token], [column], VOCAB, uniforms)[0]

    assert accepted(0.0) == 1
    assert accepted(min(ratio, 1.0) - 1e-6) == 1
    if ratio < 1:
        assert accepted(ratio + 1e-6) == 0


def test_the_accept_rate_is_one_minus_the_total_variation() -> None:
    """Exact, by bisecting each token's largest accepted uniform."""
    rate = 0.0
    for column, token in enumerate(VOCAB.tolist()):
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            uniforms = torch.tensor([middle, 0.5], dtype=torch.float64)
            both = torch.stack([FIRST, SECOND[token]])
            is_accepted = verify_sampled(both, DRAFT, [token], [column], VOCAB, uniforms)[0] == 1
            low, high = (middle, high) if is_accepted else (low, middle)
        rate += float(DRAFT[0, column]) * high
    full = torch.zeros(V).index_copy(0, VOCAB, DRAFT[0])
    assert rate == pytest.approx(1 - 0.5 * float((full - FIRST).abs().sum()), abs=1e-6)


def test_equal_laws_accept_everything() -> None:
    law = laws(4, V, 3)
    for u in (0.0, 0.5, math.nextafter(1.0, 0.0)):
        for token in range(V):
            uniforms = torch.full((4,), u, dtype=torch.float64)
            assert verify_sampled(law, law[:3], [token] * 3, [token] * 3, None, uniforms)[0] == 3


def test_an_impossible_draft_is_never_accepted() -> None:
    target = torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    accepted, following = verify_sampled(
        target, torch.tensor([[0.9, 0.1]]), [0], [0], None, torch.zeros(2, dtype=torch.float64)
    )
    assert (accepted, following) == (0, 1)


def two_tokens(verify: Verifier, random: np.random.Generator) -> tuple[int, int]:
    """The first two output tokens of one trial: a block of two, then plain draws as needed."""
    columns = [int(draw(DRAFT[k : k + 1], torch.tensor([random.random()]))[0]) for k in range(2)]
    drafted = VOCAB[columns].tolist()
    target = torch.stack([FIRST, SECOND[drafted[0]], SECOND[drafted[1]]])
    uniforms = torch.from_numpy(random.random(3))
    accepted, following = verify(target, DRAFT, drafted, columns, VOCAB, uniforms)
    output = [*drafted[:accepted], following]
    if len(output) == 1:
        output.append(int(draw(SECOND[output[0]][None], torch.tensor([random.random()]))[0]))
    return output[0], output[1]


def p_value(verify: Verifier, seed: int) -> float:
    """Chi-square of the joint law of two output tokens (25 cells) against the target's."""
    random = np.random.default_rng(seed)
    counts = np.zeros((V, V))
    for _ in range(NUM_TRIALS):
        counts[two_tokens(verify, random)] += 1
    expected = (FIRST[:, None] * SECOND).double().numpy() * NUM_TRIALS
    assert expected.min() > 5, "the chi-square approximation needs fuller cells"
    return float(chisquare(counts.ravel(), expected.ravel() * NUM_TRIALS / expected.sum()).pvalue)


def correct_from_the_target(
    target: Tensor, draft: Tensor, ids: list[int], columns: list[int], vocab: Tensor | None, uniforms: Tensor
) -> tuple[int, int]:
    """The classic mistake: at a rejection, draw from the target's law instead of the residual."""
    accepted, _ = verify_sampled(target, draft, ids, columns, vocab, uniforms)
    return accepted, int(draw(target[accepted][None], uniforms[len(ids) :])[0])


def accept_always(
    target: Tensor, draft: Tensor, ids: list[int], columns: list[int], vocab: Tensor | None, uniforms: Tensor
) -> tuple[int, int]:
    """Trust the draft."""
    return len(ids), int(draw(target[len(ids)][None], uniforms[len(ids) :])[0])


def ignore_the_mapping(
    target: Tensor, draft: Tensor, ids: list[int], columns: list[int], vocab: Tensor | None, uniforms: Tensor
) -> tuple[int, int]:
    """Subtract the draft's law at its columns instead of at the target ids they stand for."""
    padded = torch.zeros(len(draft), V)
    padded[:, : draft.shape[1]] = draft
    accepted, following = verify_sampled(target, draft, ids, columns, vocab, uniforms)
    if accepted < len(ids):
        following = int(draw(residual_law(target[accepted], padded[accepted], None)[None], uniforms[len(ids) :])[0])
    return accepted, following


def test_verified_output_follows_the_targets_law() -> None:
    """A right verifier raises this alarm for one seed in 1,000; the seed is fixed, so never by chance."""
    assert p_value(verify_sampled, seed=11) > ALARM


@pytest.mark.parametrize("verify", [correct_from_the_target, accept_always, ignore_the_mapping])
def test_wrong_verifiers_are_noticed(verify: Verifier) -> None:
    """The control: each fails the very test that the right one passes, by a wide margin."""
    assert p_value(verify, seed=11) < 1e-9


@pytest.mark.parametrize("last", [0.0, 0.5, 0.999])
def test_a_draft_stands_that_only_rounding_rejected(last: float) -> None:
    """Nothing is left of the law after the subtraction; with u = 1, which rounding may give, the draft is rejected."""
    law = laws(2, V, 4)
    assert verify_sampled(law, law[:1], [3], [3], None, torch.tensor([1.0, last], dtype=torch.float64)) == (0, 3)


@pytest.mark.parametrize(
    ("drafted", "expected"), [([], 0), ([4], 0), ([1], 1), ([1, 2, 3], 3), ([1, 9, 3], 1), ([9, 2, 3], 0)]
)
def test_greedy_keeps_the_drafts_that_are_the_likeliest(drafted: list[int], expected: int) -> None:
    best = torch.tensor([1, 2, 3, 4])
    padded = [*drafted, *[2] * (3 - len(drafted))]
    blocks = DraftedBlocks(torch.tensor([0]), torch.tensor([padded]), torch.tensor([len(drafted)]))
    accepted, following = verify_greedy(best, blocks)
    assert (int(accepted), int(following)) == (expected, expected + 1)


@pytest.mark.parametrize("kind", ["whole", "pruned", "certain"])
def test_all_requests_at_once_decide_as_one_by_one(kind: str) -> None:
    """Ragged blocks, blocks without drafts, and requests in another order than their drafts' rows."""
    random = np.random.default_rng(12)
    accepted_counts = set()
    for seed in range(60):
        counts = random.integers(0, 5, size=7).tolist()
        target = laws(sum(counts) + 7, V, seed)
        vocab = VOCAB if kind == "pruned" else None
        width = len(VOCAB) if kind == "pruned" else V
        rows = random.permutation(7)
        draft_law = laws(7 * 4, width, seed + 100, spread=1.0).view(7, 4, width)
        columns = torch.from_numpy(random.integers(0, width, size=(7, 4)))
        if kind == "certain":
            draft_law = torch.nn.functional.one_hot(columns, V).float()
        ids = columns if vocab is None else vocab[columns]
        uniforms = torch.from_numpy(random.random((7, 5)))
        first = np.cumsum([0, *(n + 1 for n in counts)])[:-1]
        blocks = DraftedBlocks(torch.from_numpy(first), ids[rows], torch.tensor(counts))
        laws_of_drafts = DraftLaws(torch.from_numpy(rows), columns, None if kind == "certain" else draft_law, vocab)
        accepted, following = verify_all(target, blocks, laws_of_drafts, uniforms[:, :4], uniforms[:, 4])
        for place, count in enumerate(counts):
            row = rows[place]
            expected = plain.verify_sampled(
                target[first[place] : first[place] + count + 1],
                draft_law[row],
                ids[row, :count].tolist(),
                columns[row, :count].tolist(),
                vocab,
                uniforms[place, [*range(count), 4]],
            )
            assert (int(accepted[place]), int(following[place])) == expected
            accepted_counts.add(expected[0])
    assert len(accepted_counts) > 2


def test_laws_of_rows_with_different_settings() -> None:
    logits = torch.randn(6, 300, generator=torch.Generator().manual_seed(9)).mul(2)
    mixed = [
        SamplingLaw(1.0),
        SamplingLaw(0.7, 0.9),
        SamplingLaw(1.3, top_k=5),
        SamplingLaw(0.4, 0.5, 40),
        SamplingLaw(1.0, 0.99, 1000),
        SamplingLaw(2.0, top_k=1),
    ]
    expected = torch.cat([law_of(logits[row : row + 1], law) for row, law in enumerate(mixed)])
    torch.testing.assert_close(law_of(logits, mixed), expected, atol=1e-7, rtol=1e-6)
    assert ((law_of(logits, mixed) > 0) == (expected > 0)).all()
    assert law_of(logits[:0], []).shape == (0, 300)


def plain_law(logits: list[float], law: SamplingLaw) -> list[float]:
    """Temperature, top-k (ties kept), top-p, straight from their definitions."""
    scaled = [x / law.temperature for x in logits]
    if law.top_k:
        kth = sorted(scaled, reverse=True)[min(law.top_k, len(scaled)) - 1]
        scaled = [x if x >= kth else -math.inf for x in scaled]
    top = max(scaled)
    mass = [math.exp(x - top) for x in scaled]
    probabilities = [m / sum(mass) for m in mass]
    kept, total = set[int](), 0.0
    for index in sorted(range(len(mass)), key=lambda i: -probabilities[i]):
        if total >= law.top_p:
            break
        kept.add(index)
        total += probabilities[index]
    return [p / total if i in kept else 0.0 for i, p in enumerate(probabilities)]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 3, 50])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.4, 1e-6])
def test_law_of_equals_the_definitions(temperature: float, top_k: int, top_p: float) -> None:
    logits = torch.randn(5, 12, generator=torch.Generator().manual_seed(5)).mul(2)
    law = SamplingLaw(temperature, top_p, top_k)
    expected = torch.tensor([plain_law(row, law) for row in logits.double().tolist()])
    torch.testing.assert_close(law_of(logits, law), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("top_p", [0.999, 0.9, 0.5])
def test_a_nucleus_wider_than_a_few_hundred_tokens(top_p: float) -> None:
    """Flat laws next to peaked ones, over more tokens than the quick way looks at."""
    logits = (
        torch.randn(6, 700, generator=torch.Generator().manual_seed(8)) * torch.tensor([0.1, 9, 1, 0.2, 4, 2])[:, None]
    )
    law = SamplingLaw(1.0, top_p)
    for rows in (logits, logits[1:2]):
        expected = torch.tensor([plain_law(row, law) for row in rows.double().tolist()])
        found = law_of(rows, law)
        # Rounding may put one token more or less at the edge of a flat nucleus.
        assert ((found > 0).sum(-1) - (expected > 0).sum(-1)).abs().max() <= 1
        torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-2)


def test_a_nucleus_without_mass_is_the_likeliest_token() -> None:
    law = law_of(torch.tensor([[1.0, 3.0, 2.0]]), SamplingLaw(1.0, top_p=1e-50))
    assert law.tolist() == [[0.0, 1.0, 0.0]]


def test_top_k_keeps_ties_of_the_kth() -> None:
    law = law_of(torch.tensor([[1.0, 2.0, 1.0, 0.0]]), SamplingLaw(1.0, top_k=2))
    assert (law > 0).tolist() == [[True, True, True, False]]


def test_draw_never_returns_an_index_without_mass() -> None:
    generator = torch.Generator().manual_seed(6)
    rows = torch.rand(200, 30, generator=generator) * (torch.rand(200, 30, generator=generator) < 0.15)
    rows[rows.sum(-1) == 0, 7] = 1.0
    rows[0] = 0.0
    rows[0, 29] = 1e-30
    for u in (0.0, 1e-300, 0.25, 0.999999, math.nextafter(1.0, 0.0), 1.0):
        index = draw(rows, torch.full((200,), u, dtype=torch.float64))
        assert (rows[torch.arange(200), index] > 0).all()


def test_draw_inverts_the_distribution_function() -> None:
    law = torch.tensor([[0.2, 0.0, 0.5, 0.3]])
    found = [int(draw(law, torch.tensor([u], dtype=torch.float64))[0]) for u in (0.0, 0.19, 0.21, 0.69, 0.71, 0.999)]
    assert found == [0, 0, 2, 2, 3, 3]
