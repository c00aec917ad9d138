"""Draft checkpoints on disk: ``config.json`` and ``model.safetensors``, DeepSpec's names.

A pruned vocabulary adds ``d2t`` (int64 ``[W]``, target id = column + d2t[column])
and ``t2d`` (bool ``[V]``), as speculators and vLLM use them. The frozen
embeddings and LM head are the target's and are written only on request.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from draftline.draft.build import DraftModule, new_draft
from draftline.draft.config import DraftConfig
from draftline.errors import FormatError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True)
class DraftModel:
    """A draft ready to be run: its facts and its exported weights."""

    config: DraftConfig
    weights: dict[str, Tensor]


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
    config = json.dumps(model.config.to_json(), indent=2, sort_keys=True) + "\n"
    return {CONFIG_FILE: config.encode(), WEIGHTS_FILE: save_safetensors(model.weights, {"format": "pt"})}


def from_files(config: bytes, weights: bytes, *, origin: str = "a draft") -> DraftModel:
    """Read :func:`to_files` back.

    Raises:
        FormatError: damaged, incomplete, or of a foreign or newer format.
    """
    try:
        document = json.loads(config)
    except ValueError as error:
        raise FormatError(f"{origin}: config.json is damaged ({error})", remedy="Export the draft again") from None
    if not isinstance(document, dict):
        raise FormatError(f"{origin}: config.json holds no object", got=type(document).__name__)
    parsed = DraftConfig.from_json(document, origin=origin)
    try:
        state = load_safetensors(weights)
    except SafetensorError as error:
        raise FormatError(
            f"{origin}: model.safetensors is damaged ({error})", remedy="Export the draft again"
        ) from None
    expected = _expected_shapes(parsed, origin)
    missing = expected.keys() - state.keys()
    if missing:
        raise FormatError(f"{origin}: model.safetensors lacks tensors", got=", ".join(sorted(missing)[:3]))
    for name, shape in sorted(expected.items()):
        if tuple(state[name].shape) != shape:
            raise FormatError(
                f"{origin}: {name} has another shape than config.json says",
                got=tuple(state[name].shape),
                expected=str(shape),
                remedy="Take config.json and model.safetensors of one export",
            )
    if parsed.is_pruned:
        _check_mapping(parsed, state, origin)
    return DraftModel(parsed, state)


def load_folder(folder: Path) -> DraftModel:
    """Read a checkpoint directory.

    Raises:
        FormatError: files are missing or unreadable as a draft.
    """
    files = {}
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        path = folder / name
        if not path.is_file():
            raise FormatError(
                f"no draft in {folder}", got=f"no {name}", remedy="Point to a folder written by Draftline"
            )
        files[name] = path.read_bytes()
    return from_files(files[CONFIG_FILE], files[WEIGHTS_FILE], origin=str(folder))


def _expected_shapes(config: DraftConfig, origin: str) -> dict[str, tuple[int, ...]]:
    try:
        with torch.device("meta"):
            state = new_draft(config, 1).state_dict()
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise FormatError(
            f"{origin}: config.json describes no possible draft", got=str(error), remedy="Export the draft again"
        ) from None
    shapes = {name: tuple(value.shape) for name, value in state.items() if name != "feature_scale"}
    if config.is_pruned:
        shapes |= {"d2t": (config.draft_vocab_size,), "t2d": (config.vocab_size,)}
    return shapes


def _check_mapping(config: DraftConfig, state: dict[str, Tensor], origin: str) -> None:
    columns = torch.arange(config.draft_vocab_size)
    ids = columns + state["d2t"].long()
    if bool((ids < 0).any() or (ids >= config.vocab_size).any()):
        raise FormatError(
            f"{origin}: d2t points outside the target's vocabulary",
            got=f"ids from {int(ids.min())} to {int(ids.max())}",
            expected=f"0 to {config.vocab_size - 1}",
            remedy="Export the draft again",
        )
