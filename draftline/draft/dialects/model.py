"""The one form that every dialect is read into, and what is checked of it.

Dimension letters: D hidden, V target vocabulary, W draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from draftline.draft.build import new_draft
from draftline.draft.config import DraftConfig
from draftline.errors import FormatError

EMBEDDING, LM_HEAD = "embed_tokens.weight", "lm_head.weight"

_OF_THE_TARGET = ("verifier_lm_head.weight", "verifier_norm.weight")
"""Copies of the target's tensors that only a training needs."""


@dataclass(frozen=True)
class DraftModel:
    """A draft ready to be run.

    Attributes:
        config: Its facts.
        weights: Its exported weights, by DeepSpec's names, ``d2t`` (int64 ``[W]``,
            target id = column + d2t[column]) and ``t2d`` (bool ``[V]``) included
            when the vocabulary is pruned.
        frozen: Copies of the target's embeddings ``[V, D]`` and of its LM head
            ``[W, D]`` that the checkpoint carries. A runner takes them from the target.
        max_positions: Longest sequence that the checkpoint says it is for.
    """

    config: DraftConfig
    weights: dict[str, Tensor]
    frozen: dict[str, Tensor] = field(default_factory=dict)
    max_positions: int | None = None


@dataclass(frozen=True)
class WrittenDraft:
    """A draft in some dialect's words.

    Attributes:
        document: ``config.json``.
        tensors: Of ``model.safetensors``.
        warnings: What an engine that reads this dialect will not do with it, a sentence each.
    """

    document: dict[str, Any]
    tensors: dict[str, Tensor]
    warnings: tuple[str, ...]


def checked_model(
    config: DraftConfig, tensors: Mapping[str, Tensor], *, origin: str, max_positions: int | None = None
) -> DraftModel:
    """The model, after its tensors were compared with what its config asks for.

    Raises:
        FormatError: tensors are missing, unknown, of other shapes or kinds, or map out of the vocabulary.
    """
    expected = _expected_tensors(config, origin)
    found = {name: value for name, value in tensors.items() if not _is_ignored(name)}
    if not config.is_pruned:
        found = _without_identity(found, origin)
    frozen_shapes = {
        EMBEDDING: (config.vocab_size, config.hidden_size),
        LM_HEAD: (config.draft_vocab_size, config.hidden_size),
    }
    missing = sorted(expected.keys() - found.keys())
    if missing:
        raise FormatError(
            f"{origin}: the checkpoint lacks tensors",
            got=", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else ""),
            remedy="Take config.json and weights of one export",
        )
    unknown = sorted(found.keys() - expected.keys() - frozen_shapes.keys())
    if unknown:
        raise FormatError(
            f"{origin}: the checkpoint holds tensors that its config.json does not speak of",
            got=", ".join(unknown[:3]) + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""),
            remedy="Take config.json and weights of one export",
        )
    for name, value in sorted(found.items()):
        shape = frozen_shapes[name] if name in frozen_shapes else expected[name]
        _check_tensor(name, value, shape, origin)
    if config.is_pruned:
        _check_mapping(config, found, origin)
    frozen = {name: found.pop(name) for name in frozen_shapes if name in found}
    return DraftModel(config, dict(sorted(found.items())), frozen, max_positions)


def draft_columns(config: DraftConfig, weights: Mapping[str, Tensor]) -> Tensor | None:
    """Target id of every draft column, ``[W]``; ``None`` when the vocabulary is whole."""
    if not config.is_pruned:
        return None
    return weights["d2t"].long() + torch.arange(config.draft_vocab_size)


def _expected_tensors(config: DraftConfig, origin: str) -> dict[str, tuple[int, ...]]:
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


def _is_ignored(name: str) -> bool:
    return name in _OF_THE_TARGET or name.endswith("rotary_emb.inv_freq")


def _without_identity(tensors: dict[str, Tensor], origin: str) -> dict[str, Tensor]:
    """A whole vocabulary may come with a mapping, but only with the one that maps nothing."""
    if "d2t" in tensors and bool((tensors["d2t"] != 0).any()):
        raise FormatError(
            f"{origin}: d2t maps columns although config.json says that the vocabulary is whole",
            remedy="Take config.json and weights of one export",
        )
    return {name: value for name, value in tensors.items() if name not in ("d2t", "t2d")}


def _check_tensor(name: str, value: Tensor, shape: tuple[int, ...], origin: str) -> None:
    if tuple(value.shape) != shape:
        raise FormatError(
            f"{origin}: {name} has another shape than config.json says",
            got=tuple(value.shape),
            expected=str(shape),
            remedy="Take config.json and model.safetensors of one export",
        )
    kinds = {"d2t": (torch.int64,), "t2d": (torch.bool,)}
    wanted = kinds.get(name, (torch.float32, torch.bfloat16, torch.float16))
    if value.dtype not in wanted:
        raise FormatError(
            f"{origin}: {name} has a type that Draftline does not read",
            got=str(value.dtype).removeprefix("torch."),
            expected=" or ".join(str(kind).removeprefix("torch.") for kind in wanted),
            remedy="Export the draft without quantisation" if name not in kinds else None,
        )


def _check_mapping(config: DraftConfig, tensors: Mapping[str, Tensor], origin: str) -> None:
    ids = draft_columns(config, tensors)
    assert ids is not None
    if bool((ids < 0).any() or (ids >= config.vocab_size).any()):
        raise FormatError(
            f"{origin}: d2t points outside the target's vocabulary",
            got=f"ids from {int(ids.min())} to {int(ids.max())}",
            expected=f"0 to {config.vocab_size - 1}",
            remedy="Export the draft again",
        )
    # Engines take rows of the LM head by t2d and map columns by d2t: the two must say the same, in the same order.
    if not torch.equal(torch.nonzero(tensors["t2d"]).flatten(), ids):
        raise FormatError(
            f"{origin}: d2t and t2d do not name the same tokens in ascending order", remedy="Export the draft again"
        )
