"""Compile the kernels for this machine, once."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from draftline.cache_dir import default_cache_dir

logger = logging.getLogger(__name__)

FLAGS = ("-O3", "-std=c++17", "-fopenmp", "-fPIC", "-shared")
_SOURCES = Path(__file__).parent
_COMPILERS = ("g++", "clang++", "c++")


def find_compiler() -> list[str] | None:
    """The C++ compiler's command: ``$CXX``, or the first usual one on the path."""
    chosen = shlex.split(os.environ.get("CXX", ""))
    for command in [chosen] if chosen else [[name] for name in _COMPILERS]:
        if (path := shutil.which(command[0])) is not None:
            return [path, *command[1:]]
    return None


def build_kernels(folder: Path | None = None) -> Path | None:
    """The shared library of the kernels; compiled if it is not there yet (about two seconds).

    Its name holds a digest of sources, flags, compiler and processor, so a
    cache that several kinds of machines share never serves the wrong one.

    Args:
        folder: Where it is kept; below the user's cache by default.

    Returns:
        ``None`` where there is no compiler or it fails; one log line says so.
    """
    compiler = find_compiler()
    if compiler is None:
        _warn("no C++ compiler was found", "Install g++ to have them")
        return None
    try:
        folder = _writable(folder or default_cache_dir() / "native")
        library = folder / f"kernels-{_digest(compiler)}.so"
        with open(folder / ".lock", "w", encoding="ascii") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if not library.is_file():
                compile_kernels(compiler, library)
    except subprocess.SubprocessError as error:
        said = error.stderr if isinstance(error, subprocess.CalledProcessError) else None
        said = said.decode(errors="replace") if isinstance(said, bytes) else said
        _warn(f"{compiler[0]} failed: {(said or str(error)).strip()[:300]}", "Install a recent g++ or clang++")
        return None
    except OSError as error:
        _warn(f"they could not be written ({error})", "Make the cache directory writable")
        return None
    return library


def _warn(reason: str, remedy: str) -> None:
    logger.warning("CPU kernels are not used, steps are slower: %s. %s.", reason, remedy)


def _writable(folder: Path) -> Path:
    """The folder, or a temporary one of this process where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="draftline-native-"))


def _sources() -> list[Path]:
    return sorted([*_SOURCES.glob("*.h"), *_SOURCES.glob("*.cpp")])


def source_digest() -> str:
    """What the libraries of one version of the kernels share: a digest of their sources and flags."""
    digest = hashlib.sha256(repr(FLAGS).encode())
    for source in _sources():
        digest.update(source.read_bytes())
    return digest.hexdigest()[:20]


def _digest(compiler: Sequence[str]) -> str:
    digest = hashlib.sha256(repr((source_digest(), compiler)).encode())
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=True)
    digest.update(version.stdout)
    try:
        processor = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        processor = []
    # -march=native follows these.
    digest.update("\n".join(sorted({line for line in processor if line.startswith(("model name", "flags"))})).encode())
    return digest.hexdigest()[:20]


def compile_kernels(compiler: Sequence[str], library: Path, *, machine: str = "native") -> None:
    """Compile the kernels; the library appears whole or not at all.

    Args:
        compiler: The command, see :func:`find_compiler`.
        library: The file to write.
        machine: The processor, in the compiler's words (``-march``).

    Raises:
        subprocess.CalledProcessError: the compiler refused; what it said is in ``stderr``.
    """
    temporary = library.with_suffix(f".{os.getpid()}.tmp")
    command = [*compiler, *FLAGS, f"-march={machine}", str(_SOURCES / "kernels.cpp"), "-o", str(temporary)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
        temporary.rename(library)
    finally:
        temporary.unlink(missing_ok=True)
