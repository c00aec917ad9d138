"""The lean forward equals ``transformers``, however the tokens are cut into steps."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    Gemma4TextConfig,
    Gemma4UnifiedTextConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen3Config,
)

from draftline.errors import TargetError
from draftline.spec import TargetSpec
from draftline.target.batch import Chunk, build_batch
from draftline.target.lean import ModelConfig
from draftline.target.load import Target, load_target
from tests.servers.tiny_target import make_tokenizer

VOCAB = len(make_tokenizer())
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 5,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # Small enough for all three regimes to occur among 40 positions.
    "original_max_position_embeddings": 32,
}
GEMMA = {**SIZES, "num_hidden_layers": 4, "head_dim": 16, "sliding_window": 7, "num_key_value_heads": 2}
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES, num_key_value_heads=2),
    "llama-mqa-tied": LlamaConfig(**SIZES, num_key_value_heads=1, tie_word_embeddings=True, rms_norm_eps=1e-5),
    "llama-wide-rope": LlamaConfig(
        **SIZES, num_key_value_heads=4, rope_parameters={"rope_type": "default", "rope_theta": 1e6}
    ),
    "llama-llama3-rope": LlamaConfig(**SIZES, num_key_value_heads=2, rope_parameters=LLAMA3_ROPE),
    "llama-linear-rope": LlamaConfig(
        **SIZES, num_key_value_heads=2, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    ),
    "mistral": MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=None),
    # Head sizes of whole vectors, which the CPU kernels take.
    "llama-vector-heads": LlamaConfig(**SIZES, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True),
    "llama-large-heads": LlamaConfig(**SIZES, num_key_value_heads=4, head_dim=64),
    "qwen3-many-queries": Qwen3Config(**{**SIZES, "num_attention_heads": 7}, num_key_value_heads=1, head_dim=32),
    "qwen3": Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True),
    "gemma3": Gemma3TextConfig(**GEMMA, layer_types=ALTERNATING, query_pre_attn_scalar=24),
    "gemma3-local-only": Gemma3TextConfig(
        **GEMMA,
        layer_types=["sliding_attention"] * 4,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "gemma4": Gemma4TextConfig(
        **GEMMA, layer_types=ALTERNATING, global_head_dim=32, hidden_size_per_layer_input=0, num_kv_shared_layers=0
    ),
    # As google/gemma-4-12B-it: one global key head of twice the size that gives the values too, capped logits.
    "gemma4-unified": Gemma4UnifiedTextConfig(
        **GEMMA,
        layer_types=ALTERNATING,
        global_head_dim=32,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        final_logit_softcapping=3.0,
    ),
}


@dataclass(frozen=True)
class Pair:
    target: Target
    hidden_states: list[Tensor]
    logits: Tensor


IDS = torch.randint(0, VOCAB, (3, 40), generator=torch.Generator().manual_seed(3))


def save_model(config: PretrainedConfig, folder: Path) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in name or name.endswith("layer_scalar"):
                torch.nn.init.normal_(parameter, 1.0, 0.2)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return model


def make_pair(config: PretrainedConfig, folder: Path) -> Pair:
    model = save_model(config, folder)
    with torch.no_grad():
        output = model(IDS, output_hidden_states=True)
    return Pair(load_target(TargetSpec(source=str(folder)), dtype="fp32"), list(output.hidden_states), output.logits)


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(FAMILIES[request.param], tmp_path_factory.mktemp("family"))


def test_one_step_equals_transformers(pair: Pair) -> None:
    model = pair.target.model
    cache = model.new_cache(3, 64)
    batch = build_batch([Chunk(row, 0, IDS[row].tolist()) for row in range(3)], 64, torch.float32)
    output = model.forward(batch, cache, (-1, 0, 1))
    assert float(pair.logits.std()) > 0.1  # Else nearly any forward would do.
    shape = (3, 40, -1)
    torch.testing.assert_close(model.logits(output.hidden_ND).view(shape), pair.logits, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(output.hidden_ND.view(shape), pair.hidden_states[-1], atol=2e-4, rtol=1e-4)
    for place, layer in enumerate((-1, 0, 1)):
        torch.testing.assert_close(
            output.taps_NLD[:, place].view(shape), pair.hidden_states[layer + 1], atol=2e-4, rtol=1e-4
        )


@pytest.mark.parametrize("seed", range(3))
def test_any_cutting_into_ragged_steps_equals_transformers(pair: Pair, seed: int) -> None:
    model = pair.target.model
    cache = model.new_cache(4, 64)
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randperm(4, generator=generator)[:3].sort().values.tolist()
    done = [0, 0, 0]
    logits = torch.full_like(pair.logits, float("nan"))
    while min(done) < 40:
        sizes = torch.randint(0, 12, (3,), generator=generator).tolist()
        steps = [(row, min(size, 40 - done[row])) for row, size in enumerate(sizes)]
        chunks = [
            Chunk(slots[row], done[row], IDS[row, done[row] : done[row] + size].tolist()) for row, size in steps if size
        ]
        if not chunks:
            continue
        output = model.forward(build_batch(chunks, 64, torch.float32, long_chunk=5 + seed * 20), cache)
        rows = model.logits(output.hidden_ND)
        offset = 0
        for row, size in steps:
            logits[row, done[row] : done[row] + size] = rows[offset : offset + size]
            offset, done[row] = offset + size, done[row] + size
    torch.testing.assert_close(logits, pair.logits, atol=2e-4, rtol=1e-4)


def test_a_moved_slot_continues_where_it_was(pair: Pair) -> None:
    model = pair.target.model
    cache = model.new_cache(2, 64)
    model.forward(build_batch([Chunk(1, 0, IDS[0, :30].tolist())], 64, torch.float32), cache)
    cache.move(1, 0, 30)
    output = model.forward(build_batch([Chunk(0, 30, IDS[0, 30:].tolist())], 64, torch.float32), cache)
    torch.testing.assert_close(model.logits(output.hidden_ND), pair.logits[0, 30:], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "family 'gpt2'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"attention_bias": True}, "attention_bias"),
        ({"sliding_window": 128}, "sliding_window"),
    ],
)
def test_unsupported_models_are_refused(change: dict[str, object], message: str) -> None:
    document = {**LlamaConfig(**SIZES).to_dict(), "rope_parameters": None, **change}
    with pytest.raises(TargetError, match=message):
        ModelConfig.from_hf(json.loads(json.dumps(document)))
