"""Where prompts come from: the shipped workload, a file, an object, or a folder of them; always bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from urllib.parse import unquote, urlsplit

from draftline.errors import InputError
from draftline.spec.models import BUILTIN_WORKLOADS, PromptsSpec
from draftline.storage import open_store

SUFFIX = ".jsonl"
"""What the files of a folder end with; others are left alone."""

_BUILTIN_PREFIX = "builtin:"
_REMEDY = (
    'Give a .jsonl file with one {"turns": ["..."]} object a line: a path, file:///..., s3://bucket/key.jsonl, '
    "or a folder of such files (s3://bucket/prefix/ with a slash at the end), "
    f"or one of {['builtin:' + name for name in BUILTIN_WORKLOADS]}"
)


@dataclass(frozen=True)
class Source:
    """A prompts file as read.

    Attributes:
        data: Its bytes, whatever they hold.
        system_prompt: The workload's own system prompt; ``None`` for a user's file.
    """

    data: bytes
    system_prompt: str | None = None

    def lines(self) -> Iterator[bytes]:
        """Lines without their ends; only a line feed separates (a JSON string may hold U+2028)."""
        start = 0
        while start < len(self.data):
            end = self.data.find(b"\n", start)
            end = len(self.data) if end < 0 else end
            yield self.data[start:end]
            start = end + 1


def source_digest(spec: PromptsSpec) -> str:
    """Content digest of the source; part of the prompts station's key.

    Returns:
        sha256 (hexadecimal) of the file's bytes; for a shipped workload, of
        its prompts and its system prompt.

    Raises:
        InputError: no such file or workload.
        StorageError: an object that cannot be read.
    """
    source = read_source(spec)
    digest = hashlib.sha256(source.data)
    if source.system_prompt is not None:
        digest.update(b"\0" + source.system_prompt.encode())
    return digest.hexdigest()


def read_source(spec: PromptsSpec) -> Source:
    """Read the whole source; errors as :func:`source_digest`."""
    uri = spec.source
    if uri.startswith(_BUILTIN_PREFIX):
        return _read_builtin(uri.removeprefix(_BUILTIN_PREFIX))
    if _is_folder(uri):
        return Source(_read_folder(uri))
    return Source(read_location(uri, "prompts", _REMEDY))


def _is_folder(uri: str) -> bool:
    if uri.startswith("s3://"):
        return uri.endswith("/") and uri.removeprefix("s3://").strip("/") != ""
    scheme, separator, _ = uri.partition("://")
    if separator and scheme != "file":
        return False
    return Path(unquote(urlsplit(uri).path) if separator else uri).expanduser().is_dir()


def _read_folder(uri: str) -> bytes:
    """All ``.jsonl`` files below a folder, in the order of their names, one after the other."""
    store = open_store(uri)
    keys = [info.key for info in store.list() if info.key.endswith(SUFFIX)]
    if not keys:
        raise InputError(f"there is no {SUFFIX} file below {uri}", remedy=_REMEDY)
    parts = [store.get(key) for key in keys]
    # The last line of a file may lack its end; it must not run into the first of the next.
    return b"".join(part if part.endswith(b"\n") or not part else part + b"\n" for part in parts)


def read_location(uri: str, what: str, remedy: str) -> bytes:
    """The bytes of a file or an object.

    Args:
        uri: A path, ``file:///...`` or ``s3://bucket/key``.
        what: Names its role in messages.
        remedy: What to give instead.

    Raises:
        InputError: there is no such file, or the URI cannot be understood.
        StorageError: an object that cannot be read.
    """
    scheme, separator, _ = uri.partition("://")
    if not separator:
        return _read_file(Path(uri).expanduser(), what, remedy)
    if scheme == "file":
        return _read_file(Path(unquote(urlsplit(uri).path)), what, remedy)
    if scheme == "s3":
        root, _, key = uri.rpartition("/")
        if not key or root.rstrip("/") in ("s3:", "s3:/"):
            raise InputError(f"the {what} URI names no object", got=uri, remedy=remedy)
        return open_store(root).get(key)
    raise InputError(f"the {what} source has an unknown scheme", got=uri, remedy=remedy)


def _read_builtin(name: str) -> Source:
    if name not in BUILTIN_WORKLOADS:
        raise InputError("no such built-in workload", got=name, expected=f"one of {list(BUILTIN_WORKLOADS)}")
    folder = resources.files("draftline.workloads") / name.replace("-", "_")
    system_prompt = (folder / "system_prompt.txt").read_text(encoding="utf-8").strip()
    return Source((folder / "prompts.jsonl").read_bytes(), system_prompt)


def _read_file(path: Path, what: str, remedy: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"there is no {what} file at {path}", remedy=remedy) from None
    except IsADirectoryError:
        raise InputError(f"the {what} source {path} is a directory", remedy=remedy) from None
    except OSError as error:
        raise InputError(
            f"cannot read the {what} file {path}: {error.strerror}", remedy="Check its permissions"
        ) from None
