"""Drafts as Draftline trains, stores and loads them: ``config.json`` and ``model.safetensors``.

What is written is DeepSpec's dialect (:mod:`draftline.draft.dialects.deepspec`).
The frozen embeddings and LM head are the target's and are not written.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from draftline.draft.build import DraftModule
from draftline.draft.dialects import deepspec
from draftline.draft.dialects.files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    read_file_bytes,
    read_folder_files,
    render_files,
)
from draftline.draft.dialects.model import DraftModel
from draftline.draft.dialects.registry import read_files

__all__ = ["CONFIG_FILE", "WEIGHTS_FILE", "DraftModel", "export_state", "from_files", "load_folder", "to_files"]


def export_state(draft: DraftModule, vocab_W: Tensor | None) -> dict[str, Tensor]:
    """The serving weights of a trained draft.

    ``feature_scale`` is folded into ``fc``; a pruned vocabulary becomes ``d2t``/``t2d``.

    Args:
        draft: The trained module.
        vocab_W: Ascending target ids of the draft vocabulary, ``None`` when whole.
    """
    state = {name: value.detach().clone() for name, value in draft.state_dict().items()}
    state["fc.weight"] = state["fc.weight"] * state.pop("feature_scale")[None, :]
    if vocab_W is not None:
        state["d2t"] = vocab_W.long() - torch.arange(len(vocab_W))
        is_kept = torch.zeros(draft.config.vocab_size, dtype=torch.bool)
        is_kept[vocab_W] = True
        state["t2d"] = is_kept
    return {name: value.contiguous() for name, value in sorted(state.items())}


def to_files(model: DraftModel) -> dict[str, bytes]:
    """The checkpoint as file contents; equal models give equal bytes."""
    written = deepspec.write(model)
    return render_files(written.document, written.tensors)


def from_files(config: bytes, weights: bytes, *, origin: str = "a draft") -> DraftModel:
    """Read :func:`to_files` back.

    Raises:
        FormatError: damaged, incomplete, or of a foreign or newer format.
    """
    return deepspec.read(read_file_bytes(config, weights, origin=origin))


def load_folder(folder: Path) -> DraftModel:
    """Read a checkpoint directory in any dialect that Draftline knows.

    Raises:
        FormatError: files are missing or unreadable as a draft.
    """
    return read_files(read_folder_files(folder))[0]
