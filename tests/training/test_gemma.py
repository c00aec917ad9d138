"""From a Gemma target to a draft of its own kind: captured, trained and verified."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from draftline.cache.hidden import decode_samples, law_positions
from draftline.cache.shards import decode_shard
from draftline.capture.capture import capture_shard
from draftline.draft.checkpoint import load_folder
from draftline.draft.loss import DistillationTargets, LossOptions, distillation_loss
from draftline.spec import TargetSpec, derive
from draftline.target.load import Target, load_target
from draftline.training.architecture import draft_config
from tests.engine.runs import answer, greedy, make_engine, questions
from tests.target.test_lean import FAMILIES, save_model
from tests.training.cases import SPEC, conversations, grammar_splits, make_inputs, token_shard, train


@pytest.fixture(scope="module", params=["gemma3", "gemma4-unified"])
def gemma(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Target:
    folder = tmp_path_factory.mktemp("gemma")
    save_model(FAMILIES[request.param], folder)
    return load_target(TargetSpec(source=str(folder)), dtype="fp32")


def test_a_draft_has_the_shape_of_its_targets_layers_with_full_attention(gemma: Target) -> None:
    config = draft_config(SPEC, gemma)
    target = gemma.config
    assert config.family == target.family_facts.name
    assert (config.num_kv_heads, config.head_dim) == target.kv_shape(1)
    assert config.has_shared_kv == target.has_shared_kv
    assert config.logit_softcap == target.logit_softcap
    assert config.attention_scale == target.attention_scale
    assert (config.rope_theta, config.rope_scaling) == (target.rope_theta, target.rope_scaling)


def test_a_draft_of_another_family_takes_the_cap_and_no_scale(gemma: Target) -> None:
    config = draft_config(derive(SPEC, {"draft.family": "qwen3"}), gemma)
    assert config.logit_softcap == gemma.config.logit_softcap
    assert not config.has_shared_kv
    assert config.attention_scale == config.head_dim**-0.5


@pytest.fixture(scope="module")
def laws(gemma: Target) -> tuple[Tensor, Tensor]:
    """Last hidden states and log-normalisers that a capture stores, where it stores them."""
    tokens = decode_shard(token_shard(conversations(gemma, 2), gemma.fingerprint), origin="tokens")
    samples = decode_samples(capture_shard(gemma, tokens, (0, 1), "fp32"), origin="captured")
    hidden = torch.cat([sample.last_hidden_TD for sample in samples])
    normaliser = torch.cat([sample.log_normaliser_T for sample in samples])
    has_law = torch.cat([torch.from_numpy(law_positions(sample.loss_mask_T.bool().numpy())) for sample in samples])
    assert 0 < has_law.sum() < len(has_law)
    return hidden[has_law], normaliser[has_law]


def test_the_cache_holds_log_normalisers_of_capped_logits(gemma: Target, laws: tuple[Tensor, Tensor]) -> None:
    hidden, normaliser = laws
    raw = hidden @ gemma.lm_head_VD.t()
    cap = gemma.config.logit_softcap
    expected = (raw if cap is None else (raw / cap).tanh() * cap).logsumexp(-1)
    torch.testing.assert_close(normaliser, expected, atol=1e-4, rtol=1e-4)
    if cap is not None:
        assert not torch.allclose(raw.logsumexp(-1), expected, atol=0.1)


def test_a_draft_that_thinks_as_the_target_is_always_accepted(gemma: Target, laws: tuple[Tensor, Tensor]) -> None:
    """Log-normalisers from the cache, the head and the cap belong together: one of them forgotten, and mass is lost."""
    hidden, normaliser = laws
    targets = DistillationTargets(hidden, normaliser, torch.zeros(len(hidden)).long(), torch.ones(len(hidden)))
    options = LossOptions(ce=0.0, tv=1.0, softcap=draft_config(SPEC, gemma).logit_softcap)
    terms = distillation_loss(hidden, None, None, gemma.lm_head_VD, targets, options)
    torch.testing.assert_close(terms.accept_N, torch.ones(len(hidden)), atol=1e-4, rtol=0)


def test_a_trained_draft_is_verified_without_changing_a_token(gemma: Target, tmp_path: Path) -> None:
    spec = derive(SPEC, {"train.steps": 4, "train.checkpoint_every_steps": 4, "train.validate_every_steps": 2})
    inputs = make_inputs(gemma, tmp_path / "store", grammar_splits(gemma), spec)
    files, history = train(inputs, gemma)
    assert b"nan" not in history.lower()
    folder = tmp_path / "draft"
    folder.mkdir()
    for name, data in files.items():
        (folder / Path(name).name).write_bytes(data)
    draft = load_folder(folder)
    assert replace(draft.config, num_anchors=0) == replace(draft_config(spec, gemma), num_anchors=0)
    requests = greedy(questions(gemma, 3), max_tokens=16)
    plain = answer(make_engine(gemma, context=128), requests)
    found = answer(make_engine(gemma, draft, slots=2, context=128), requests)
    assert {n: one.token_ids for n, one in found.items()} == {n: one.token_ids for n, one in plain.items()}
