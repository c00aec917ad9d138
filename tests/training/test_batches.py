"""A step's inputs, slot by slot against the plain rule; anchors and optimisers as pure functions."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from draftline.cache.reader import CachedSample
from draftline.draft.attention import BlockLayout
from draftline.spec import TrainSpec
from draftline.training.batches import build_draft_batch, draw_anchors, eligible_anchors, run_ends
from draftline.training.optimizers import DraftOptimizer, orthogonalise, schedule
from tests.draft.padded import padded_forward
from tests.draft.test_model import BASE, make

MASK = np.array([0, 0, 1, 1, 1, 0, 1, 0, 0, 1, 1], dtype=bool)


def sample(number: int, length: int = 11) -> CachedSample:
    generator = torch.Generator().manual_seed(number)
    mask = torch.from_numpy(np.resize(MASK, length))
    return CachedSample(
        f"s{number}",
        torch.randint(0, 20, (length,), generator=generator),
        mask,
        torch.randn(length, 3, 24, generator=generator),
        torch.randn(length, 24, generator=generator),
        torch.randn(length, generator=generator),
    )


def test_anchors_are_produced_tokens_followed_by_produced_tokens() -> None:
    assert eligible_anchors(MASK).tolist() == [2, 3, 9]
    assert eligible_anchors(np.zeros(5, dtype=bool)).tolist() == []


def test_run_ends() -> None:
    ends = run_ends(MASK)
    assert [int(ends[i]) for i in np.flatnonzero(MASK)] == [4, 4, 4, 6, 10, 10]
    assert all(ends[i] < i for i in np.flatnonzero(~MASK))


@pytest.mark.parametrize("count", [1, 3, 8])
def test_anchors_depend_on_the_seed_alone(count: int) -> None:
    one, two = draw_anchors(MASK, count, (7, 3)), draw_anchors(MASK, count, (7, 3))
    assert one.tolist() == two.tolist() == sorted(one.tolist())
    assert set(one.tolist()) <= {2, 3, 9}
    assert len(set(one.tolist())) == min(count, 3) or count > 3
    assert len({tuple(draw_anchors(MASK, 2, (7, place))) for place in range(30)}) > 1


def test_every_slot_by_the_plain_rule() -> None:
    samples = [sample(1), sample(2, 9)]
    anchors = [np.array([2, 3, 9]), np.array([2, 3])]
    columns = torch.arange(20) - 3
    columns[columns < 0] = -1
    batch = build_draft_batch(samples, anchors, BASE, columns, position_decay=4.0)
    block, inputs = BASE.block_size, batch.inputs
    expected_valid, expected, slot = [], [], 0
    for one, places in zip(samples, anchors, strict=True):
        ids, mask = one.input_ids_T.tolist(), one.loss_mask_T.tolist()
        for anchor in places.tolist():
            for k in range(block):
                position = anchor + k
                assert int(inputs.positions_M[slot]) == position
                assert int(inputs.block_ids_M[slot]) == (ids[anchor] if k == 0 else BASE.mask_token_id)
                if position + 1 < len(ids) and all(mask[anchor : position + 2]):
                    assert int(inputs.previous_ids_M[slot]) == ids[position]
                    expected_valid.append(slot)
                    expected.append((position, int(columns[ids[position + 1]]), math.exp(-k / 4.0), one))
                slot += 1
    assert batch.valid_N.tolist() == expected_valid
    assert inputs.layout == BlockLayout(block, (9, 3), ((2, 3, 9), (2, 3)))
    assert torch.equal(inputs.taps_CX, torch.cat([samples[0].taps_TLD[:9], samples[1].taps_TLD[:3]]).flatten(1))
    targets = batch.targets
    assert targets.labels_N.tolist() == [label for _, label, _, _ in expected]
    assert targets.weights_N.tolist() == pytest.approx([weight for _, _, weight, _ in expected])
    assert targets.row_N is not None
    for n, (position, _, _, one) in enumerate(expected):
        row = int(targets.row_N[n])
        assert torch.equal(targets.hidden_UD[row], one.last_hidden_TD[position])
        assert targets.log_normaliser_U[row] == one.log_normaliser_T[position]
    assert len(targets.hidden_UD) == len({(id(one), position) for position, _, _, one in expected})
    assert batch.sample_ids == ("s1", "s2")


def test_a_batch_is_a_function_of_its_samples() -> None:
    anchors = [np.array([2, 9])]
    one = build_draft_batch([sample(1)], anchors, BASE, torch.arange(20), 4.0)
    two = build_draft_batch([sample(1)], anchors, BASE, torch.arange(20), 4.0)
    assert one.inputs.layout == two.inputs.layout
    assert torch.equal(one.inputs.taps_CX, two.inputs.taps_CX)
    assert torch.equal(one.targets.hidden_UD, two.targets.hidden_UD)


def test_a_sample_without_anchors_gives_no_valid_slot() -> None:
    silent = sample(3)
    silent.loss_mask_T[:] = False
    anchors = [draw_anchors(silent.loss_mask_T.numpy(), 2, (0, 0))]
    batch = build_draft_batch([silent], anchors, BASE, torch.arange(20), 4.0)
    assert len(batch.valid_N) == len(batch.targets.labels_N) == 0
    assert len(batch.inputs.taps_CX) == 0
    draft = make(BASE)
    out = draft(batch.inputs, torch.randn(23, 24, generator=torch.Generator().manual_seed(0)))
    assert torch.isfinite(out.hidden_MD).all()
    out.hidden_MD.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in draft.parameters() if p.grad is not None)


@pytest.mark.parametrize("head", ["vanilla", "gated", "rnn"])
def test_packed_blocks_equal_padded_ones(head: str) -> None:
    """Hidden states, confidences and every parameter's gradient, in float64."""
    config = replace(BASE, markov_head=head)
    samples = [sample(1), sample(2, 9), sample(4, 40), sample(5, 40)]
    anchors = [draw_anchors(s.loss_mask_T.numpy(), 6, (1, n)) for n, s in enumerate(samples)]
    embedding = torch.randn(23, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inputs = build_draft_batch(samples, anchors, config, torch.arange(20), 4.0).inputs
    inputs = replace(inputs, taps_CX=inputs.taps_CX.double())
    draft = make(config).double()
    packed, padded = draft(inputs, embedding), padded_forward(draft, inputs, embedding)
    results = []
    for out in (packed, padded):
        factors = torch.randn(out.hidden_MD.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        total = (out.hidden_MD * factors).sum() + (out.latent_Mr**2).sum() + (out.confidence_M**2).sum()
        gradients = torch.autograd.grad(total, list(draft.parameters()), allow_unused=True)
        results.append([out.hidden_MD, out.latent_Mr, out.confidence_M, *(g for g in gradients if g is not None)])
    assert len(results[0]) == len(results[1]) > 20
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-8)


def test_schedule_warms_up_and_falls_to_nothing() -> None:
    factors = [schedule(step, 100, 0.1) for step in range(100)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == pytest.approx(1.0)
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[55] == pytest.approx(0.5)
    assert 0 < factors[-1] < 0.001
    assert schedule(0, 1, 0.0) == 1.0


@pytest.mark.parametrize("shape", [(12, 12), (30, 8), (8, 30)])
def test_orthogonalise_evens_the_singular_values(shape: tuple[int, int]) -> None:
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    before = torch.linalg.svdvals(matrix)
    after = torch.linalg.svdvals(orthogonalise(matrix))
    assert before.max() / before.min() > 1.5
    # The quintic's fixed band; it keeps singular vectors, so the inner product stays positive.
    assert after.min() > 0.6 and after.max() < 1.3
    assert (matrix * orthogonalise(matrix)).sum() > 0


def small_model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))


