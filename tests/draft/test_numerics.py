"""Logits and confidence logits of drafts for a tiny Qwen3 target, against the papers' equations in plain loops.

The target is transformers' own Qwen3; the draft is random, is written as a
checkpoint, and the plain implementation (:mod:`tests.draft.plain`) reads that
checkpoint with numpy and nothing of Draftline.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from typing import TypeVar

import numpy as np
import pytest
import torch
from safetensors.numpy import load as load_numpy
from transformers import Qwen3Config, Qwen3ForCausalLM

from draftline.draft.checkpoint import CONFIG_FILE, WEIGHTS_FILE, DraftModel, export_state, from_files, to_files
from draftline.draft.config import DraftConfig
from draftline.draft.eagle3 import ChainInputs, Eagle3Draft
from draftline.draft.model import DSparkDraft
from draftline.draft.proposer import EngineRoom, ProcessedTokens
from draftline.draft.runner import DraftRunner
from draftline.draft.serve import proposer_between
from draftline.draft.serving_vocabulary import TargetEnds
from tests.draft.forward import Sequences, fill_slot, module_outputs, true_previous
from tests.draft.plain import Array, PlainDraft, PlainEagle3
from tests.draft.test_model import BASE
from tests.servers.tiny_target import random_module, randomised

VOCAB, HIDDEN, LAYERS, TOKENS = 61, 32, 6, 20
TAP_IDS = (0, 2, 4)
ANCHORS = (2, 9, 17)
KEPT = torch.tensor([0, 1, 4, 5, 9, 13, 17, 20, 21, 34, 40, 41, 59, 60])

ROUNDING = 2.0**-24
"""Half a unit in the last place of fp32, relative to the number."""

TOLERANCES = {
    # Greatest difference, as a multiple of ROUNDING times the greatest expected magnitude.
    #
    # A logit ends a chain of some twelve matrix products (projection, two layers of five, head) of 7 to 96 terms, each
    # between numbers that fp32 has rounded. Independent roundings add up as their root: sqrt(12 * 48) = 24.
    # Seen: 18 at most.
    "logits": 64,
    # The same chain; one more product of 32 or 39 terms instead of the head. Terms cancel, so the sum is smaller than
    # the terms whose roundings it keeps. Seen: 15 at most.
    "confidence": 64,
    # The chain, then a softmax and a logarithm, whose errors are absolute: a unit or two in the last place of the
    # logits. Seen: 7 at most, as the magnitude is that of the least likely token.
    "log law": 64,
}

QWEN3 = replace(
    BASE,
    vocab_size=VOCAB,
    draft_vocab_size=VOCAB,
    hidden_size=HIDDEN,
    intermediate_size=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    target_layer_ids=TAP_IDS,
    num_target_layers=LAYERS,
    mask_token_id=VOCAB - 1,
    markov_rank=7,
)
HEADS = {
    "vanilla": replace(QWEN3, markov_head="vanilla"),
    "gated": replace(QWEN3, markov_head="gated"),
    "rnn": replace(QWEN3, markov_head="rnn"),
    "dflash": replace(QWEN3, markov_rank=0, enable_confidence_head=False, confidence_with_markov=False),
}
CASES = {
    **HEADS,
    **{f"{name}, pruned": replace(config, draft_vocab_size=len(KEPT)) for name, config in HEADS.items()},
    **{
        f"{name}, confidence without markov": replace(config, confidence_with_markov=False)
        for name, config in HEADS.items()
        if config.markov_rank
    },
    "vanilla, no confidence": replace(QWEN3, enable_confidence_head=False, confidence_with_markov=False),
    "dflash, confidence": replace(HEADS["dflash"], enable_confidence_head=True),
}
EAGLE3 = replace(
    QWEN3,
    num_layers=1,
    mask_token_id=0,
    markov_rank=0,
    enable_confidence_head=False,
    confidence_with_markov=False,
    ttt_length=4,
    ttt_decay=0.8,
)
EAGLE3_CASES = {
    "eagle3": EAGLE3,
    "eagle3, pruned": replace(EAGLE3, draft_vocab_size=len(KEPT)),
    "eagle3, llama": replace(EAGLE3, family="llama"),
}


@cache
def qwen3_sequences() -> Sequences:
    """Two random sequences through a random Qwen3."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=VOCAB,
                hidden_size=HIDDEN,
                intermediate_size=64,
                num_hidden_layers=LAYERS,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=8,
                initializer_range=0.2,
                tie_word_embeddings=False,
            )
        ).eval()
        ids = torch.randint(0, VOCAB - 1, (2, TOKENS + QWEN3.block_size))
        with torch.no_grad():
            # The embeddings are the first hidden state, so layer i's output is hidden state i + 1.
            hidden = model(ids[:, :TOKENS], output_hidden_states=True).hidden_states
    taps = torch.cat([hidden[i + 1] for i in TAP_IDS], -1)
    return Sequences(taps, ids, model.model.embed_tokens.weight.detach(), model.lm_head.weight.detach())


