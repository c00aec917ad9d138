"""Gemma targets beyond one forward: speculation, multimodal checkpoints, older spellings, and what is refused."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma4UnifiedConfig,
    Gemma4UnifiedForConditionalGeneration,
    PretrainedConfig,
)

from draftline.draft.checkpoint import DraftModel, export_state
from draftline.errors import TargetError
from draftline.planner import KNOWN_CONFIGS
from draftline.spec import TargetSpec
from draftline.target.batch import Chunk, build_batch
from draftline.target.config import ModelConfig
from draftline.target.load import Target, load_target
from tests.engine.runs import Answer, answer, greedy, make_engine, questions
from tests.servers.tiny_target import make_tokenizer, random_module, tiny_draft_config
from tests.target.test_lean import FAMILIES, IDS, save_model

GEMMAS = [name for name in FAMILIES if name.startswith("gemma")]


@pytest.fixture(scope="module", params=GEMMAS)
def gemma(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Target:
    folder = tmp_path_factory.mktemp("gemma")
    save_model(FAMILIES[request.param], folder)
    return load_target(TargetSpec(source=str(folder)), dtype="fp32")


def draft_of(target: Target, answers: Mapping[str, Answer]) -> DraftModel:
    """A draft that knows half of the pairs of tokens in the answers: often accepted, often not."""
    config = replace(tiny_draft_config(target.config), markov_rank=target.vocab_size)
    module = random_module(config, 0)
    table = torch.zeros(target.vocab_size, target.vocab_size)
    for number, one in enumerate(answers.values()):
        for before, after in itertools.pairwise(one.token_ids):
            table[after, before] = 20.0 * (number % 2)
    assert module.markov_head is not None
    with torch.no_grad():
        module.markov_head.markov_w1.weight.copy_(torch.eye(target.vocab_size))
        module.markov_head.markov_w2.weight.copy_(table)
        module.norm.weight.mul_(0.2)
    return DraftModel(config, export_state(module, None))


@pytest.mark.parametrize(("slots", "prefill_tokens"), [(1, 512), (3, 9)])
def test_speculation_changes_no_token(gemma: Target, slots: int, prefill_tokens: int) -> None:
    requests = greedy(questions(gemma, 5), max_tokens=24)
    plain = {r.request_id: answer(make_engine(gemma, context=128), [r])[r.request_id] for r in requests}
    engine = make_engine(gemma, draft_of(gemma, plain), slots=slots, prefill_tokens=prefill_tokens, context=128)
    found = answer(engine, requests)
    assert {name: one.token_ids for name, one in found.items()} == {n: one.token_ids for n, one in plain.items()}
    for name, one in found.items():
        assert one.logprobs == pytest.approx(plain[name].logprobs, abs=5e-4)
    accepted = sum(one.stats.num_accepted_tokens for one in found.values())
    assert 0 < accepted < sum(one.stats.num_draft_tokens for one in found.values())


def test_plain_decoding_equals_generate(gemma: Target) -> None:
    model = AutoModelForCausalLM.from_pretrained(gemma.folder, dtype=torch.float32).eval()
    prompt = questions(gemma, 1)[0]
    with torch.no_grad():
        tokens = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=20, eos_token_id=None)
    found = answer(make_engine(gemma, context=128), greedy([prompt], max_tokens=20))
    assert found["r0"].token_ids == tokens[0, len(prompt) :].tolist()


def test_a_multimodal_checkpoint_gives_its_text_model(tmp_path: Path) -> None:
    text = FAMILIES["gemma4-unified"].to_dict()
    config = Gemma4UnifiedConfig(text_config=text, vision_config=None, audio_config=None)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Gemma4UnifiedForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "gemma4_unified"
    target = load_target(TargetSpec(source=str(tmp_path)), dtype="fp32")
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    assert target.config.logit_softcap == 3.0
    cache = target.model.new_cache(3, 64)
    batch = build_batch([Chunk(row, 0, IDS[row].tolist()) for row in range(3)], 64, torch.float32)
    logits = target.model.logits(target.model.forward(batch, cache).hidden_ND)
    torch.testing.assert_close(logits.view(3, 40, -1), expected, atol=2e-4, rtol=1e-4)


def test_the_hubs_older_spelling_of_gemma3_is_read() -> None:
    """As google/gemma-3-1b-it's config.json: a base of its own for local layers, a pattern instead of a list."""
    document: dict[str, Any] = {
        "model_type": "gemma3_text",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 7,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "rope_theta": 1000000,
        "rope_local_base_freq": 10000,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "max_position_embeddings": 1024,
    }
    found = ModelConfig.from_hf(document)
    today = AutoConfig.for_model(**{k: v for k, v in document.items() if k != "sliding_window_pattern"}).to_dict()
    assert ModelConfig.from_hf(json.loads(json.dumps(today))) == replace(found, tie_embeddings=True)
    assert found.local is not None
    assert found.local.layers == (0, 1, 2, 3, 4, 6)
    assert (found.rope_theta, found.local.rope_theta, found.local.rope_scaling) == (1e6, 1e4, None)
    assert found.rope_scaling is not None and found.rope_scaling.factor == 8.0


@pytest.mark.parametrize("source", KNOWN_CONFIGS)
def test_targets_of_all_recipes_are_supported(source: str) -> None:
    config = ModelConfig.from_hf(KNOWN_CONFIGS[source])
    assert config.num_layers > 0 and config.head_dim > 0


def test_gemma4_12b_is_read_as_published() -> None:
    config = ModelConfig.from_hf(KNOWN_CONFIGS["google/gemma-4-12B-it"])
    assert config.kv_shape(0) == (8, 256) and config.kv_shape(5) == config.kv_shape(47) == (1, 512)
    assert config.has_shared_kv and config.logit_softcap == 30.0 and config.attention_scale == 1.0
    assert config.local is not None and config.local.window == 1024 and len(config.local.layers) == 40


@pytest.mark.parametrize("source", KNOWN_CONFIGS)
def test_known_configurations_are_those_transformers_reads(source: str) -> None:
    """Transformers' own reading, written and read again, gives the same facts: the table has no misspelt key."""
    document = dict(KNOWN_CONFIGS[source])
    if "text_config" in document:
        document = dict(document["text_config"])
    read: PretrainedConfig = AutoConfig.for_model(**document)
    again = ModelConfig.from_hf(json.loads(json.dumps(read.to_dict())))
    assert again == ModelConfig.from_hf(KNOWN_CONFIGS[source])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size_per_layer_input": 256}, "per-layer input embeddings"),
        ({"num_kv_shared_layers": 2}, "share the keys"),
        ({"enable_moe_block": True}, "mixture of experts"),
        ({"use_bidirectional_attention": "all"}, "later positions"),
        ({"hidden_activation": "silu"}, "activation 'silu'"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"per_layer_config": {"1": {"head_dim": 32}, "3": {"head_dim": 64}}}, "differ in more than their kind"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 2.0}}}, "yarn"),
    ],
)
def test_variants_that_are_not_covered_are_refused(change: dict[str, Any], message: str) -> None:
    document = {**FAMILIES["gemma4-unified"].to_dict(), **change}
    with pytest.raises(TargetError, match=message):
        ModelConfig.from_hf(json.loads(json.dumps(document)))
