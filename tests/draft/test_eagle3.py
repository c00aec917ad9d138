"""Eagle3: module, runner and the slow independent implementation agree; what a chain may see."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from draftline.draft.checkpoint import DraftModel, export_state, from_files, to_files
from draftline.draft.config import DraftConfig
from draftline.draft.eagle3 import ChainInputs, Eagle3Draft
from draftline.draft.eagle3_runner import Eagle3Runner
from draftline.draft.proposer import EngineRoom, ProcessedTokens
from draftline.draft.serving_vocabulary import TargetEnds
from draftline.target.rope import RopeScaling
from tests.draft.plain import PlainEagle3
from tests.draft.test_families import EAGLE3
from tests.draft.test_model import EMBEDDING, IDS, LM_HEAD, TAPS, random_tensor, vocab_of
from tests.servers.tiny_target import randomised

BASE = replace(EAGLE3, target_layer_ids=(0, 2, 3), ttt_length=4, block_size=4)
CONFIGS = {
    "qwen3": BASE,
    "llama": replace(BASE, family="llama"),
    "pruned": replace(BASE, draft_vocab_size=9),
    "one step": replace(BASE, ttt_length=1, block_size=1, num_kv_heads=4),
}
GEMMA = {
    "gemma4": replace(
        BASE,
        family="gemma4",
        has_shared_kv=True,
        logit_softcap=3.0,
        rope_scaling=RopeScaling("proportional", partial_rotary_factor=0.5),
        head_dim=8,
    ),
    "gemma3": replace(BASE, family="gemma3", query_pre_attn_scalar=20.0),
}
ANCHORS = (1, 4, 12)
NUM_POSITIONS = 40


def make(config: DraftConfig) -> Eagle3Draft:
    draft = randomised(config, 7, max_positions=64)
    assert isinstance(draft, Eagle3Draft)
    draft.feature_scale.copy_(random_tensor(3 * 24, seed=8).abs() + 0.5)
    return draft


def plain_of(config: DraftConfig, draft: Eagle3Draft) -> PlainEagle3:
    state = {name: value.double().numpy() for name, value in export_state(draft, vocab_of(config)).items()}
    return PlainEagle3(config.to_json(), state, EMBEDDING.double().numpy(), LM_HEAD.double().numpy())


def inputs_of(config: DraftConfig, length: int = 12) -> ChainInputs:
    anchors = torch.tensor([ANCHORS, ANCHORS])
    steps = torch.arange(config.ttt_length)
    chain = torch.stack([IDS[s][torch.tensor(ANCHORS)[:, None] + steps] for s in range(2)])
    return ChainInputs(TAPS[:, :length], IDS[:, 1 : length + 1], anchors, chain)


def module_logits(config: DraftConfig, draft: Eagle3Draft, inputs: ChainInputs) -> Tensor:
    vocab = vocab_of(config)
    with torch.no_grad():
        return draft(inputs, EMBEDDING) @ (LM_HEAD if vocab is None else LM_HEAD[vocab]).T


def make_runner(config: DraftConfig, draft: Eagle3Draft, num_slots: int = 4) -> Eagle3Runner:
    weights = export_state(draft, vocab_of(config))
    return Eagle3Runner(
        config, weights, TargetEnds(EMBEDDING, LM_HEAD), torch.float32, EngineRoom(num_slots, NUM_POSITIONS)
    )


def append(runner: Eagle3Runner, sample: int, slot: int, start: int, end: int) -> None:
    positions = torch.arange(start, end)
    taps = TAPS[sample, start:end].view(-1, 3, 24)
    runner.append(ProcessedTokens(IDS[sample, start:end], positions, slot * NUM_POSITIONS + positions, taps))


def fill(runner: Eagle3Runner, sample: int, slot: int, length: int) -> None:
    """In ragged parts, as an engine would."""
    for start, end in ((0, 1), (1, max(length - 2, 1)), (max(length - 2, 1), length)):
        if end > start:
            append(runner, sample, slot, start, end)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_module_equals_the_papers_chain(name: str) -> None:
    config = CONFIGS[name]
    draft = make(config)
    logits = module_logits(config, draft, inputs_of(config))
    plain = plain_of(config, draft)
    for sample in range(2):
        for a, anchor in enumerate(ANCHORS):
            fed = IDS[sample, anchor + 1 : anchor + config.ttt_length].tolist()
            expected = plain.chain(TAPS[sample].double().numpy(), IDS[sample].tolist(), anchor, fed)
            # fp32 sums of some 50 terms, a layer deeper with every step.
            np.testing.assert_allclose(logits[sample, a], expected, atol=3e-4, rtol=2e-4)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_the_runner_equals_the_papers_chain(name: str, temperature: float) -> None:
    """Slots 0 and 2 of four, at different lengths; the runner's own drafts are then teacher-forced."""
    config = CONFIGS[name]
    draft = make(config)
    runner, plain = make_runner(config, draft), plain_of(config, draft)
    places = [(0, 0, 9), (2, 1, 15)]
    for slot, sample, anchor in places:
        fill(runner, sample, slot, anchor)
    uniforms = torch.rand(2, config.block_size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    anchors = [int(IDS[sample, anchor]) for _, sample, anchor in places]
    proposal = runner.propose([0, 2], anchors, [9, 15], [temperature] * 2, uniforms if temperature else None)
    assert proposal.confidence_RB is None
    for row, (_, sample, anchor) in enumerate(places):
        drafted = proposal.token_ids_RB[row].tolist()
        expected = plain.chain(TAPS[sample].double().numpy(), IDS[sample].tolist(), anchor, drafted[:-1])
        columns = proposal.columns_RB[row].tolist()
        assert plain.targets[columns].tolist() == drafted
        if temperature == 0:
            assert columns == expected.argmax(-1).tolist()
            assert proposal.law_RBW is None
        else:
            scaled = np.exp((expected - expected.max(-1, keepdims=True)) / temperature)
            law = scaled / scaled.sum(-1, keepdims=True)
            assert proposal.law_RBW is not None
            np.testing.assert_allclose(proposal.law_RBW[row], law, atol=3e-4)


@pytest.mark.parametrize("name", [*CONFIGS, *GEMMA])
def test_module_and_runner_agree(name: str) -> None:
    config = {**CONFIGS, **GEMMA}[name]
    draft = make(config)
    runner = make_runner(config, draft)
    anchor = ANCHORS[2]
    fill(runner, 1, 3, anchor)
    uniforms = torch.rand(1, config.block_size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    proposal = runner.propose([3], [int(IDS[1, anchor])], [anchor], [1.0], uniforms)
    inputs = inputs_of(config)
    chain = inputs.chain_ids_SAB.clone()
    chain[1, 2, 1:] = proposal.token_ids_RB[0, :-1]
    logits = module_logits(config, draft, replace(inputs, chain_ids_SAB=chain))[1, 2]
    if config.logit_softcap is not None:
        logits = torch.tanh(logits / config.logit_softcap) * config.logit_softcap
    assert proposal.law_RBW is not None
    torch.testing.assert_close(proposal.law_RBW[0], logits.softmax(-1), atol=3e-4, rtol=1e-3)


def test_a_chain_sees_its_context_and_itself_alone() -> None:
    draft = make(BASE)
    inputs = inputs_of(BASE)
    before = module_logits(BASE, draft, inputs)
    taps, following, chain = inputs.taps_SCX.clone(), inputs.next_ids_SC.clone(), inputs.chain_ids_SAB.clone()
    # Rows from the second anchor's on, and the third chain's later tokens.
    taps[:, ANCHORS[1] :] += 1
    following[:, ANCHORS[1] :] = 0
    chain[:, 2, 2] += 1
    after = module_logits(BASE, draft, replace(inputs, taps_SCX=taps, next_ids_SC=following, chain_ids_SAB=chain))
    torch.testing.assert_close(after[:, :2], before[:, :2], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(after[:, 2], before[:, 2], atol=1e-2)
    # Within a chain a token changes nothing before its own step.
    chain = inputs.chain_ids_SAB.clone()
    chain[:, 2, 2] += 1
    later = module_logits(BASE, draft, replace(inputs, chain_ids_SAB=chain))
    torch.testing.assert_close(later[:, 2, :2], before[:, 2, :2], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(later[:, 2, 2:], before[:, 2, 2:], atol=1e-2)


def test_padding_of_the_context_changes_nothing() -> None:
    draft = make(BASE)
    short, long = module_logits(BASE, draft, inputs_of(BASE, 12)), module_logits(BASE, draft, inputs_of(BASE, 16))
    torch.testing.assert_close(short, long, atol=1e-5, rtol=1e-5)


def test_all_weights_get_gradients_through_all_steps() -> None:
    draft = make(BASE)
    out = draft(inputs_of(BASE), EMBEDDING)
    (out[:, :, -1] * random_tensor(2, 3, 24, seed=9)).sum().backward()
    assert {n for n, p in draft.named_parameters() if p.grad is None or p.grad.abs().max() == 0} == set()


def test_names_and_shapes_are_deepspecs() -> None:
    draft = make(replace(BASE, target_layer_ids=(0, 2, 3)))
    assert {name: list(value.shape) for name, value in export_state(draft, None).items()} == {
        "fc.weight": [24, 72],
        "layers.0.hidden_norm.weight": [24],
        "layers.0.input_layernorm.weight": [24],
        "layers.0.mlp.down_proj.weight": [24, 40],
        "layers.0.mlp.gate_proj.weight": [40, 24],
        "layers.0.mlp.up_proj.weight": [40, 24],
        "layers.0.post_attention_layernorm.weight": [24],
        "layers.0.self_attn.k_norm.weight": [6],
        "layers.0.self_attn.k_proj.weight": [12, 48],
        "layers.0.self_attn.o_proj.weight": [24, 24],
        "layers.0.self_attn.q_norm.weight": [6],
        "layers.0.self_attn.q_proj.weight": [24, 48],
        "layers.0.self_attn.v_proj.weight": [12, 48],
        "norm.weight": [24],
    }


@pytest.mark.parametrize("name", [*CONFIGS, *GEMMA])
def test_checkpoints_round_trip_to_equal_bytes(name: str) -> None:
    config = {**CONFIGS, **GEMMA}[name]
    files = to_files(DraftModel(config, export_state(make(config), vocab_of(config))))
    back = from_files(files["config.json"], files["model.safetensors"])
    assert back.config == config
    assert to_files(back) == files


def test_a_taken_over_prefix_goes_on_with_a_token_of_its_own() -> None:
    """The slot that takes over five tokens has another sixth one, so the fifth row is its own."""
    draft = make(BASE)
    mixed, alone = make_runner(BASE, draft), make_runner(BASE, draft)
    fill(mixed, 0, 3, 9)
    mixed.move(3, 1, 5)
    for runner, slot in ((mixed, 1), (alone, 1)):
        if runner is alone:
            append(runner, 0, slot, 0, 5)
        append(runner, 1, slot, 5, 8)
    anchor = int(IDS[1, 8])
    found, expected = (r.propose([1], [anchor], [8], [0.0], None) for r in (mixed, alone))
    assert torch.equal(found.token_ids_RB, expected.token_ids_RB)
    for ours, theirs in zip(mixed._cache.view(0, 1, 1, 8), alone._cache.view(0, 1, 1, 8), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_rejected_drafts_leave_no_trace() -> None:
    """Proposing twice from a place is proposing once, and what was drafted is forgotten when the text goes on."""
    draft = make(BASE)
    runner, fresh = make_runner(BASE, draft), make_runner(BASE, draft)
    fill(runner, 0, 0, 6)
    first = runner.propose([0], [int(IDS[0, 6])], [6], [0.0], None)
    again = runner.propose([0], [int(IDS[0, 6])], [6], [0.0], None)
    assert torch.equal(first.token_ids_RB, again.token_ids_RB)
    append(runner, 0, 0, 6, 8)
    fill(fresh, 0, 0, 8)
    found, expected = (r.propose([0], [int(IDS[0, 8])], [8], [0.0], None) for r in (runner, fresh))
    assert torch.equal(found.token_ids_RB, expected.token_ids_RB)
