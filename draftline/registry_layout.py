"""What a registered draft looks like: file names, tag names, digest check. No registry client.

Writers (the register step) and readers (the gate, the server) share it, so
that neither imports the other.

.. code-block:: text

    draft/config.json  draft/model.safetensors   the weights
    calibration.json                             temperatures and step costs
    spec.yaml                                    the run's whole spec
    card.md  metrics.json  *.png                 the report

Weights are safetensors and nothing else: a folder with a file that a loader
could unpickle is refused by that file's name, whatever was recorded of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from draftline.digests import require_digest
from draftline.errors import FormatError

DRAFT_DIR = "draft"
WEIGHTS_PATH = f"{DRAFT_DIR}/model.safetensors"
CONFIG_PATH = f"{DRAFT_DIR}/config.json"
CALIBRATION_FILE = "calibration.json"
SPEC_FILE = "spec.yaml"
CARD_FILE = "card.md"
METRICS_FILE = "metrics.json"

ALIAS_CHAMPION = "champion"
ALIAS_CHALLENGER = "challenger"
ALIAS_PREVIOUS = "previous"

TAG_KEY = "draftline.key"
TAG_GATE_PASSED = "draftline.gate.passed"
TAG_GATE_REASONS = "draftline.gate.reasons"
TAG_ROLLED_BACK = "draftline.rolled_back"
"""Set on a version that was taken back: a pipeline run again must not promote it again by itself."""
TAG_DIGEST_PREFIX = "draftline.sha256."
TAG_DRIFT = "draftline.drift"
"""Set by a server on the version it serves: the newest drift event as JSON. Retraining on drift looks for it."""

UNSAFE_SUFFIXES = frozenset(
    {
        ".bin",
        ".ckpt",
        ".dill",
        ".joblib",
        ".npy",
        ".npz",
        ".pickle",
        ".pkl",
        ".pt",
        ".pt2",
        ".pth",
        ".py",
        ".so",
        ".zip",
    }
)
"""Endings of files that can hold pickles or code."""

_CHUNK_BYTES = 1 << 20


def digest_tag(path: str) -> str:
    """Name of the version tag that holds the sha256 of the file at ``path`` in the folder."""
    return TAG_DIGEST_PREFIX + path


def digests_from_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """sha256 by path, from a version's tags."""
    return {name.removeprefix(TAG_DIGEST_PREFIX): v for name, v in tags.items() if name.startswith(TAG_DIGEST_PREFIX)}


def file_digest(path: Path) -> str:
    """sha256 of a local file, hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while chunk := handle.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def refuse_unsafe_files(folder: Path, *, origin: str) -> None:
    """Refuse a folder that holds anything which loading could execute.

    Args:
        folder: A draft on disk.
        origin: Named in messages.

    Raises:
        FormatError: a file could hold pickles or code, or a link leads out of the folder.
    """
    inside = folder.resolve()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() and not path.resolve().is_relative_to(inside):
            raise FormatError(f"{name} of {origin} is a link out of its folder", remedy="Register the draft again")
        if path.is_file() and path.suffix.lower() in UNSAFE_SUFFIXES:
            raise FormatError(
                f"{name} of {origin} can hold pickled objects or code, which Draftline never loads",
                expected="weights in safetensors, and JSON, YAML, Markdown and pictures beside them",
                remedy="Remove the file, find out who put it there, and register the draft again",
            )


def verify_folder(folder: Path, digests: Mapping[str, str], *, origin: str) -> None:
    """Check that every recorded file is there with the recorded bytes, and that nothing was slipped in.

    Args:
        folder: A registered draft on disk.
        digests: sha256 by path, as recorded with the version.
        origin: Named in messages, for example ``support-desk version 3``.

    Raises:
        FormatError: a file is missing or differs; the version records no
            digest of the draft's files (so nothing could be trusted); a file
            lies beside the weights that was not registered; or one could be
            unpickled (:func:`refuse_unsafe_files`).
    """
    refuse_unsafe_files(folder, origin=origin)
    for path in (WEIGHTS_PATH, CONFIG_PATH):
        if path not in digests:
            raise FormatError(
                f"{origin} records no sha256 of {path}",
                got=_listing(digests),
                remedy="It was not registered by Draftline; register the draft again",
            )
    for path, expected in sorted(digests.items()):
        verify_file(folder / path, expected, origin=f"{path} of {origin}")
    for file in sorted((folder / DRAFT_DIR).rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.is_file() and name not in digests:
            raise FormatError(
                f"{name} of {origin} was not registered with it",
                expected=_listing(file for file in digests if file.startswith(f"{DRAFT_DIR}/")),
                remedy="Remove the file, find out who put it there, and register the draft again",
            )


def verify_file(file: Path, expected: str, *, origin: str) -> None:
    """Check one file against its recorded digest.

    Raises:
        FormatError: it is missing or differs.
    """
    if not file.is_file():
        raise FormatError(f"{origin} is missing", remedy="Register the draft again")
    remedy = "Someone changed it after registration; do not serve it, register the draft again"
    require_digest(file_digest(file), expected, f"{origin} is not the file that was registered", remedy)


def _listing(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"
