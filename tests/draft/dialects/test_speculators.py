"""speculators' layout: what is written, that it comes back, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from draftline.draft.dialects import deepspec, speculators
from draftline.draft.dialects.registry import detect_dialect, read_files
from draftline.errors import FormatError, SpecError
from tests.draft.dialects.cases import CONFIGS, TARGET, changed, draft, files_of, same, speculators_files

BARE = [name for name, config in CONFIGS.items() if not speculators.required_frozen(config)]


@pytest.mark.parametrize(
    ("name", "with_frozen"), [*((name, True) for name in CONFIGS), *((name, False) for name in BARE)]
)
def test_deepspec_to_speculators_and_back_is_the_same_draft(name: str, with_frozen: bool) -> None:
    first = deepspec.read(files_of(deepspec.write(draft(name, with_frozen=with_frozen))))
    there = files_of(speculators.write(first, TARGET))
    second, dialect = read_files(there)
    assert dialect == "speculators"
    assert same(first, second)
    assert deepspec.write(second).document == deepspec.write(first).document
    # And the other way round.
    back = files_of(speculators.write(deepspec.read(files_of(deepspec.write(second))), TARGET))
    assert back.document == there.document
    assert back.tensors.keys() == there.tensors.keys()
    assert all(torch.equal(value, there.tensors[key]) for key, value in back.tensors.items())


def test_types_of_the_weights_are_kept() -> None:
    model = draft("vanilla", dtype=torch.bfloat16)
    written = speculators.write(model, TARGET)
    assert written.document["dtype"] == "bfloat16"
    assert same(read_files(files_of(written))[0], model)


LAYER = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "head_dim": 8,
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 48,
    "layer_types": ["full_attention", "full_attention"],
    "max_position_embeddings": 4096,
    "model_type": "qwen3",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 61,
}


def test_the_document_is_the_one_that_speculators_writes() -> None:
    """Equal to what its 0.9.0 saved of the same draft, but for fields of the library alone and our own."""
    assert speculators.write(draft("gated, pruned", with_frozen=True), TARGET).document == {
        "architectures": ["DSparkDraftModel"],
        "aux_hidden_state_layer_ids": [1, 3, 5],
        "block_size": 4,
        "confidence_head_with_markov": True,
        "draft_vocab_size": 14,
        "draftline": {"num_anchors": 512, "num_target_layers": 6},
        "dtype": "float32",
        "enable_confidence_head": True,
        "markov_head_type": "gated",
        "markov_rank": 7,
        "mask_token_id": 60,
        "sample_from_anchor": True,
        "sliding_window_non_causal": False,
        "speculators_config": {
            "algorithm": "dspark",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {
                    "accept_tolerance": 0.0,
                    "proposal_type": "greedy",
                    "speculative_tokens": 4,
                    "verifier_accept_k": 1,
                }
            ],
            "verifier": {"architectures": ["Qwen3ForCausalLM"], "name_or_path": "models/tiny"},
        },
        "speculators_model_type": "dspark",
        "speculators_version": "0.9.0",
        "target_hidden_size": None,
        "tie_word_embeddings": False,
        "transformer_layer_config": LAYER,
    }


def test_an_eagle3_document_says_which_variant_it_is() -> None:
    document = speculators.write(draft("eagle3", with_frozen=True), TARGET).document
    assert document["transformer_layer_config"] == {**LAYER, "num_hidden_layers": 1, "layer_types": ["full_attention"]}
    assert {k: v for k, v in document.items() if k not in ("speculators_config", "transformer_layer_config")} == {
        "architectures": ["Eagle3DraftModel"],
        "draft_vocab_size": 61,
        "draftline": {"num_target_layers": 6, "step_loss_decay": 0.8, "ttt_length": 4},
        "dtype": "float32",
        "eagle_aux_hidden_state_layer_ids": [1, 3, 5],
        "embed_requires_grad": False,
        "fc_norm": False,
        "norm_before_fc": False,
        "norm_before_residual": False,
        "norm_output": False,
        "speculators_model_type": "eagle3",
        "speculators_version": "0.9.0",
        "target_hidden_size": None,
        "tie_word_embeddings": False,
    }
    assert document["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 4


@pytest.mark.parametrize("flag", ["norm_before_residual", "norm_before_fc", "fc_norm", "norm_output"])
def test_other_variants_of_eagle3_are_refused(flag: str) -> None:
    with pytest.raises(FormatError, match=f"variant of Eagle3 is not supported; got {flag}"):
        read_files(changed(speculators_files("eagle3"), **{flag: True}))


def test_eagle3_of_other_families_is_refused() -> None:
    layer = {**speculators_files("eagle3").document["transformer_layer_config"], "model_type": "qwen3_next"}
    with pytest.raises(FormatError, match="Eagle3 of family 'qwen3_next'"):
        read_files(changed(speculators_files("eagle3"), transformer_layer_config=layer))


def test_a_foreign_eagle3_trained_as_far_as_it_drafts() -> None:
    files = changed(speculators_files("eagle3"), draftline=None)
    config = read_files(files, TARGET)[0].config
    assert (config.ttt_length, config.block_size, config.ttt_decay) == (4, 4, 1.0)


def test_dflash_is_written_as_dspark_of_rank_0_without_confidence() -> None:
    written = speculators.write(draft("dflash"), TARGET)
    document = written.document
    assert (document["speculators_model_type"], document["markov_rank"]) == ("dspark", 0)
    assert document["sample_from_anchor"] is True
    assert not written.document["enable_confidence_head"] and not written.document["confidence_head_with_markov"]


@pytest.mark.parametrize(
    ("name", "with_frozen", "words"),
    [
        ("vanilla", False, []),
        ("gated", False, ["vLLM serves only vanilla Markov heads, not 'gated'"]),
        ("rnn", False, ["vLLM serves only vanilla Markov heads, not 'rnn'"]),
        ("dflash", False, ["markov_rank 0"]),
        ("vanilla, pruned", True, []),
        ("eagle3", True, ["which lacks q_norm and k_norm"]),
        ("eagle3, llama", True, []),
    ],
)
def test_what_vllm_will_not_serve_is_said(name: str, with_frozen: bool, words: list[str]) -> None:
    warnings = speculators.write(draft(name, with_frozen=with_frozen), TARGET).warnings
    assert len(warnings) == len(words)
    assert all(word in warning for word, warning in zip(words, warnings, strict=True))


@pytest.mark.parametrize(
    ("name", "needed"),
    [
        ("vanilla, pruned", ["lm_head.weight"]),
        ("dflash, pruned", ["lm_head.weight"]),
        ("eagle3", ["embed_tokens.weight", "lm_head.weight"]),
        ("eagle3, llama", ["embed_tokens.weight", "lm_head.weight"]),
        ("eagle3, pruned", ["embed_tokens.weight", "lm_head.weight"]),
    ],
)
def test_nothing_is_written_that_readers_would_run_on_uninitialised_memory(name: str, needed: list[str]) -> None:
    """As speculators 0.9 was seen to do."""
    whole = draft(name, with_frozen=True)
    for missing in needed:
        frozen = {key: value for key, value in whole.frozen.items() if key != missing}
        with pytest.raises(SpecError, match=rf"got no {missing}.*--target"):
            speculators.write(replace(whole, frozen=frozen), TARGET)
    kept = {key: value for key, value in whole.frozen.items() if key in needed}
    assert speculators.write(replace(whole, frozen=kept), TARGET).tensors.keys() == {*whole.weights, *needed}


def test_an_unnamed_target_is_said_too() -> None:
    written = speculators.write(draft("vanilla"))
    assert written.document["speculators_config"]["verifier"] == {"name_or_path": None, "architectures": []}
    assert "--target" in written.warnings[-1]


def test_a_draft_with_sample_from_anchor_saved_as_dflash_is_read() -> None:
    files = changed(
        speculators_files("dflash"),
        speculators_model_type="dflash",
        architectures=["DFlashDraftModel"],
        **dict.fromkeys(("markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov")),
    )
    assert read_files(files)[0].config == CONFIGS["dflash"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"speculators_model_type": "eagle"}, "type 'eagle' are not supported"),
        ({"sample_from_anchor": None}, "got sample_from_anchor absent"),
        ({"sample_from_anchor": False}, "slot k predicts anchor [+] k"),
        ({"transformer_layer_config": None}, "lacks 'transformer_layer_config'"),
        ({"transformer_layer_config": 3}, "lacks"),
        ({"aux_hidden_state_layer_ids": None}, "lacks 'aux_hidden_state_layer_ids'"),
        ({"mask_token_id": None}, "lacks 'mask_token_id'"),
        ({"draftline": None}, "does not say how many layers its target has.*--target"),
        ({"draft_vocab_size": 14}, "lacks tensors; got d2t, t2d"),
        ({"markov_head_type": "gated"}, "lacks tensors; got markov_head.gate_proj"),
        ({"enable_confidence_head": False}, "tensors that its config.json does not speak of; got confidence_head"),
        ({"target_hidden_size": 64}, "another width"),
        ({"aux_hidden_state_layer_ids": [1, 3]}, r"fc\.weight has another shape"),
        ({"transformer_layer_config": {**LAYER, "model_type": "llama"}}, "of family qwen3"),
        ({"transformer_layer_config": {**LAYER, "attention_bias": True}}, "attention_bias is not supported"),
        (
            {"transformer_layer_config": {**LAYER, "layer_types": ["sliding_attention"] * 2}},
            "does not attend to its whole context",
        ),
        (
            {"transformer_layer_config": {**LAYER, "layer_types": None, "use_sliding_window": True}},
            "sliding window",
        ),
    ],
)
def test_what_no_draft_here_can_do_is_refused(fields: dict[str, Any], message: str) -> None:
    files = speculators_files("vanilla")
    assert read_files(files)[0].config == CONFIGS["vanilla"]
    with pytest.raises(FormatError, match=message):
        read_files(changed(files, **fields))


def test_the_target_fills_in_what_a_foreign_checkpoint_leaves_out() -> None:
    files = changed(speculators_files("vanilla"), draftline=None)
    assert detect_dialect(files) == "speculators"
    assert read_files(files, TARGET)[0].config == CONFIGS["vanilla"]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"family": "llama"}, "family 'llama'"),
        ({"family": "gemma3"}, "family 'gemma3'"),
        ({"logit_softcap": 30.0}, "soft cap"),
        ({"query_pre_attn_scalar": 256.0}, "attention scale"),
        ({"has_shared_kv": True}, "values shared with keys"),
    ],
)
def test_drafts_that_speculators_has_no_layer_for_are_not_written(fields: dict[str, Any], reason: str) -> None:
    model = draft("vanilla")
    with pytest.raises(SpecError, match=f"{reason}.*--to deepspec"):
        speculators.write(replace(model, config=replace(model.config, **fields)), TARGET)


def test_a_tap_of_the_embeddings_is_the_first_hidden_state() -> None:
    model = draft("vanilla")
    model = replace(model, config=replace(model.config, target_layer_ids=(-1, 2, 4)))
    written = speculators.write(model, TARGET)
    assert written.document["aux_hidden_state_layer_ids"] == [0, 3, 5]
    assert read_files(files_of(written))[0].config == model.config
