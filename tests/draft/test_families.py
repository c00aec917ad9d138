"""Families in ``config.json``: DeepSpec's names, exact round trips, old documents, refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from draftline.draft.config import DraftConfig
from draftline.draft.families import ARCHITECTURES, FAMILIES, default_family
from draftline.errors import FormatError
from draftline.target.rope import RopeScaling
from tests.draft.test_model import BASE

GEMMA4 = replace(
    BASE,
    family="gemma4",
    rope_theta=1e6,
    rope_scaling=RopeScaling("proportional", partial_rotary_factor=0.25),
    has_shared_kv=True,
    logit_softcap=30.0,
)
EAGLE3 = replace(
    BASE,
    num_layers=1,
    target_layer_ids=(0, 1, 2, 3, 4),
    mask_token_id=0,
    markov_rank=0,
    enable_confidence_head=False,
    confidence_with_markov=False,
    ttt_length=7,
    ttt_decay=0.8,
)
DRAFTS: dict[str, DraftConfig] = {
    "qwen3": BASE,
    "llama": replace(BASE, family="llama", rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)),
    "gemma3": replace(BASE, family="gemma3", query_pre_attn_scalar=256.0, rope_scaling=RopeScaling("linear", 8.0)),
    "gemma4": GEMMA4,
    "gemma4 with values": replace(GEMMA4, has_shared_kv=False, logit_softcap=None),
    "eagle3": EAGLE3,
    "gemma4 eagle3": replace(EAGLE3, family="gemma4", has_shared_kv=True, block_size=3),
}


@pytest.mark.parametrize("name", DRAFTS)
def test_every_family_round_trips(name: str) -> None:
    assert DraftConfig.from_json(DRAFTS[name].to_json()) == DRAFTS[name]


def test_the_algorithm_follows_from_the_fields() -> None:
    bare = replace(BASE, markov_rank=0, enable_confidence_head=False, confidence_with_markov=False)
    assert [c.algorithm for c in (BASE, bare, EAGLE3)] == ["dspark", "dflash", "eagle3"]


def test_architectures_are_deepspecs() -> None:
    assert {
        "Qwen3DSparkModel",
        "Qwen3Eagle3Model",
        "Gemma4DSparkModel",
        "Gemma4Eagle3Model",
    } < ARCHITECTURES.keys()
    assert len(ARCHITECTURES) == 2 * len(FAMILIES)


def test_a_gemma4_document_holds_what_its_reference_class_reads() -> None:
    """Fields that ``Gemma4DSparkModel`` asserts or that its config class would default otherwise."""
    document = GEMMA4.to_json()
    expected = {
        "architectures": ["Gemma4DSparkModel"],
        "model_type": "gemma4_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_k_eq_v": True,
        "global_head_dim": 6,
        "num_global_key_value_heads": 2,
        "hidden_size_per_layer_input": 0,
        "enable_moe_block": False,
        "num_kv_shared_layers": 0,
        "use_double_wide_mlp": False,
        "final_logit_softcapping": 30.0,
        "num_anchors": 512,
        "rope_parameters": {
            "full_attention": {"rope_theta": 1e6, "rope_type": "proportional", "partial_rotary_factor": 0.25}
        },
    }
    assert {name: document.get(name) for name in expected} == expected
    assert "hidden_act" not in document


def test_an_eagle3_document_is_deepspecs() -> None:
    document = EAGLE3.to_json()
    expected = {
        "architectures": ["Qwen3Eagle3Model"],
        "num_hidden_layers": 1,
        "draft_num_hidden_layers": 1,
        "target_layer_ids": [0, 1, 2, 3, 4],
        "ttt_length": 7,
        "step_loss_decay": 0.8,
    }
    assert {name: document.get(name) for name in expected} == expected
    assert not {"markov_rank", "mask_token_id", "enable_confidence_head", "num_anchors"} & document.keys()
    # DeepSpec writes no block size: it drafts as far as it was trained.
    del document["block_size"]
    assert DraftConfig.from_json(document) == replace(EAGLE3, block_size=7)


def test_a_document_of_format_1_reads_as_before() -> None:
    document = BASE.to_json()
    del document["num_anchors"]
    assert DraftConfig.from_json({**document, "draftline_format": 1}) == BASE


def test_overrides_of_global_layers_are_read_where_newer_transformers_keep_them() -> None:
    document = GEMMA4.to_json()
    del document["global_head_dim"], document["num_global_key_value_heads"]
    document["per_layer_config"] = {"0": {"head_dim": 6, "num_key_value_heads": 2}}
    assert DraftConfig.from_json({**document, "head_dim": 4, "num_key_value_heads": 4}) == GEMMA4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_size_per_layer_input": 64}, "hidden_size_per_layer_input"),
        ({"hidden_activation": "relu"}, "hidden_activation"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "whole context"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0, "rope_type": "yarn"}}}, "yarn"),
        ({"rope_parameters": {"rope_theta": 1.0}}, "full_attention"),
        ({"architectures": ["Gemma4DSparkModel", "Qwen3DSparkModel"]}, "not a draft"),
        ({"architectures": "Gemma4DSparkModel"}, "not a draft"),
    ],
)
def test_variants_that_no_draft_here_has_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        DraftConfig.from_json({**GEMMA4.to_json(), **changes})


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 2}, {"ttt_length": 0}])
def test_impossible_eagle3_drafts_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(FormatError):
        DraftConfig.from_json({**EAGLE3.to_json(), **changes})


def test_scales_follow_the_family() -> None:
    assert BASE.embedding_scale == 1.0 and BASE.attention_scale == pytest.approx(6**-0.5)
    assert GEMMA4.embedding_scale == pytest.approx(24**0.5) and GEMMA4.attention_scale == 1.0
    assert DRAFTS["gemma3"].attention_scale == 1 / 16


@pytest.mark.parametrize(
    ("target", "family"),
    [("llama", "qwen3"), ("mistral", "qwen3"), ("qwen3", "qwen3"), ("gemma3_text", "gemma3"), ("gemma4", "gemma4")],
)
def test_a_target_implies_a_family(target: str, family: str) -> None:
    assert default_family(target) == family
