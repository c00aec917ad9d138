"""Which keys a store accepts; the same rule for every backend, so that a workspace can move between them."""

from __future__ import annotations

from draftline.errors import StorageError

TEMP_MARK = ".draftline-tmp-"
"""First characters of the name of a file that is still being written; no key may use it."""

MAX_KEY_BYTES = 900
"""S3 allows 1024 bytes; the rest is left to the store's own prefix."""

_EXPECTED = "a relative key such as 'draft/3f9a/weights.safetensors'"


def validate_key(key: str) -> str:
    """Check a key and return it.

    Args:
        key: ``/``-separated, relative, without empty, ``.`` or ``..`` parts,
            control characters or backslashes, at most :data:`MAX_KEY_BYTES`
            bytes of UTF-8; no part starts with :data:`TEMP_MARK`.

    Raises:
        StorageError: the key breaks a rule; the message names it.
    """
    problem = _problem(key)
    if problem is None and key.endswith("/"):
        problem = "an empty part"
    if problem is not None:
        raise StorageError(f"The object key has {problem}", got=repr(key), expected=_EXPECTED)
    return key


def validate_prefix(prefix: str) -> str:
    """Check the prefix of a listing (``""``, ``"a/"``, ``"a/b"``) and return it.

    Raises:
        StorageError: no valid key can start like this.
    """
    if prefix:
        problem = _problem(prefix)
        if problem is not None:
            raise StorageError(f"The key prefix has {problem}", got=repr(prefix), expected="the start of a key")
    return prefix


def _problem(key: str) -> str | None:
    """The first broken rule in words; one trailing ``/`` is left to the caller."""
    parts = key.removesuffix("/").split("/")
    if key.startswith("/"):
        return "a leading '/'"
    if "" in parts:
        return "an empty part"
    if "." in parts or ".." in parts:
        return "a part '.' or '..'"
    if "\\" in key or any(ord(character) < 32 or ord(character) == 127 for character in key):
        return "a backslash or a control character"
    if any(part.startswith(TEMP_MARK) for part in parts):
        return f"a part that starts with '{TEMP_MARK}', which is kept for unfinished files"
    try:
        size_bytes = len(key.encode("utf-8"))
    except UnicodeEncodeError:
        return "characters that are not valid Unicode"
    return f"more than {MAX_KEY_BYTES} bytes" if size_bytes > MAX_KEY_BYTES else None
