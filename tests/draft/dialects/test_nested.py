"""Layouts of SpecForge and Model-Optimizer, which are read and not written."""

from __future__ import annotations

from typing import Any

import pytest

from draftline.draft.dialects.files import CheckpointFiles
from draftline.draft.dialects.registry import detect_dialect, read_files
from draftline.errors import FormatError
from tests.draft.dialects.cases import CONFIGS, changed, draft, same

BACKBONE = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "block_size": 4,
    "head_dim": 8,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "layer_types": ["full_attention", "full_attention"],
    "max_position_embeddings": 4096,
    "model_type": "qwen3",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "num_target_layers": 6,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 61,
}
TAPS = {"mask_token_id": 60, "target_layer_ids": [0, 2, 4], "projector_type": "dspark"}
HEADS = ("vanilla", "gated", "rnn")


def specforge(name: str, *, early: bool = False) -> CheckpointFiles:
    """After its ``configs/qwen3-4b-dspark.json`` and ``modeling/draft/dspark.py``."""
    config = CONFIGS[name]
    fields = {
        **TAPS,
        "attention_mode": "gqa",
        "markov_rank": config.markov_rank,
        "markov_head_type": config.markov_head,
        "confidence_head_alpha": 1.0,
        "enable_confidence_head": config.enable_confidence_head,
        "confidence_head_with_markov": config.confidence_with_markov,
    }
    document = {
        **BACKBONE,
        "architectures": ["DSparkDraftModel"],
        "auto_map": {"AutoModel": "dspark.DSparkDraftModel"},
        "dflash_config": fields,
    }
    tensors = draft(name).weights
    if early:
        tensors = {("logit_head." if "_head." in key else "") + key: value for key, value in tensors.items()}
    return CheckpointFiles("SpecForge's", document, tensors)


def model_optimizer(name: str) -> CheckpointFiles:
    """After its ``export/plugins/hf_spec_export.py`` (DSparkExporter)."""
    config = CONFIGS[name]
    fields = {
        **TAPS,
        "shift_label": True,
        "markov_rank": config.markov_rank,
        "markov_head_type": config.markov_head,
        "use_confidence_head": config.enable_confidence_head,
    }
    document = {**BACKBONE, "architectures": ["DFlashDraftModel"], "dflash_config": fields, "torch_dtype": "float32"}
    names = {
        key: key.removeprefix("markov_head.").replace("confidence_head.proj.", "confidence_proj.")
        for key in draft(name).weights
    }
    return CheckpointFiles(
        "Model-Optimizer's", document, {names[key]: value for key, value in draft(name).weights.items()}
    )


def nested(files: CheckpointFiles, **fields: Any) -> CheckpointFiles:
    """The same with other nested fields; ``None`` removes one."""
    document = {k: v for k, v in {**files.document["dflash_config"], **fields}.items() if v is not None}
    return changed(files, dflash_config=document)


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize(
    "name", [*HEADS, "dflash", "vanilla, no confidence", "rnn, confidence without markov", "dflash, confidence"]
)
def test_specforges_checkpoints_are_read(name: str, early: bool) -> None:
    files = specforge(name, early=early)
    assert detect_dialect(files) == "specforge"
    assert same(read_files(files)[0], draft(name))


@pytest.mark.parametrize("name", [*HEADS, "vanilla, no confidence"])
def test_model_optimizers_checkpoints_are_read(name: str) -> None:
    files = model_optimizer(name)
    assert detect_dialect(files) == "model-optimizer"
    assert same(read_files(files)[0], draft(name))


def test_an_export_normalised_for_sglang_is_still_specforges() -> None:
    """Its ``normalize_dflash_export.py`` renames the architecture and repeats the heads' fields at the top."""
    files = specforge("gated")
    repeated = ("markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov")
    fields = {name: files.document["dflash_config"][name] for name in repeated}
    moved = nested(files, **dict.fromkeys(repeated), confidence_head_alpha=None)
    both = changed(moved, architectures=["Qwen3DSparkModel"], auto_map=None, **fields)
    assert detect_dialect(both) == "specforge"
    assert read_files(both)[0].config == CONFIGS["gated"]


def test_without_the_flag_the_loss_weight_says_whether_there_is_a_confidence_head() -> None:
    files = nested(specforge("vanilla"), enable_confidence_head=None)
    assert read_files(files)[0].config == CONFIGS["vanilla"]
    with pytest.raises(FormatError, match="confidence_head"):
        read_files(nested(files, confidence_head_alpha=None))


def test_rotary_parameters_of_transformers_5_are_read_too() -> None:
    rope = {"rope_theta": 5e5, "rope_type": "default"}
    files = changed(specforge("vanilla"), rope_parameters=rope, rope_theta=None)
    assert read_files(files)[0].config.rope_theta == 5e5


@pytest.mark.parametrize("make", [specforge, model_optimizer])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"projector_type": None}, "a 'dflash' draft, whose slot k predicts anchor [+] k"),
        ({"projector_type": "domino"}, "a 'domino' draft"),
        ({"target_layer_ids": None}, "lacks 'target_layer_ids'"),
        ({"mask_token_id": None}, "lacks 'mask_token_id'"),
        ({"use_swa": True}, "a sliding window"),
        ({"markov_rank": 9}, "another shape"),
    ],
)
def test_other_drafts_with_nested_fields_are_refused(make: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        read_files(nested(make("vanilla"), **fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quantization_config": {"quant_method": "modelopt"}}, "quantised"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rotary scaling yarn is not supported"),
        ({"rope_theta": None}, "lacks 'rope_theta'"),
        ({"num_target_layers": None}, "lacks 'num_target_layers'"),
        ({"layer_types": None, "use_sliding_window": True}, "a sliding window"),
    ],
)
def test_backbones_that_no_draft_here_has_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        read_files(changed(model_optimizer("vanilla"), **fields))
