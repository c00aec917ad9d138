"""A checkpoint folder's contents, read as they are: one JSON document and safetensors.

Nothing here unpickles: a folder that holds only pickled weights is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import load_file
from safetensors.torch import save as save_safetensors
from torch import Tensor

from draftline.errors import FormatError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class CheckpointFiles:
    """What a checkpoint holds, in its own words.

    Attributes:
        origin: Where it is from, for messages.
        document: ``config.json``.
        tensors: All tensors of all its weight files.
    """

    origin: str
    document: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def read_folder_files(folder: Path) -> CheckpointFiles:
    """Read a checkpoint folder; its weights may be in one file or in shards with an index.

    Raises:
        FormatError: a file is missing, truncated or damaged, or the weights are pickled.
    """
    origin = str(folder)
    config = folder / CONFIG_FILE
    if not config.is_file():
        raise FormatError(
            f"no draft in {origin}",
            got=f"no {CONFIG_FILE}",
            remedy="Point to a folder that holds config.json and model.safetensors",
        )
    document = parse_document(config.read_bytes(), f"{origin}: {CONFIG_FILE}")
    tensors: dict[str, Tensor] = {}
    for name in _weight_files(folder):
        try:
            part = load_file(folder / name)
        except (SafetensorError, OSError) as error:
            raise FormatError(
                f"{origin}: {name} is damaged ({error})", remedy="Copy or export the draft again"
            ) from None
        twice = part.keys() & tensors.keys()
        if twice:
            raise FormatError(f"{origin}: {sorted(twice)[0]} is in two weight files", remedy="Export the draft again")
        tensors |= part
    return CheckpointFiles(origin, document, tensors)


def read_file_bytes(config: bytes, weights: bytes, *, origin: str) -> CheckpointFiles:
    """The same from the contents of ``config.json`` and ``model.safetensors``.

    Raises:
        FormatError: one of them is damaged.
    """
    document = parse_document(config, f"{origin}: {CONFIG_FILE}")
    try:
        return CheckpointFiles(origin, document, load_safetensors(weights))
    except SafetensorError as error:
        raise FormatError(f"{origin}: {WEIGHTS_FILE} is damaged ({error})", remedy="Export the draft again") from None


def render_files(document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
    """File contents; equal inputs give equal bytes."""
    config = json.dumps(document, indent=2, sort_keys=True) + "\n"
    ordered = {name: value.contiguous() for name, value in sorted(tensors.items())}
    return {CONFIG_FILE: config.encode(), WEIGHTS_FILE: save_safetensors(ordered, {"format": "pt"})}


def parse_document(data: bytes, what: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        FormatError: it is none.
    """
    try:
        document = json.loads(data)
    except ValueError as error:
        raise FormatError(f"{what} is damaged ({error})", remedy="Export the draft again") from None
    if not isinstance(document, dict):
        raise FormatError(f"{what} holds no object", got=type(document).__name__, expected="a JSON object")
    return document


def _weight_files(folder: Path) -> list[str]:
    if (folder / WEIGHTS_FILE).is_file():
        return [WEIGHTS_FILE]
    if (folder / INDEX_FILE).is_file():
        return _indexed_files(folder)
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise FormatError(
            f"{folder} holds pickled weights, which Draftline never loads",
            got=", ".join(pickles[:3]),
            expected=WEIGHTS_FILE,
            remedy="Save the model as safetensors with the project that wrote it",
        )
    raise FormatError(
        f"no draft in {folder}",
        got=f"no {WEIGHTS_FILE}",
        remedy="Point to a folder that holds config.json and model.safetensors",
    )


def _indexed_files(folder: Path) -> list[str]:
    what = f"{folder}: {INDEX_FILE}"
    weight_map = parse_document((folder / INDEX_FILE).read_bytes(), what).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{what} has no weight_map", remedy="Export the draft again")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        # A path would lead out of the folder.
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise FormatError(f"{what} names a file that is none of the folder", got=name, expected="*.safetensors")
        if not (folder / name).is_file():
            raise FormatError(f"{folder} lacks a weight file", got=f"no {name}", remedy="Copy the draft again")
    return names