def vocab_of(config: DraftConfig) -> torch.Tensor | None:
    return KEPT if config.is_pruned else None


def make(config: DraftConfig) -> tuple[DSparkDraft, dict[str, bytes]]:
    """A random draft with a scale on its features, and its checkpoint."""
    draft = random_module(config, 7, max_positions=64)
    draft.feature_scale.copy_(torch.rand(len(draft.feature_scale), generator=torch.Generator().manual_seed(8)) + 0.5)
    return draft, to_files(DraftModel(config, export_state(draft, vocab_of(config))))


Plain = TypeVar("Plain", PlainDraft, PlainEagle3)


def plain_of(kind: type[Plain], files: dict[str, bytes]) -> Plain:
    """The plain implementation of a checkpoint."""
    given = qwen3_sequences()
    state = {name: value.astype(np.float64) for name, value in load_numpy(files[WEIGHTS_FILE]).items()}
    embedding, head = given.embedding_VD.double().numpy(), given.lm_head_VD.double().numpy()
    return kind(json.loads(files[CONFIG_FILE]), state, embedding, head)


class Differences:
    """Collects what is compared, by kind."""

    def __init__(self) -> None:
        self.pairs: dict[str, list[tuple[Array, Array]]] = {}

    def add(self, kind: str, got: torch.Tensor | None, expected: Array | None) -> None:
        assert got is not None and expected is not None
        self.pairs.setdefault(kind, []).append((got.double().numpy(), expected))

    def in_roundings(self, kind: str) -> float:
        """Greatest difference over all that was collected, relative to the greatest magnitude."""
        got, expected = (np.concatenate([pair[side] for pair in self.pairs[kind]]) for side in (0, 1))
        assert got.shape == expected.shape
        return float(np.abs(got - expected).max() / np.abs(expected).max() / ROUNDING)

    def check(self, *kinds: str) -> None:
        assert set(self.pairs) == set(kinds)
        for kind in kinds:
            assert self.in_roundings(kind) <= TOLERANCES[kind], kind


def module_differences(config: DraftConfig, draft: DSparkDraft, plain: PlainDraft) -> Differences:
    """The training module on every anchor of both sequences, teacher forced."""
    given, found = qwen3_sequences(), Differences()
    previous = true_previous(config, given.ids_SN, ANCHORS)
    logits, confidence = module_outputs(draft, given, ANCHORS, vocab_of(config), previous)
    for sample in range(2):
        taps, ids = given.taps_STX[sample].double().numpy(), given.ids_SN[sample].tolist()
        for a, anchor in enumerate(ANCHORS):
            slots = slice(a * config.block_size, (a + 1) * config.block_size)
            expected = plain.block(taps, anchor, ids[anchor], ids[anchor : anchor + config.block_size])
            found.add("logits", logits[sample, slots], expected.logits)
            if confidence is not None:
                found.add("confidence", confidence[sample, slots], expected.confidence)
    return found


def kinds_of(config: DraftConfig, first: str) -> list[str]:
    return [first, "confidence"] if config.enable_confidence_head else [first]


@pytest.mark.parametrize("name", CASES)
def test_the_training_module_equals_the_equations(name: str) -> None:
    config = CASES[name]
    draft, files = make(config)
    module_differences(config, draft, plain_of(PlainDraft, files)).check(*kinds_of(config, "logits"))


@pytest.mark.parametrize("name", HEADS)
def test_the_tolerance_sees_one_weight_matrix_in_bf16(name: str) -> None:
    """Whatever falls out of fp32 or out of its place differs by thousands of roundings at least."""
    config = HEADS[name]
    draft, files = make(config)
    with torch.no_grad():
        draft.layers[-1].mlp.down_proj.weight.copy_(draft.layers[-1].mlp.down_proj.weight.bfloat16())
    found = module_differences(config, draft, plain_of(PlainDraft, files))
    for kind in kinds_of(config, "logits"):
        assert found.in_roundings(kind) > 20 * TOLERANCES[kind]


