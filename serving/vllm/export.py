"""Write a draft so that vLLM reads it."""

from __future__ import annotations

from pathlib import Path

from draftline.draft.convert import Conversion, convert_checkpoint
from draftline.draft.dialects import deepspec, speculators
from draftline.errors import SpecError
from serving.vllm.settings import ExportedDraft

_DIALECTS = {"qwen3": speculators.NAME, "llama": speculators.NAME, "gemma4": deepspec.NAME}
"""vLLM 0.29 loads Qwen3's block drafts and Eagle3 of both families in speculators' layout, Gemma 4's in DeepSpec's."""


def export_draft(draft_dir: Path, target: str, destination: Path) -> ExportedDraft:
    """Convert a draft and prove that it is the same one; an earlier export is replaced.

    Args:
        draft_dir: The draft, in any dialect that Draftline reads.
        target: Its target, a directory or hub id.
        destination: Folder to write.

    Raises:
        SpecError: vLLM has no such draft.
        FormatError: the draft is damaged.
        TargetError: it was made for another target.
    """
    from draftline.draft.checkpoint import load_folder

    config = load_folder(draft_dir).config
    dialect = _DIALECTS.get(config.family)
    if dialect is None:
        raise SpecError(
            f"vLLM does not load drafts of the family {config.family!r}",
            expected=", ".join(_DIALECTS),
            remedy="Serve with serving.engine: draftline",
        )
    # Pruned drafts and Eagle3 carry what they share with the target: vLLM does not cut the target's own head.
    done = convert_checkpoint(Conversion(draft_dir, destination, dialect, target=target, force=destination.exists()))
    return ExportedDraft(destination, done.model.config)
