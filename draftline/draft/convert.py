"""Rewrite a draft checkpoint in another dialect, and prove that it is still the same draft."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from draftline.draft.compare import DraftDifference, compare_drafts
from draftline.draft.dialects import deepspec, speculators
from draftline.draft.dialects.files import CONFIG_FILE, INDEX_FILE, read_folder_files, render_files
from draftline.draft.dialects.model import EMBEDDING, LM_HEAD, DraftModel, draft_columns
from draftline.draft.dialects.registry import WRITABLE, read_files
from draftline.draft.dialects.target_facts import TargetFacts, read_target_facts
from draftline.errors import FormatError, InputError, NoSpace, SpecError, StorageError, TargetError
from draftline.spec import TargetSpec
from draftline.target.load import prepare_target

_EMBEDDING_NAMES = (
    "model.embed_tokens.weight",
    "model.language_model.embed_tokens.weight",
    "language_model.model.embed_tokens.weight",
)
_LM_HEAD_NAMES = ("lm_head.weight", "language_model.lm_head.weight")


@dataclass(frozen=True)
class Conversion:
    """What to convert.

    Attributes:
        source: Checkpoint folder in any readable dialect.
        destination: Folder to write.
        dialect: ``deepspec`` or ``speculators``.
        target: Directory or hub id of the draft's target: its name is written, and it knows what a dialect leaves out.
        with_frozen: Write the target's embeddings and LM head into the checkpoint. What
            speculators cannot do without is always written.
        force: Replace a checkpoint that is already there.
    """

    source: Path
    destination: Path
    dialect: str
    target: str | None = None
    with_frozen: bool = False
    force: bool = False


@dataclass(frozen=True)
class Converted:
    """What was done.

    Attributes:
        found: Dialect of the source.
        model: The draft, as written.
        difference: Between the source and what was read back, apart from the frozen tensors that were added.
        warnings: What engines that read the written dialect will not do with it.
    """

    found: str
    model: DraftModel
    difference: DraftDifference
    warnings: tuple[str, ...]


def convert_checkpoint(request: Conversion) -> Converted:
    """Convert a checkpoint.

    The new folder appears whole or not at all: it is written beside its place,
    read back, compared with the source bit by bit and on random inputs, and
    only then renamed.

    Raises:
        InputError: the destination is taken, or holds more than a checkpoint.
        FormatError: the source is unreadable, or the written checkpoint differs from it.
        SpecError: the dialect has no such draft.
        TargetError: the target is unreadable or another than the draft's.
        StorageError: the destination cannot be written.
    """
    if request.dialect not in WRITABLE:
        raise SpecError(f"dialect {request.dialect!r} cannot be written", expected=f"one of {', '.join(WRITABLE)}")
    if request.with_frozen and request.target is None:
        raise InputError("--with-frozen needs to know the target", remedy="Add --target with its directory or hub id")
    _require_free(request)
    folder = prepare_target(TargetSpec(source=request.target)) if request.target is not None else None
    target = read_target_facts(folder, request.target) if folder is not None and request.target is not None else None
    source, found = read_files(read_folder_files(request.source), target)
    if target is not None:
        _require_fit(source, target)
    model = source
    if target is not None and source.max_positions is None:
        model = replace(model, max_positions=target.max_positions)
    if folder is not None:
        model = replace(model, frozen=_frozen_of(folder, source, _wanted_frozen(request, source)))
    written = speculators.write(model, target) if request.dialect == speculators.NAME else deepspec.write(model)
    files = render_files(written.document, written.tensors)
    difference = _place(request, files, replace(source, frozen=model.frozen), target)
    return Converted(found, model, difference, written.warnings)


def _require_free(request: Conversion) -> None:
    folder = request.destination
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"{folder} is a file", expected="a folder that does not exist yet")
    if folder.resolve() == request.source.resolve():
        raise InputError(f"{folder} is the source itself", remedy="Name another destination")
    others = sorted(path.name for path in folder.iterdir() if not _is_of_a_checkpoint(path))
    if any(folder.iterdir()) and not request.force:
        raise InputError(f"{folder} is not empty", remedy="Name another destination, or add --force to replace it")
    if others:
        raise InputError(
            f"{folder} holds more than a checkpoint, and --force would delete it",
            got=", ".join(others[:3]),
            remedy="Name another destination",
        )


def _is_of_a_checkpoint(path: Path) -> bool:
    return path.is_file() and (path.name in (CONFIG_FILE, INDEX_FILE) or path.suffix == ".safetensors")


def _require_fit(model: DraftModel, target: TargetFacts) -> None:
    config = model.config
    facts = {
        "layers": (config.num_target_layers, target.num_layers),
        "hidden size": (config.hidden_size, target.hidden_size),
        "vocabulary": (config.vocab_size, target.vocab_size),
    }
    for name, (wanted, has) in facts.items():
        if wanted != has:
            raise TargetError(
                f"the draft was made for another target than {target.name}: {name}", got=has, expected=str(wanted)
            )


def _wanted_frozen(request: Conversion, model: DraftModel) -> tuple[str, ...]:
    if request.with_frozen:
        return (EMBEDDING, LM_HEAD)
    return speculators.required_frozen(model.config) if request.dialect == speculators.NAME else ()


def _frozen_of(folder: Path, model: DraftModel, wanted: tuple[str, ...]) -> dict[str, Tensor]:
    """The target's embeddings and the LM head's rows of the draft's vocabulary, in the target's own type.

    What the checkpoint carries stays, if the target has the same.

    Raises:
        TargetError: they are missing, or the checkpoint carries others.
    """
    wanted = (*wanted, *model.frozen)
    if not wanted:
        return {}
    embedding = _tensor_of(folder, _EMBEDDING_NAMES)
    if embedding is None:
        raise TargetError(f"the target in {folder} has no input embeddings", expected=" or ".join(_EMBEDDING_NAMES))
    head = _tensor_of(folder, _LM_HEAD_NAMES)
    # Tied targets have one matrix for both; a file wants two.
    head = embedding.clone() if head is None else head
    columns = draft_columns(model.config, model.weights)
    theirs = {EMBEDDING: embedding, LM_HEAD: head if columns is None else head[columns]}
    for name, value in model.frozen.items():
        if not torch.equal(value.float(), theirs[name].float()):
            raise TargetError(
                f"the draft carries another {name} than the target in {folder}",
                remedy="Name the target that the draft was trained for",
            )
    return {name: model.frozen.get(name, theirs[name]) for name in dict.fromkeys(wanted)}


def _tensor_of(folder: Path, names: tuple[str, ...]) -> Tensor | None:
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as handle:
                found = next((name for name in names if name in handle.keys()), None)  # noqa: SIM118 (no mapping)
                if found is not None:
                    tensor: Tensor = handle.get_tensor(found)
                    return tensor
        except SafetensorError as error:
            raise TargetError(f"{path} is damaged ({error})", remedy="Copy or download the target again") from None
    return None


def _place(
    request: Conversion, files: Mapping[str, bytes], expected: DraftModel, target: TargetFacts | None
) -> DraftDifference:
    """Write beside the destination, check, rename; returns the difference, which is none."""
    destination = request.destination.absolute()
    temporary: Path | None = None
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=destination.parent, prefix=f".{destination.name}.converting-"))
        fresh, old = temporary / "new", temporary / "old"
        fresh.mkdir()
        for name, data in files.items():
            _write_synced(fresh / name, data)
        difference = compare_drafts(expected, read_files(read_folder_files(fresh), target)[0])
        if not difference.is_equal:
            raise FormatError(
                f"what was written for {destination} is not the draft that was read",
                got=f"{', '.join(difference.tensors[:3]) or 'equal tensors'}, logits apart by {difference.logits}",
                remedy="Nothing was changed; please report this",
            )
        if destination.exists():
            destination.rename(old)
        fresh.rename(destination)
    except OSError as error:
        kind = NoSpace if error.errno in (errno.ENOSPC, errno.EDQUOT) else StorageError
        raise kind(f"{destination} cannot be written ({error.strerror})", remedy="Name another destination") from None
    finally:
        if temporary is not None:
            if (temporary / "old").exists() and not destination.exists():
                (temporary / "old").rename(destination)
            shutil.rmtree(temporary, ignore_errors=True)
    return difference


def _write_synced(path: Path, data: bytes) -> None:
    with open(path, "wb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())
