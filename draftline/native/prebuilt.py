"""Kernels compiled ahead, for images without a compiler: one library for each level of x86-64.

``python -m draftline.native.prebuilt DIR`` compiles them where an image is
built. Where it runs, ``DRAFTLINE_KERNELS`` names the folder, and the highest
level that the processor has is taken. Levels are those of the x86-64 psABI
(https://gitlab.com/x86-psABIs/x86-64-ABI), which GCC and Clang know by name.
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

from draftline.native.build import compile_kernels, find_compiler, source_digest

FOLDER_ENV = "DRAFTLINE_KERNELS"
"""Names the folder of kernels that were compiled ahead."""

_V3 = frozenset({"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"})
_V4 = frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"})
LEVELS = {"x86-64-v4": _V3 | _V4, "x86-64-v3": _V3, "x86-64-v2": frozenset({"sse4_2", "ssse3", "popcnt"})}
"""Flags in ``/proc/cpuinfo`` that stand for each level, best level first."""


def prebuilt_kernels() -> Path | None:
    """The library that fits this processor and these sources; ``None`` where none was compiled ahead."""
    folder = os.environ.get(FOLDER_ENV)
    if not folder:
        return None
    flags = _processor_flags()
    for level, needed in LEVELS.items():
        if needed <= flags and (library := _library(Path(folder), level)).is_file():
            return library
    return None


def build_all(folder: Path) -> list[Path]:
    """Compile every level into a folder.

    Returns:
        The libraries; none on a processor that is not x86-64, where kernels are compiled on first use.

    Raises:
        FileNotFoundError: there is no C++ compiler.
        subprocess.CalledProcessError: it failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if platform.machine() != "x86_64":
        return []
    compiler = find_compiler()
    if compiler is None:
        raise FileNotFoundError("no C++ compiler on the path; install g++")
    libraries = [_library(folder, level) for level in LEVELS]
    for level, library in zip(LEVELS, libraries, strict=True):
        compile_kernels(compiler, library, machine=level)
    return libraries


def _library(folder: Path, level: str) -> Path:
    return folder / f"kernels-{level}-{source_digest()}.so"


def _processor_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    line = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(line.partition(":")[2].split())


if __name__ == "__main__":
    for built in build_all(Path(sys.argv[1])):
        print(built)
