"""transformers' own forward over slots equals itself, for families that the lean forward does not know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING as CONFIGS
from transformers import AutoModelForCausalLM, PretrainedConfig

from draftline.errors import TargetError
from draftline.spec import TargetSpec
from draftline.target import general
from draftline.target.batch import Chunk, build_batch
from draftline.target.general import GeneralModel
from draftline.target.general_config import choose_config, general_config
from draftline.target.lean import LeanModel, attend, within_window
from draftline.target.load import load_target
from tests.target.test_lean import (
    IDS,
    SIZES,
    Pair,
    make_pair,
    save_model,
    test_a_moved_slot_continues_where_it_was,
    test_any_cutting_into_ragged_steps_equals_transformers,
    test_one_step_equals_transformers,
)

__all__ = [
    "test_a_moved_slot_continues_where_it_was",
    "test_any_cutting_into_ragged_steps_equals_transformers",
    "test_one_step_equals_transformers",
]

GROUPED = {**SIZES, "num_key_value_heads": 2, "pad_token_id": 0}
EXPERTS = {"num_experts_per_tok": 2, "sliding_window": 7}
MIXED = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "phi3": {"sliding_window": 7},
    "olmo2": {},
    "olmo3": MIXED,
    "granite": {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "starcoder2": {"sliding_window": 7},
    # Attention and feed-forward side by side, biases, a LayerNorm, part of each head rotates.
    "gpt_neox": {},
    # Learned positions.
    "opt": {"ffn_dim": 80, "word_embed_proj_dim": 48},
    "gpt2": {},
    # Capped attention logits.
    "gemma2": {"head_dim": 16, "sliding_window": 7, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
    # Sinks: a logit that takes its share of the softmax.
    "gpt_oss": {**EXPERTS, **MIXED, "num_local_experts": 4, "head_dim": 16},
    "mixtral": {**EXPERTS, "num_local_experts": 4},
    "qwen3_moe": {"num_experts_per_tok": 2, "num_experts": 4, "moe_intermediate_size": 24, "head_dim": 16},
    # Latent attention: values are narrower than keys.
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 12,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
    },
    # A variant that the lean forward refuses.
    "llama": {"attention_bias": True},
    "mistral": {"sliding_window": 7},
}


def family_config(name: str, **changes: Any) -> PretrainedConfig:
    # The plain attention of transformers is the reference: its faster ones leave caps and sinks out.
    return CONFIGS[name](**{**GROUPED, **FAMILIES.get(name, {}), **changes, "attn_implementation": "eager"})


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    pair = make_pair(family_config(request.param), tmp_path_factory.mktemp("general"))
    assert isinstance(pair.target.model, GeneralModel)
    return pair


def test_drafts_get_the_matrix_that_gives_the_logits(pair: Pair) -> None:
    target = pair.target
    hidden = pair.hidden_states[-1][0]
    product = hidden @ target.lm_head_VD.T
    if (cap := target.config.logit_softcap) is not None:
        product = (product / cap).tanh() * cap
    torch.testing.assert_close(product, pair.logits[0], atol=2e-4, rtol=1e-4)
    assert target.embedding_VD.shape == (target.vocab_size, target.config.hidden_size)
    assert target.weights["model.norm.weight"].shape == (target.config.hidden_size,)


def test_a_head_with_a_bias_has_no_such_matrix(tmp_path: Path) -> None:
    model = save_model(family_config("phi"), tmp_path)
    assert isinstance(model.lm_head.bias, torch.nn.Parameter)
    target = load_target(TargetSpec(source=str(tmp_path)), dtype="fp32")
    with pytest.raises(TargetError, match="prompt_lookup"):
        _ = target.lm_head_VD
    with torch.no_grad():
        expected = model(IDS[:1]).logits[0]
    batch = build_batch([Chunk(0, 0, IDS[0].tolist())], 64, torch.float32)
    hidden = target.model.forward(batch, target.model.new_cache(1, 64)).hidden_ND
    torch.testing.assert_close(target.model.logits(hidden), expected, atol=2e-4, rtol=1e-4)


def test_both_forwards_of_one_target_agree(tiny_target: Path) -> None:
    spec = TargetSpec(source=str(tiny_target))
    lean, other = (load_target(spec, dtype="fp32", forward=forward) for forward in ("auto", "transformers"))
    assert isinstance(lean.model, LeanModel) and isinstance(other.model, GeneralModel)
    batch = build_batch([Chunk(0, 0, list(range(20))), Chunk(1, 0, list(range(40, 43)))], 64, torch.float32)
    outputs = [t.model.forward(batch, t.model.new_cache(2, 64), (-1, 1)) for t in (lean, other)]
    torch.testing.assert_close(outputs[0].taps_NLD, outputs[1].taps_NLD, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(outputs[0].hidden_ND, outputs[1].hidden_ND, atol=2e-4, rtol=1e-4)
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        torch.testing.assert_close(lean.weights[name], other.weights[name], atol=1e-5, rtol=1e-5)


def test_the_forward_may_be_asked_for_by_name() -> None:
    document = json.loads(json.dumps(CONFIGS["qwen2"](**GROUPED).to_dict()))
    assert choose_config(document).forward == choose_config(document, "transformers").forward == "transformers"
    with pytest.raises(TargetError, match="'qwen2'"):
        choose_config(document, "lean")


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("mamba", {}, "linear_attention"),
        ("jamba", {}, "mamba"),
        ("llama4_text", {}, "chunked_attention"),
        ("gemma3n_text", {}, "share the keys"),
        ("t5", {}, "not supported"),
        ("vit", {}, "not supported"),
        ("falcon", {"alibi": True}, "ALiBi"),
    ],
)
def test_what_cannot_work_is_refused_by_name(family: str, changes: dict[str, Any], message: str) -> None:
    document = json.loads(json.dumps(CONFIGS[family](**changes).to_dict()))
    with pytest.raises(TargetError, match=message) as refusal:
        choose_config(document)
    assert family.removesuffix("_text") in str(refusal.value)


def test_a_family_of_the_lean_forward_says_why_it_is_refused() -> None:
    document = json.loads(
        json.dumps(CONFIGS["gemma4_text"](hidden_size_per_layer_input=0, num_kv_shared_layers=2).to_dict())
    )
    with pytest.raises(TargetError, match="num_kv_shared_layers"):
        choose_config(document)
    with pytest.raises(TargetError, match="'made-up'"):
        choose_config({"model_type": "made-up"})


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("bloom", "attention cannot be replaced"),
        # Two calls of attention a layer.
        ("diffllama", "not every layer"),
    ],
)
def test_what_the_configuration_does_not_tell_is_refused_at_the_load(family: str, message: str) -> None:
    config = family_config(family)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(TargetError, match=message):
        GeneralModel(general_config(config.to_dict()), model)


def test_a_load_ends_with_a_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else a family may do with its attention shows there; here every query sees its own position only."""

    def blind(q_NHE, cache, layer, segments, scale):  # type: ignore[no-untyped-def]
        return attend(q_NHE, cache, layer, [within_window(segment, 1) for segment in segments], scale)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(family_config("qwen2"))
    monkeypatch.setattr(general, "attend", blind)
    with pytest.raises(TargetError, match="other logits"):
        GeneralModel(general_config(model.config.to_dict()), model)


def test_positions_stop_where_those_of_others_would_change_them() -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 6,
        "long_factor": [2.0] * 6,
        "original_max_position_embeddings": 64,
    }
    original = {"original_max_position_embeddings": 64}
    config = CONFIGS["phi3"](**{**GROUPED, "max_position_embeddings": 256, "rope_parameters": rope, **original})
    assert general_config(config.to_dict()).max_positions == 64
