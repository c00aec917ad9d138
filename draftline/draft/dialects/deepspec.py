"""DeepSpec's layout, which is Draftline's own (``deepseek-ai/DeepSpec``, ``modeling/dspark`` and ``modeling/eagle3``).

``config.json`` is the target's text config overwritten with the draft's
fields (:mod:`draftline.draft.document`). SGLang reads it as it is. DeepSpec
knows whole vocabularies only and always writes the frozen ``embed_tokens``
and ``lm_head``; Draftline's drafts may prune (``draft_vocab_size``, ``d2t``,
``t2d``) and leave out what is the target's.
"""

from __future__ import annotations

from collections.abc import Iterator

from draftline.draft.config import DraftConfig
from draftline.draft.dialects.files import CheckpointFiles
from draftline.draft.dialects.model import EMBEDDING, LM_HEAD, DraftModel, WrittenDraft, checked_model
from draftline.draft.families import ARCHITECTURES

NAME = "deepspec"

_FAMILIES = ("qwen3", "gemma4")


def recognises(files: CheckpointFiles) -> bool:
    """Whether a checkpoint's architecture is one of DeepSpec's, or continues its pattern."""
    names = files.document.get("architectures")
    return isinstance(names, list) and any(name in ARCHITECTURES for name in names)


def read(files: CheckpointFiles) -> DraftModel:
    """Read a checkpoint.

    Raises:
        FormatError: incomplete, newer, of a variant that no draft here has, or damaged.
    """
    config = DraftConfig.from_json(files.document, origin=files.origin)
    positions = files.document.get("max_position_embeddings")
    return checked_model(
        config,
        files.tensors,
        origin=files.origin,
        max_positions=positions if isinstance(positions, int) else None,
    )


def write(model: DraftModel) -> WrittenDraft:
    """The model in this dialect; nothing is cast or reordered."""
    document = model.config.to_json()
    if model.max_positions is not None:
        document["max_position_embeddings"] = model.max_positions
    return WrittenDraft(document, {**model.weights, **model.frozen}, tuple(_warnings(model)))


def _warnings(model: DraftModel) -> Iterator[str]:
    config = model.config
    if config.is_pruned:
        yield "DeepSpec and SGLang know whole vocabularies only; this draft's is pruned, so neither can run it"
    if config.family not in _FAMILIES:
        yield f"DeepSpec and SGLang have no draft of family {config.family!r}; only Draftline reads this checkpoint"
    if config.algorithm == "dflash":
        yield "SGLang refuses DSpark drafts with markov_rank 0"
    if not {EMBEDDING, LM_HEAD} <= model.frozen.keys():
        yield (
            "embed_tokens and lm_head are left to the target: SGLang takes them from there, but DeepSpec's own "
            "evaluation would draw them at random (--target TARGET --with-frozen writes them)"
        )
