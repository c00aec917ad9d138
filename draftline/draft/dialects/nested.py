"""Two layouts that keep the draft's fields in ``dflash_config``; they are read, not written.

SpecForge (``sgl-project/SpecForge``, ``modeling/draft/dspark.py``) has
``projector_type: "dspark"`` and DeepSpec's tensor names, in early checkpoints
below ``logit_head.``. Model-Optimizer (``NVIDIA/Model-Optimizer``,
``export/plugins/hf_spec_export.py``) has the same fields but
``use_confidence_head``, and drops the prefixes ``markov_head.`` and
``confidence_head.`` of tensor names.

The original DFlash layout has ``dflash_config`` too. Its slot k predicts
anchor + k, so it is refused; ``projector_type: "domino"`` is another head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from draftline.draft.config import DraftConfig
from draftline.draft.dialects.files import CheckpointFiles
from draftline.draft.dialects.model import DraftModel, checked_model
from draftline.draft.families import FAMILIES
from draftline.errors import FormatError

SPECFORGE, MODEL_OPTIMIZER = "specforge", "model-optimizer"

_NESTED = "dflash_config"
_EARLY = "logit_head."
_BARE = {
    "markov_w1.": "markov_head.markov_w1.",
    "markov_w2.": "markov_head.markov_w2.",
    "gate_proj.": "markov_head.gate_proj.",
    "joint_proj.": "markov_head.joint_proj.",
    "confidence_proj.": "confidence_head.proj.",
}


def recognises_specforge(files: CheckpointFiles) -> bool:
    """Whether the draft's fields are nested and the heads' tensors have their prefixes."""
    return isinstance(files.document.get(_NESTED), dict) and not recognises_model_optimizer(files)


def recognises_model_optimizer(files: CheckpointFiles) -> bool:
    """Whether the draft's fields are nested and the heads' tensors lack their prefixes."""
    return isinstance(files.document.get(_NESTED), dict) and any(
        name.startswith(tuple(_BARE)) for name in files.tensors
    )


def read_specforge(files: CheckpointFiles) -> DraftModel:
    """Read SpecForge's layout.

    Raises:
        FormatError: another projector than DSpark's, incomplete, or damaged.
    """
    nested = _dspark_fields(files)
    # Exports normalised for SGLang repeat these at the top level.
    fields = {name: nested.get(name, files.document.get(name)) for name in ("markov_rank", "markov_head_type")}
    is_weighted = float(nested.get("confidence_head_alpha") or 0.0) > 0
    has_confidence = nested.get("enable_confidence_head", files.document.get("enable_confidence_head", is_weighted))
    with_markov = nested.get("confidence_head_with_markov", files.document.get("confidence_head_with_markov", False))
    document = _translated(
        files,
        nested,
        {
            "markov_rank": fields["markov_rank"] or 0,
            "markov_head_type": fields["markov_head_type"] or "vanilla",
            "enable_confidence_head": bool(has_confidence),
            "confidence_head_with_markov": bool(has_confidence and with_markov),
        },
    )
    tensors = {name.removeprefix(_EARLY): value for name, value in files.tensors.items()}
    return _checked(files, document, tensors)


def read_model_optimizer(files: CheckpointFiles) -> DraftModel:
    """Read Model-Optimizer's layout; its confidence head always reads the Markov embedding.

    Raises:
        FormatError: another projector than DSpark's, quantised, incomplete, or damaged.
    """
    nested = _dspark_fields(files)
    has_confidence = bool(nested.get("use_confidence_head", False))
    document = _translated(
        files,
        nested,
        {
            "markov_rank": nested.get("markov_rank", 0),
            "markov_head_type": nested.get("markov_head_type", "vanilla"),
            "enable_confidence_head": has_confidence,
            "confidence_head_with_markov": has_confidence,
        },
    )
    return _checked(files, document, {_prefixed(name): value for name, value in files.tensors.items()})


def _dspark_fields(files: CheckpointFiles) -> Mapping[str, Any]:
    nested: Mapping[str, Any] = files.document[_NESTED]
    projector = nested.get("projector_type", "dflash")
    if projector != "dspark":
        raise FormatError(
            f"{files.origin}: {_NESTED} describes a {projector!r} draft"
            + (", whose slot k predicts anchor + k" if projector == "dflash" else ""),
            expected="projector_type 'dspark', whose slot k predicts anchor + k + 1",
            remedy="Train the draft as DSpark",
        )
    has_window = nested.get("use_swa") or (
        files.document.get("use_sliding_window") and not files.document.get("layer_types")
    )
    if has_window or files.document.get("quantization_config"):
        what = "a sliding window" if has_window else "quantised weights"
        raise FormatError(f"{files.origin}: the draft has {what}", expected="full attention, weights in fp32 or bf16")
    return nested


def _translated(files: CheckpointFiles, nested: Mapping[str, Any], heads: Mapping[str, Any]) -> dict[str, Any]:
    """The config in DeepSpec's words."""
    source = files.document
    try:
        return {
            **{name: value for name, value in source.items() if name not in (_NESTED, "auto_map")},
            "architectures": [FAMILIES["qwen3"].block_architecture],
            "rope_parameters": _rope(source),
            "target_layer_ids": nested["target_layer_ids"],
            "mask_token_id": nested["mask_token_id"],
            **heads,
        }
    except (KeyError, TypeError) as error:
        raise FormatError(f"{files.origin}: config.json lacks {error}", remedy="Export the draft again") from None


def _rope(document: Mapping[str, Any]) -> dict[str, Any]:
    """``rope_parameters``, which configs from before transformers 5 had in two fields."""
    if document.get("rope_parameters"):
        return dict(document["rope_parameters"])
    return {"rope_type": "default", **(document.get("rope_scaling") or {}), "rope_theta": document["rope_theta"]}


def _prefixed(name: str) -> str:
    return next((full + name.removeprefix(bare) for bare, full in _BARE.items() if name.startswith(bare)), name)


def _checked(files: CheckpointFiles, document: dict[str, Any], tensors: Mapping[str, Tensor]) -> DraftModel:
    config = DraftConfig.from_json(document, origin=files.origin)
    positions = document.get("max_position_embeddings")
    return checked_model(config, tensors, origin=files.origin, max_positions=positions)
