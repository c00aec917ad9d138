"""One way to say that bytes are not the ones that were recorded."""

from __future__ import annotations

import hashlib

from draftline.errors import FormatError


def digest_of(data: bytes) -> str:
    """sha256, hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def require_digest(found: str, expected: str, what: str, remedy: str) -> None:
    """Check a digest against its record.

    Args:
        found: sha256 of what is there.
        expected: sha256 of what was recorded.
        what: Says what is wrong when they differ.
        remedy: Says what to do about it.

    Raises:
        FormatError: they differ.
    """
    if found != expected:
        raise FormatError(what, got=f"sha256 {found}", expected=expected, remedy=remedy)
