"""Look at the files of a registered draft without loading a tensor."""

from __future__ import annotations

import json
from pathlib import Path

from draftline.gate import DraftFile
from draftline.registry_layout import CALIBRATION_FILE, CONFIG_PATH, DRAFT_DIR, WEIGHTS_PATH


def inspect_files(folder: Path) -> tuple[DraftFile, ...]:
    """Size and format of every file that a server would load, in the order of their paths.

    Safetensors headers are read and compared with the file's length (the
    library refuses gaps, overlaps and missing bytes); JSON must be an object.

    Args:
        folder: Laid out as in :mod:`draftline.registry_layout`.
    """
    paths = {WEIGHTS_PATH, CONFIG_PATH}
    paths |= {path.relative_to(folder).as_posix() for path in (folder / DRAFT_DIR).rglob("*") if path.is_file()}
    if (folder / CALIBRATION_FILE).is_file():
        paths.add(CALIBRATION_FILE)
    return tuple(_inspect(folder / path, path) for path in sorted(paths))


def _inspect(file: Path, path: str) -> DraftFile:
    if not file.is_file():
        return DraftFile(path, 0, "missing")
    problem = ""
    if file.suffix == ".safetensors":
        problem = _safetensors_problem(file)
    elif file.suffix == ".json":
        problem = _json_problem(file)
    return DraftFile(path, file.stat().st_size, problem)


def _safetensors_problem(file: Path) -> str:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as weights:
            return "" if weights.keys() else "holds no tensor"
    except (SafetensorError, OSError) as error:
        return f"not safetensors ({error})"


def _json_problem(file: Path) -> str:
    try:
        document = json.loads(file.read_bytes())
    except ValueError as error:
        return f"not JSON ({error})"
    return "" if isinstance(document, dict) else "not a JSON object"
