"""Draft checkpoints: DeepSpec's names, exact round trips, refusals."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load as load_safetensors

from draftline.draft.checkpoint import DraftModel, export_state, from_files, load_folder, to_files
from draftline.draft.config import DraftConfig, resolve_taps, spread_taps
from draftline.draft.stored import stored_draft
from draftline.draft.vocab import choose_vocab
from draftline.errors import FormatError, SpecError
from draftline.steps.ledger import StepResult
from draftline.storage.local import LocalStore
from tests.draft.test_model import BASE, CONFIGS, make, vocab_of

FILES = ("config.json", "model.safetensors")


def model_of(config: DraftConfig) -> DraftModel:
    return DraftModel(config, export_state(make(config), vocab_of(config)))


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trips_to_equal_bytes(name: str) -> None:
    files = to_files(model_of(CONFIGS[name]))
    back = from_files(*(files[file] for file in FILES))
    assert back.config == CONFIGS[name]
    assert to_files(back) == files


def test_names_are_deepspecs() -> None:
    state = load_safetensors(
        to_files(model_of(replace(CONFIGS["gated"], num_layers=1, draft_vocab_size=9)))["model.safetensors"]
    )
    assert {name: list(value.shape) for name, value in state.items()} == {
        "confidence_head.proj.bias": [1],
        "confidence_head.proj.weight": [1, 29],
        "d2t": [9],
        "fc.weight": [24, 72],
        "hidden_norm.weight": [24],
        "layers.0.input_layernorm.weight": [24],
        "layers.0.mlp.down_proj.weight": [24, 40],
        "layers.0.mlp.gate_proj.weight": [40, 24],
        "layers.0.mlp.up_proj.weight": [40, 24],
        "layers.0.post_attention_layernorm.weight": [24],
        "layers.0.self_attn.k_norm.weight": [6],
        "layers.0.self_attn.k_proj.weight": [12, 24],
        "layers.0.self_attn.o_proj.weight": [24, 24],
        "layers.0.self_attn.q_norm.weight": [6],
        "layers.0.self_attn.q_proj.weight": [24, 24],
        "layers.0.self_attn.v_proj.weight": [12, 24],
        "markov_head.gate_proj.bias": [5],
        "markov_head.gate_proj.weight": [5, 29],
        "markov_head.markov_w1.weight": [23, 5],
        "markov_head.markov_w2.weight": [9, 5],
        "norm.weight": [24],
        "t2d": [23],
    }


def test_the_rnn_head_has_one_joint_projection() -> None:
    state = model_of(CONFIGS["rnn"]).weights
    assert state["markov_head.joint_proj.weight"].shape == (15, 34)
    assert state["markov_head.joint_proj.bias"].shape == (15,)


def test_a_pruned_vocabulary_is_exported_as_offsets_and_marks() -> None:
    state = model_of(CONFIGS["pruned"]).weights
    vocab = vocab_of(CONFIGS["pruned"])
    assert torch.equal(torch.arange(9) + state["d2t"], vocab)
    assert torch.nonzero(state["t2d"]).flatten().tolist() == vocab.tolist()
    assert state["t2d"].dtype == torch.bool and state["d2t"].dtype == torch.int64


def test_the_feature_scale_is_folded_into_the_projection() -> None:
    draft = make(BASE)
    state = export_state(draft, None)
    assert "feature_scale" not in state
    features = torch.randn(5, 72, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(features @ state["fc.weight"].T, draft.fc(features * draft.feature_scale).detach())
    state["norm.weight"].zero_()
    assert draft.norm.weight.abs().max() > 0, "the export must not share memory with the module"


def test_the_config_document_is_deepspecs_dialect() -> None:
    assert BASE.to_json() == {
        "architectures": ["Qwen3DSparkModel"],
        "block_size": 4,
        "confidence_head_with_markov": True,
        "draft_vocab_size": 23,
        "draftline_format": 2,
        "enable_confidence_head": True,
        "head_dim": 6,
        "hidden_act": "silu",
        "hidden_size": 24,
        "intermediate_size": 40,
        "layer_types": ["full_attention", "full_attention"],
        "markov_head_type": "vanilla",
        "markov_rank": 5,
        "mask_token_id": 22,
        "model_type": "qwen3",
        "num_anchors": 512,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "num_target_layers": 6,
        "rms_norm_eps": 1e-05,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "target_layer_ids": [0, 2, 3],
        "tie_word_embeddings": False,
        "vocab_size": 23,
    }
    dflash = CONFIGS["dflash"].to_json()
    assert dflash["markov_rank"] == 0
    assert "markov_head_type" not in dflash and "confidence_head_with_markov" not in dflash


def changed(data: bytes, **changes: object) -> bytes:
    document = {**json.loads(data), **changes}
    return json.dumps({k: v for k, v in document.items() if v is not None}).encode()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"draftline_format": 3}, "unknown format"),
        ({"architectures": ["LlamaForCausalLM"]}, "not a draft that Draftline knows"),
        ({"block_size": None}, "block_size"),
        ({"rope_parameters": None}, "rope_parameters"),
        ({"rope_parameters": 3}, "lacks"),
        ({"num_hidden_layers": 3}, "lacks tensors"),
        ({"markov_head_type": "rnn"}, "joint_proj"),
        ({"target_layer_ids": [0, 2]}, r"fc\.weight has another shape"),
        ({"num_attention_heads": "four"}, "describes no possible draft"),
    ],
)
def test_foreign_newer_and_incomplete_configs_are_refused(changes: dict[str, object], message: str) -> None:
    files = to_files(model_of(BASE))
    with pytest.raises(FormatError, match=message):
        from_files(changed(files["config.json"], **changes), files["model.safetensors"])


def test_a_mapping_out_of_the_vocabulary_is_refused() -> None:
    pruned = model_of(CONFIGS["pruned"])
    shifted = pruned.weights["d2t"].clone()
    shifted[-1] = pruned.config.vocab_size
    files = to_files(DraftModel(pruned.config, {**pruned.weights, "d2t": shifted}))
    with pytest.raises(FormatError, match="d2t points outside"):
        from_files(*(files[file] for file in FILES))


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_weights_are_refused(keep: int) -> None:
    files = to_files(model_of(BASE))
    with pytest.raises(FormatError, match=r"model\.safetensors is damaged"):
        from_files(files["config.json"], files["model.safetensors"][:keep])


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[]", b"3"])
def test_a_damaged_config_is_refused(text: bytes) -> None:
    with pytest.raises(FormatError):
        from_files(text, to_files(model_of(BASE))["model.safetensors"])


def test_a_folder_without_the_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"no config\.json"):
        load_folder(tmp_path)
    for name, data in to_files(model_of(BASE)).items():
        (tmp_path / name).write_bytes(data)
    assert load_folder(tmp_path).config == BASE


def test_a_stored_draft_is_checked_against_its_digests(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.create()
    files = to_files(model_of(BASE))
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    step = StepResult("draft", "k" * 20, outputs={"files": digests})
    for name, data in files.items():
        store.put(f"{step.prefix}/draft/{name}", data)
    assert to_files(stored_draft(store, step)) == files
    damaged = bytearray(files["model.safetensors"])
    damaged[-1] ^= 1
    store.put(f"{step.prefix}/draft/model.safetensors", bytes(damaged))
    with pytest.raises(FormatError, match="not what was trained"):
        stored_draft(store, step)


@pytest.mark.parametrize(
    ("num_layers", "count", "expected"),
    [
        (36, 5, (1, 9, 17, 25, 33)),
        (40, 5, (1, 10, 19, 28, 37)),
        (30, 5, (1, 8, 14, 20, 27)),
        (4, 3, (0, 1, 2)),
        (4, 1, (0,)),
        (36, 1, (16,)),
    ],
)
def test_taps_are_spread_as_published(num_layers: int, count: int, expected: tuple[int, ...]) -> None:
    assert spread_taps(count, num_layers) == expected
    assert resolve_taps(None, count, num_layers) == expected


def test_impossible_taps_are_refused() -> None:
    with pytest.raises(SpecError, match="too many"):
        spread_taps(4, 4)
    with pytest.raises(SpecError, match="does not fit"):
        resolve_taps((0, 3), 2, 4)
    assert resolve_taps((-1, 2), 9, 4) == (-1, 2)


COUNTS = [(7, 100), (3, 90), (9, 5), (1, 1)]


@pytest.mark.parametrize(
    ("size", "always", "expected"),
    [
        (0, (), None),
        (12, (), None),
        (2, (), [3, 7]),
        (3, (11,), [3, 7, 11]),
        (6, (11,), [0, 1, 3, 7, 9, 11]),
        (3, (7,), [3, 7, 9]),
    ],
)
def test_the_vocabulary_is_the_likeliest_tokens_ascending(
    size: int, always: tuple[int, ...], expected: list[int] | None
) -> None:
    vocab = choose_vocab(COUNTS, size, 12, always)
    assert (None if vocab is None else vocab.tolist()) == expected
