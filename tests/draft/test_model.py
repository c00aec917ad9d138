"""Training module, serving runner and a slow independent implementation agree."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from draftline.draft.checkpoint import export_state
from draftline.draft.config import DraftConfig
from draftline.draft.model import DSparkDraft
from draftline.draft.runner import DraftRunner
from tests.draft.forward import Sequences, block_inputs, fill_slot, module_outputs, true_previous
from tests.draft.plain import PlainDraft
from tests.servers.tiny_target import random_module

BASE = DraftConfig(
    vocab_size=23,
    draft_vocab_size=23,
    hidden_size=24,
    intermediate_size=40,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    block_size=4,
    target_layer_ids=(0, 2, 3),
    num_target_layers=6,
    mask_token_id=22,
    markov_rank=5,
    markov_head="vanilla",
    enable_confidence_head=True,
    confidence_with_markov=True,
)
CONFIGS = {
    "vanilla": BASE,
    "gated": replace(BASE, markov_head="gated"),
    "rnn": replace(BASE, markov_head="rnn"),
    "rnn, no confidence": replace(BASE, markov_head="rnn", enable_confidence_head=False, confidence_with_markov=False),
    "confidence without markov": replace(BASE, confidence_with_markov=False),
    "dflash": replace(BASE, markov_rank=0, enable_confidence_head=False, confidence_with_markov=False),
    "dflash with confidence": replace(BASE, markov_rank=0, confidence_with_markov=False),
    "pruned": replace(BASE, draft_vocab_size=9),
    "one head, block of one": replace(BASE, num_kv_heads=4, block_size=1, num_layers=1),
}
TOKENS = 17
ANCHORS = (3, 9, 15)


def random_tensor(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


EMBEDDING, LM_HEAD = random_tensor(23, 24, seed=1), random_tensor(23, 24, seed=2)
TAPS = random_tensor(2, TOKENS, 3 * 24, seed=3) * torch.tensor([5.0, 0.2, 1.0]).repeat_interleave(24)
IDS = torch.randint(0, 22, (2, TOKENS + 8), generator=torch.Generator().manual_seed(4))
GIVEN = Sequences(TAPS, IDS, EMBEDDING, LM_HEAD)


def vocab_of(config: DraftConfig) -> Tensor | None:
    return torch.tensor([0, 1, 4, 5, 9, 13, 17, 20, 21]) if config.is_pruned else None


def make(config: DraftConfig) -> DSparkDraft:
    draft = random_module(config, 7, max_positions=64)
    draft.feature_scale.copy_(random_tensor(3 * 24, seed=8).abs() + 0.5)
    return draft


def plain_of(config: DraftConfig, draft: DSparkDraft) -> PlainDraft:
    state = {name: value.double().numpy() for name, value in export_state(draft, vocab_of(config)).items()}
    return PlainDraft(config.to_json(), state, EMBEDDING.double().numpy(), LM_HEAD.double().numpy())


@pytest.mark.parametrize("name", CONFIGS)
def test_the_module_equals_the_equations(name: str) -> None:
    config = CONFIGS[name]
    draft = make(config)
    logits, confidence = module_outputs(draft, GIVEN, ANCHORS, vocab_of(config), true_previous(config, IDS, ANCHORS))
    plain = plain_of(config, draft)
    assert (confidence is not None) == config.enable_confidence_head
    for sample in range(2):
        for a, anchor in enumerate(ANCHORS):
            slots = slice(a * config.block_size, (a + 1) * config.block_size)
            previous = IDS[sample, anchor : anchor + config.block_size].tolist()
            expected = plain.block(TAPS[sample].double().numpy(), anchor, int(IDS[sample, anchor]), previous)
            # fp32 sums of some 50 terms of size 1 to 10 against float64.
            np.testing.assert_allclose(logits[sample, slots], expected.logits, atol=2e-4, rtol=1e-4)
            if confidence is not None:
                np.testing.assert_allclose(confidence[sample, slots], expected.confidence, atol=2e-4, rtol=1e-4)


def make_runner(config: DraftConfig, draft: DSparkDraft) -> DraftRunner:
    return DraftRunner(config, export_state(draft, vocab_of(config)), EMBEDDING, LM_HEAD, torch.float32, 4, 40)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_the_runner_equals_the_equations(name: str, temperature: float) -> None:
    """Slots 0 and 2 of four, at different lengths; the runner's own drafts are then teacher-forced."""
    config = CONFIGS[name]
    draft = make(config)
    runner, plain = make_runner(config, draft), plain_of(config, draft)
    places = [(0, 0, 9), (2, 1, 15)]
    for slot, sample, anchor in places:
        fill_slot(runner, TAPS[sample], slot, anchor, 40)
    uniforms = torch.rand(2, config.block_size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    anchors = [int(IDS[sample, anchor]) for _, sample, anchor in places]
    proposal = runner.propose([0, 2], anchors, [9, 15], [temperature] * 2, uniforms if temperature else None)
    for row, (_, sample, anchor) in enumerate(places):
        drafted = proposal.token_ids_RB[row].tolist()
        expected = plain.block(TAPS[sample].double().numpy(), anchor, anchors[row], [anchors[row], *drafted[:-1]])
        columns = proposal.columns_RB[row].tolist()
        assert plain.targets[columns].tolist() == drafted
        if config.enable_confidence_head:
            assert proposal.confidence_RB is not None
            np.testing.assert_allclose(proposal.confidence_RB[row], expected.confidence, atol=3e-4, rtol=1e-4)
        if temperature == 0:
            assert columns == expected.logits.argmax(-1).tolist()
            assert proposal.law_RBW is None
        else:
            scaled = expected.logits / temperature
            law = np.exp(scaled - scaled.max(-1, keepdims=True))
            law /= law.sum(-1, keepdims=True)
            assert proposal.law_RBW is not None
            np.testing.assert_allclose(proposal.law_RBW[row], law, atol=3e-4)
            # Each column is where its uniform falls.
            for k, column in enumerate(columns):
                upper = law[k].cumsum()[column]
                assert upper - law[k, column] - 1e-3 <= uniforms[row, k] <= upper + 1e-3


def test_greedy_and_sampled_requests_draft_together() -> None:
    draft = make(BASE)
    runner = make_runner(BASE, draft)
    for slot, sample in ((0, 0), (1, 1), (2, 0)):
        fill_slot(runner, TAPS[sample], slot, 9, 40)
    anchors = [int(IDS[sample, 9]) for sample in (0, 1, 0)]
    uniforms = torch.rand(3, 4, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    mixed = runner.propose([0, 1, 2], anchors, [9] * 3, [0.0, 1.0, 0.0], uniforms)
    alone = runner.propose([0], anchors[:1], [9], [0.0], None)
    assert mixed.token_ids_RB[0].tolist() == mixed.token_ids_RB[2].tolist() == alone.token_ids_RB[0].tolist()


def test_a_moved_slot_proposes_the_same() -> None:
    draft = make(BASE)
    runner = make_runner(BASE, draft)
    fill_slot(runner, TAPS[1], 3, 15, 40)
    anchor = int(IDS[1, 15])
    before = runner.propose([3], [anchor], [15], [0.0], None)
    runner.move(3, 1, 15)
    after = runner.propose([1], [anchor], [15], [0.0], None)
    assert torch.equal(before.token_ids_RB, after.token_ids_RB)
    assert torch.equal(before.confidence_RB, after.confidence_RB)


def test_blocks_do_not_see_one_another_nor_what_comes_after() -> None:
    """Changing features at or after an anchor, or another block's tokens, changes nothing of its block."""
    draft = make(BASE)
    previous = true_previous(BASE, IDS, ANCHORS)
    base, _ = module_outputs(draft, GIVEN, ANCHORS, None, previous)
    inputs = block_inputs(BASE, GIVEN, ANCHORS, previous)
    taps, ids = inputs.taps_CX.clone().view(2, ANCHORS[-1], -1), inputs.block_ids_M.clone().view(2, -1)
    taps[:, ANCHORS[1] :] += 1
    ids[:, 2 * BASE.block_size] = 1
    with torch.no_grad():
        changed = draft(replace(inputs, taps_CX=taps.flatten(0, 1), block_ids_M=ids.flatten()), EMBEDDING).hidden_MD
        unchanged = draft(inputs, EMBEDDING).hidden_MD
    changed, unchanged = changed.view(2, -1, 24), unchanged.view(2, -1, 24)
    first_two = slice(0, 2 * BASE.block_size)
    torch.testing.assert_close(changed[:, first_two], unchanged[:, first_two], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(changed[:, 2 * BASE.block_size :], unchanged[:, 2 * BASE.block_size :], atol=1e-2)
    assert base.shape == (2, 12, 23)


def test_initialisation_is_a_function_of_the_generator_and_starts_without_a_bias() -> None:
    def made(seed: int) -> dict[str, Tensor]:
        draft = DSparkDraft(BASE, 64)
        draft.initialise(torch.Generator().manual_seed(seed), torch.full((24,), 1.5))
        return draft.state_dict()

    one, same, other = made(0), made(0), made(1)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["fc.weight"], other["fc.weight"])
    assert one["markov_head.markov_w2.weight"].abs().max() == 0
    assert one["norm.weight"].tolist() == [1.5] * 24