@pytest.mark.parametrize("name", CASES)
def test_the_serving_runner_equals_the_equations(name: str) -> None:
    """Two of four slots, at different lengths; what the runner drew is teacher forced afterwards."""
    config, given, found = CASES[name], qwen3_sequences(), Differences()
    files = make(config)[1]
    plain, loaded = plain_of(PlainDraft, files), from_files(files[CONFIG_FILE], files[WEIGHTS_FILE])
    runner = DraftRunner(config, loaded.weights, given.embedding_VD, given.lm_head_VD, torch.float32, 4, 40)
    places = [(0, 0, 9), (2, 1, 17)]
    for slot, sample, anchor in places:
        fill_slot(runner, given.taps_STX[sample], slot, anchor, 40)
    anchors = [int(given.ids_SN[sample, anchor]) for _, sample, anchor in places]
    uniforms = torch.rand(2, config.block_size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    proposal = runner.propose([0, 2], anchors, [9, 17], [1.0, 1.0], uniforms)
    assert proposal.law_RBW is not None
    for row, (_, sample, anchor) in enumerate(places):
        taps, drafted = given.taps_STX[sample].double().numpy(), proposal.token_ids_RB[row].tolist()
        expected = plain.block(taps, anchor, anchors[row], [anchors[row], *drafted[:-1]])
        assert plain.targets[proposal.columns_RB[row].tolist()].tolist() == drafted
        # At temperature 1 the law's logarithm is the logits but for a constant.
        found.add("log law", proposal.law_RBW[row].log(), log_softmax(expected.logits))
        if config.enable_confidence_head:
            assert proposal.confidence_RB is not None
            found.add("confidence", proposal.confidence_RB[row], expected.confidence)
    found.check(*kinds_of(config, "log law"))


@pytest.mark.parametrize("name", EAGLE3_CASES)
def test_eagle3s_training_module_equals_the_equations(name: str) -> None:
    config, given, found = EAGLE3_CASES[name], qwen3_sequences(), Differences()
    draft = randomised(config, 7, max_positions=64)
    assert isinstance(draft, Eagle3Draft)
    plain = plain_of(PlainEagle3, to_files(DraftModel(config, export_state(draft, vocab_of(config)))))
    anchors, steps = torch.tensor([ANCHORS, ANCHORS]), torch.arange(config.ttt_length)
    chain = torch.stack([given.ids_SN[s][torch.tensor(ANCHORS)[:, None] + steps] for s in range(2)])
    head = given.lm_head_VD if vocab_of(config) is None else given.lm_head_VD[KEPT]
    with torch.no_grad():
        inputs = ChainInputs(given.taps_STX, given.ids_SN[:, 1 : TOKENS + 1], anchors, chain)
        logits = draft(inputs, given.embedding_VD) @ head.T
    for sample in range(2):
        taps, ids = given.taps_STX[sample].double().numpy(), given.ids_SN[sample].tolist()
        for a, anchor in enumerate(ANCHORS):
            found.add(
                "logits",
                logits[sample, a],
                plain.chain(taps, ids, anchor, ids[anchor + 1 : anchor + config.ttt_length]),
            )
    found.check("logits")


@pytest.mark.parametrize("name", EAGLE3_CASES)
def test_eagle3s_serving_runner_equals_the_equations(name: str) -> None:
    config, given, found = EAGLE3_CASES[name], qwen3_sequences(), Differences()
    draft = randomised(config, 7, max_positions=64)
    files = to_files(DraftModel(config, export_state(draft, vocab_of(config))))
    plain, loaded = plain_of(PlainEagle3, files), from_files(files[CONFIG_FILE], files[WEIGHTS_FILE])
    ends = TargetEnds(given.embedding_VD, given.lm_head_VD)
    runner = proposer_between(loaded, ends, torch.float32, EngineRoom(4, 40))
    places = [(0, 0, 9), (2, 1, 17)]
    for slot, sample, anchor in places:
        positions = torch.arange(anchor)
        taps = given.taps_STX[sample, :anchor].view(anchor, len(TAP_IDS), HIDDEN)
        runner.append(ProcessedTokens(given.ids_SN[sample, :anchor], positions, slot * 40 + positions, taps))
    anchors = [int(given.ids_SN[sample, anchor]) for _, sample, anchor in places]
    uniforms = torch.rand(2, config.block_size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    proposal = runner.propose([0, 2], anchors, [9, 17], [1.0, 1.0], uniforms)
    assert proposal.law_RBW is not None
    for row, (_, sample, anchor) in enumerate(places):
        taps, drafted = given.taps_STX[sample].double().numpy(), proposal.token_ids_RB[row].tolist()
        expected = plain.chain(taps, given.ids_SN[sample].tolist(), anchor, drafted[:-1])
        found.add("log law", proposal.law_RBW[row].log(), log_softmax(expected))
    found.check("log law")


def log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(-1, keepdims=True)
    out: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return out
