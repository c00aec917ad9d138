"""What a registered draft looks like: file names, tag names, digest check. No registry client.

Writers (the register step) and readers (the gate, the server) share it, so
that neither imports the other.

.. code-block:: text

    draft/config.json  draft/model.safetensors   the weights
    calibration.json                             temperatures and step costs
    spec.yaml                                    the run's whole spec
    card.md  metrics.json  *.png                 the report
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
TAG_DIGEST_PREFIX = "draftline.sha256."
TAG_DRIFT = "draftline.drift"
"""Set by a server on the version it serves: the newest drift event as JSON. Retraining on drift looks for it."""

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


def verify_folder(folder: Path, digests: Mapping[str, str], *, origin: str) -> None:
    """Check that every recorded file is there with the recorded bytes.

    Args:
        folder: A registered draft on disk.
        digests: sha256 by path, as recorded with the version.
        origin: Named in messages, for example ``support-desk version 3``.

    Raises:
        FormatError: a file is missing or differs, or the version records no
            digest of the draft's files (so nothing could be trusted).
    """
    for path in (WEIGHTS_PATH, CONFIG_PATH):
        if path not in digests:
            raise FormatError(
                f"{origin} records no sha256 of {path}",
                got=_listing(digests),
                remedy="It was not registered by Draftline; register the draft again",
            )
    for path, expected in sorted(digests.items()):
        verify_file(folder / path, expected, origin=f"{path} of {origin}")


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
