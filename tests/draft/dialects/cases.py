"""Drafts of every kind, and their folders in every dialect."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from draftline.draft.checkpoint import DraftModel, export_state
from draftline.draft.dialects import deepspec, speculators
from draftline.draft.dialects.files import CONFIG_FILE, WEIGHTS_FILE, CheckpointFiles, render_files
from draftline.draft.dialects.model import WrittenDraft
from draftline.draft.dialects.target_facts import TargetFacts
from tests.draft.test_numerics import CASES, EAGLE3_CASES, HIDDEN, LAYERS, VOCAB, vocab_of
from tests.servers.tiny_target import randomised

CONFIGS = {**CASES, **EAGLE3_CASES}
TARGET = TargetFacts("models/tiny", ("Qwen3ForCausalLM",), LAYERS, HIDDEN, VOCAB, 4096)


def draft(name: str, *, with_frozen: bool = False, dtype: torch.dtype = torch.float32) -> DraftModel:
    """A random draft of a case, with copies of an imagined target's tensors if wanted."""
    config = CONFIGS[name]
    state = export_state(randomised(config, 7, max_positions=64), vocab_of(config))
    weights = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
    frozen = {}
    if with_frozen:
        generator = torch.Generator().manual_seed(3)
        frozen = {
            "embed_tokens.weight": torch.randn(config.vocab_size, config.hidden_size, generator=generator),
            "lm_head.weight": torch.randn(config.draft_vocab_size, config.hidden_size, generator=generator),
        }
    return DraftModel(config, weights, frozen, 4096)


def files_of(written: WrittenDraft, origin: str = "a checkpoint") -> CheckpointFiles:
    """What a reader would find of a written draft, by way of its bytes."""
    rendered = render_files(written.document, written.tensors)
    return CheckpointFiles(origin, json.loads(rendered[CONFIG_FILE]), dict(written.tensors))


def changed(files: CheckpointFiles, **fields: Any) -> CheckpointFiles:
    """The same with other fields at the top of ``config.json``; ``None`` removes one."""
    document = {name: value for name, value in {**files.document, **fields}.items() if value is not None}
    return CheckpointFiles(files.origin, document, files.tensors)


def speculators_files(name: str) -> CheckpointFiles:
    model = draft(name, with_frozen=bool(speculators.required_frozen(CONFIGS[name])))
    return files_of(speculators.write(model, TARGET))


def write_folder(folder: Path, document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    folder.mkdir(parents=True)
    (folder / CONFIG_FILE).write_text(json.dumps(document))
    save_file(dict(tensors), folder / WEIGHTS_FILE, {"format": "pt"})
    return folder


def deepspec_folder(folder: Path, model: DraftModel) -> Path:
    written = deepspec.write(model)
    return write_folder(folder, written.document, written.tensors)


def same(one: DraftModel, other: DraftModel) -> bool:
    """Equal facts and equal bits, frozen tensors included."""
    return (
        one.config == other.config
        and one.max_positions == other.max_positions
        and _same_tensors(one.weights, other.weights)
        and _same_tensors(one.frozen, other.frozen)
    )


def _same_tensors(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        value.dtype == other[name].dtype and torch.equal(value, other[name]) for name, value in one.items()
    )
