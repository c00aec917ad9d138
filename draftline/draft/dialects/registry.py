"""Which dialect a checkpoint is in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from draftline.draft.dialects import deepspec, nested, speculators
from draftline.draft.dialects.files import CheckpointFiles
from draftline.draft.dialects.model import DraftModel
from draftline.draft.dialects.target_facts import TargetFacts, read_target_facts
from draftline.errors import FormatError, TargetError

READABLE = (deepspec.NAME, speculators.NAME, nested.SPECFORGE, nested.MODEL_OPTIMIZER)
WRITABLE = (deepspec.NAME, speculators.NAME)


def detect_dialect(files: CheckpointFiles) -> str:
    """Name of a checkpoint's dialect, by what its config and tensors are called.

    Raises:
        FormatError: none is known; the message names what was found.
    """
    # The order matters: exports of SpecForge for SGLang also bear DeepSpec's architecture.
    if speculators.recognises(files):
        return speculators.NAME
    if nested.recognises_model_optimizer(files):
        return nested.MODEL_OPTIMIZER
    if nested.recognises_specforge(files):
        return nested.SPECFORGE
    if deepspec.recognises(files):
        return deepspec.NAME
    raise FormatError(
        f"{files.origin} is not a draft that Draftline knows",
        got=_describe(files.document),
        expected=f"a checkpoint of {', '.join(READABLE)}",
        remedy=_remedy(files.document),
    )


def read_files(files: CheckpointFiles, target: TargetFacts | None = None) -> tuple[DraftModel, str]:
    """Read a checkpoint and name its dialect.

    Args:
        files: Its contents.
        target: Its target, where known.

    Raises:
        FormatError: of no known dialect, incomplete, damaged, or a variant that no draft here has.
    """
    name = detect_dialect(files)
    if name == speculators.NAME:
        return speculators.read(files, target or _named_target(files.document)), name
    if name == nested.SPECFORGE:
        return nested.read_specforge(files), name
    if name == nested.MODEL_OPTIMIZER:
        return nested.read_model_optimizer(files), name
    return deepspec.read(files), name


def _named_target(document: Mapping[str, object]) -> TargetFacts | None:
    """The target that a speculators checkpoint names, if it is a directory here."""
    algorithm = document.get("speculators_config")
    verifier = algorithm.get("verifier") if isinstance(algorithm, dict) else None
    name = verifier.get("name_or_path") if isinstance(verifier, dict) else None
    if not isinstance(name, str) or not (Path(name) / "config.json").is_file():
        return None
    try:
        return read_target_facts(Path(name), name)
    except TargetError:
        return None


def _describe(document: Mapping[str, object]) -> str:
    said = [f"{key} {document[key]}" for key in ("architectures", "model_type") if key in document]
    return ", ".join(said) or f"config.json with {', '.join(sorted(document)[:5]) or 'no fields'}"


def _remedy(document: Mapping[str, object]) -> str:
    names = document.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    if any(key.startswith("dspark_") for key in document):
        return "The draft is bundled with its target there; Draftline reads drafts of their own"
    if "Eagle" in name:
        return "Of Eagle3 drafts, Draftline reads DeepSpec's and speculators'"
    if name.endswith("ForCausalLM"):
        return "This looks like a target; point to the draft"
    return "Point to a draft's checkpoint"
