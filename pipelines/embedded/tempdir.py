"""The short temporary directory in which Ray keeps its session.

Ray puts Unix sockets below it, and a Unix socket's path holds at most 107
bytes; a directory below the user's home would not do.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
from pathlib import Path

from draftline.errors import PlatformError

_SENTINEL = ".draftline-platform"
_SOCKET_PATH_BYTES = 107
# What Ray appends: /session_2026-01-31_23-59-59_123456_4194304/sockets/plasma_store
_RAY_SUFFIX_BYTES = 70


def choose_temp_dir() -> Path:
    """Pick a new, short path; nothing is created yet.

    Raises:
        PlatformError: The system's temporary directory has too long a name.
    """
    name = f"dl-{secrets.token_hex(4)}"
    # Safe in a shared directory: the name is random, the mode 0700.
    for base in (Path(tempfile.gettempdir()), Path("/tmp")):
        path = base.resolve() / name
        if len(os.fsencode(path)) + _RAY_SUFFIX_BYTES <= _SOCKET_PATH_BYTES and base.is_dir():
            return path
    raise PlatformError(
        "The temporary directory's name is too long for Ray's sockets",
        got=tempfile.gettempdir(),
        expected=f"at most {_SOCKET_PATH_BYTES - _RAY_SUFFIX_BYTES - len(name) - 1} bytes",
        remedy="Set TMPDIR to a shorter directory",
    )


def create_temp_dir(path: Path, signature: str) -> None:
    """Create the directory, readable by this user alone, and sign it: ``<platform id>:<home>``."""
    path.mkdir(mode=0o700)
    (path / _SENTINEL).write_text(signature, encoding="utf-8")
    (path / "tmp").mkdir()


def find_temp_dirs(home: Path) -> list[Path]:
    """Find the temporary directories that platforms of one home have left, known by their signature."""
    found = []
    for base in {Path(tempfile.gettempdir()).resolve(), Path("/tmp")}:
        for path in base.glob("dl-*"):
            if _signature(path).partition(":")[2] == str(home):
                found.append(path)
    return found


def retire_temp_dir(path: Path, signature: str | None, logs_dir: Path) -> bool:
    """Keep Ray's own logs as far as they can be copied, then remove the directory.

    A directory that does not carry this platform's signature was not made by
    it and is left alone.

    Args:
        path: The directory; may be gone already.
        signature: What it must be signed with; None accepts any signature.
        logs_dir: Ray's logs are moved to ``ray-session`` in here, in place of the previous ones.

    Returns:
        True if a directory was removed.
    """
    found = _signature(path)
    if not found or signature not in (None, found):
        return False
    session_logs = [logs for logs in path.glob("session_*/logs") if not logs.parent.is_symlink()]
    if session_logs:
        kept = logs_dir / "ray-session"
        shutil.rmtree(kept, ignore_errors=True)
        # The copy is a courtesy: a full disk must not keep the platform from being cleaned up.
        with contextlib.suppress(OSError):
            shutil.copytree(session_logs[-1], kept, symlinks=True, ignore_dangling_symlinks=True, dirs_exist_ok=True)
    shutil.rmtree(path, ignore_errors=True)
    return not path.exists()


def _signature(path: Path) -> str:
    try:
        return (path / _SENTINEL).read_text(encoding="utf-8")
    except OSError:
        return ""
