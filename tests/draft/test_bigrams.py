"""The start of the sequential head: the target's own law after each token, as well as the rank allows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from draftline.draft.bigrams import bigram_logits, low_rank
from draftline.spec import TargetSpec
from draftline.target.batch import Chunk, build_batch
from draftline.target.load import Target, load_target


def test_rows_are_the_targets_logits_after_each_token(loaded_target: Target, tiny_target: Path) -> None:
    vocab = torch.arange(3, 323, 1)
    table = bigram_logits(loaded_target, vocab, 331)
    model = AutoModelForCausalLM.from_pretrained(tiny_target).eval()
    with torch.no_grad():
        logits = model(torch.stack([torch.full_like(vocab, 331), vocab], 1)).logits[:, 1][:, vocab]
    torch.testing.assert_close(table, logits - logits.mean(-1, keepdim=True), atol=3e-4, rtol=1e-4)


def test_the_targets_soft_cap_counts(loaded_target: Target, tiny_target: Path) -> None:
    vocab, cap = torch.arange(3, 323, 1), 0.5
    # Loaded anew: a copy of one in use would lack the weights that its forward has packed.
    plain = load_target(TargetSpec(source=str(tiny_target)), dtype="fp32")
    capped = replace(plain, config=replace(plain.config, logit_softcap=cap))
    table = bigram_logits(capped, vocab, 331)
    batch = build_batch([Chunk(0, 0, (331, int(vocab[7])))], 2, torch.float32)
    hidden = loaded_target.model.forward(batch, loaded_target.model.new_cache(1, 2)).hidden_ND[1]
    logits = cap * torch.tanh((loaded_target.lm_head_VD[vocab] @ hidden) / cap)
    torch.testing.assert_close(table[7], logits - logits.mean(), atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("rank", [1, 4, 99])
def test_factors_are_the_best_of_their_rank(rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(30, 6, generator=generator) @ torch.randn(6, 30, generator=generator)
    left, right = low_rank(table, rank, 5)
    u, s, vh = torch.linalg.svd(table)
    kept = min(rank, 30)
    best = (u[:, :kept] * s[:kept]) @ vh[:kept]
    # A randomised decomposition may miss the best error by a little.
    assert (left @ right.T - table).norm() <= (best - table).norm() * 1.1 + 1e-3
    again = low_rank(table, rank, 5)
    assert torch.equal(left, again[0]) and torch.equal(right, again[1])


def test_the_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    low_rank(torch.eye(8), 3, 1)
    assert torch.equal(torch.get_rng_state(), state)