def take_steps(model: nn.Module, optimizer: DraftOptimizer, steps: range) -> None:
    for step in steps:
        inputs = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
        model(inputs).pow(2).sum().backward()
        optimizer.step(step)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_optimiser_state_restores_exactly(kind: str) -> None:
    spec = TrainSpec.model_validate({"optimizer": kind, "steps": 8, "weight_decay": 0.1})
    whole, first = small_model(), small_model()
    take_steps(whole, DraftOptimizer(whole, spec, 8), range(8))
    optimizer = DraftOptimizer(first, spec, 8)
    take_steps(first, optimizer, range(3))
    saved = {name: value.clone() for name, value in optimizer.state().items()}
    second = small_model()
    second.load_state_dict(first.state_dict())
    resumed = DraftOptimizer(second, spec, 8)
    resumed.load_state(saved)
    take_steps(second, resumed, range(3, 8))
    for one, other in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_gradients_are_clipped_and_their_norm_returned() -> None:
    spec = TrainSpec.model_validate({"optimizer": "adamw", "grad_clip": 0.5})
    model = small_model()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    count = sum(p.numel() for p in model.parameters())
    norm = DraftOptimizer(model, spec, 8).step(0)
    assert norm == pytest.approx(2.0 * count**0.5)
    assert all(p.grad is None for p in model.parameters())
