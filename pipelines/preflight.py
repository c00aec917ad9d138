"""Everything that can be found wrong in a second, found before anything is started."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draftline.errors import InputError, NoSpace
from draftline.evaluation.suites import check_suites
from draftline.prompts.source import source_digest
from draftline.spec import RunSpec, derive, dump_spec, load_spec, parse_overrides, recipe
from draftline.storage import ObjectStore, join_uri, open_store
from draftline.storage.uri import parse_uri
from draftline.target.fingerprint import target_fingerprint

MIN_FREE_BYTES = 4 * 1024**3
"""The demo writes 2.2 GiB, most of it hidden states; the rest is room for Ray and for temporary files."""

MIN_RESTART_FREE_BYTES = 512 * 1024**2
"""What a run needs to be started again, however much of it is done."""

RUN_ID_LENGTH = 12


@dataclass(frozen=True)
class PreparedRun:
    """A checked run.

    Attributes:
        spec: Resolved, with an absolute workspace.
        spec_uri: Where the resolved spec is stored.
        run_id: Digest of the resolved spec: the same run again has the same.
    """

    spec: RunSpec
    spec_uri: str
    run_id: str


def resolve_spec(
    spec_file: Path | None,
    recipe_name: str | None,
    assignments: list[str],
    *,
    prompts: str | Path | None = None,
    workspace: str | None = None,
) -> RunSpec:
    """Build the spec that the command line asks for.

    Args:
        spec_file: A YAML file.
        recipe_name: A shipped recipe instead.
        assignments: ``key=value`` overrides.
        prompts: A prompts file, folder or URI that replaces the spec's source.
        workspace: A workspace that replaces the spec's.

    Returns:
        The spec; a workspace and prompts on disk are absolute, since steps run elsewhere.

    Raises:
        SpecError: whatever is wrong with the spec.
        InputError: neither or both of a file and a recipe.
    """
    if (spec_file is None) == (recipe_name is None):
        raise InputError(
            "cannot tell which run you mean",
            got="neither a spec file nor --recipe" if spec_file is None else "both a spec file and --recipe",
            expected="exactly one of them",
            remedy="For example `draftline run --recipe smollm2-135m`, or `draftline run spec.yaml`",
        )
    base = load_spec(spec_file) if spec_file is not None else recipe(recipe_name or "")
    overrides = parse_overrides(assignments)
    if prompts is not None:
        overrides["prompts.source"] = str(prompts)
    if workspace is not None:
        overrides["workspace"] = workspace
    spec = derive(base, overrides)
    absolute: dict[str, Any] = {}
    place = parse_uri(spec.workspace)
    if isinstance(place, Path):
        absolute["workspace"] = str(place.resolve())
    source = spec.prompts.source
    if "://" not in source and not source.startswith("builtin:"):
        absolute["prompts.source"] = str(Path(source).expanduser().resolve())
    if files := spec.evaluation.suite_files:
        absolute["evaluation.suite_files"] = {
            name: uri if "://" in uri else str(Path(uri).expanduser().resolve()) for name, uri in files.items()
        }
    # Ray's workers run in another directory; a relative path would be a hub id there.
    if not spec.target.source.startswith("package:") and (target := Path(spec.target.source).expanduser()).is_dir():
        absolute["target.source"] = str(target.resolve())
    return derive(spec, absolute)


def prepare(spec: RunSpec, home: Path) -> PreparedRun:
    """Check what a run needs and store its resolved spec in the workspace.

    Args:
        spec: From :func:`resolve_spec`.
        home: Where the embedded platform will write.

    Raises:
        InputError: the prompts or an evaluation suite cannot be read.
        TargetError: the target is not there.
        StorageError: the workspace cannot be used, or a disk is full.
    """
    source_digest(spec.prompts)
    check_suites(spec.evaluation)
    target_fingerprint(spec.target)
    place = parse_uri(spec.workspace)
    folders = [home, place] if isinstance(place, Path) else [home]
    begun = any((folder / "runs" / _run_id(dump_spec(spec))).is_dir() for folder in folders)
    for folder in folders:
        check_free_space(folder, MIN_FREE_BYTES, done=folders if begun else [])
    store = open_store(spec.workspace, create=True)
    store.check()
    return store_spec(spec, store)


def store_spec(spec: RunSpec, store: ObjectStore) -> PreparedRun:
    """Store the resolved spec under ``runs/<run id>/spec.yaml``; storing it again changes nothing."""
    text = dump_spec(spec)
    run_id = _run_id(text)
    key = f"runs/{run_id}/spec.yaml"
    store.put(key, text.encode())
    return PreparedRun(spec, join_uri(spec.workspace, key), run_id)


def check_free_space(folder: Path, needed_bytes: int, *, done: Sequence[Path] = ()) -> None:
    """Check the disk that holds a folder, which need not exist yet.

    Args:
        folder: Where is written.
        needed_bytes: For all of the work.
        done: Folders of work begun before: what they hold on that disk is not
            needed again, down to :data:`MIN_RESTART_FREE_BYTES`.

    Raises:
        NoSpace: too little is free.
    """
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free_bytes = shutil.disk_usage(existing).free
    if done and free_bytes < needed_bytes:
        remaining_bytes = needed_bytes - _held_bytes(done, existing.stat().st_dev)
        needed_bytes = min(needed_bytes, max(remaining_bytes, MIN_RESTART_FREE_BYTES))
    if free_bytes < needed_bytes:
        raise NoSpace(
            f"too little free space for {folder}",
            got=f"{free_bytes / 1024**3:.1f} GiB",
            expected=f"at least {needed_bytes / 1024**3:.1f} GiB",
            remedy="Free some, or choose another disk with --workspace and --home",
        )


def _run_id(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:RUN_ID_LENGTH]


def _held_bytes(folders: Sequence[Path], device: int) -> int:
    """Allocated bytes below folders on one disk; what is below two of them, or linked twice, counts once."""
    sizes_bytes: dict[int, int] = {}
    for folder in folders:
        for directory, _, names in os.walk(folder):
            for name in names:
                try:
                    status = os.lstat(os.path.join(directory, name))
                except OSError:
                    continue
                if status.st_dev == device:
                    sizes_bytes[status.st_ino] = status.st_blocks * 512
    return sum(sizes_bytes.values())
