"""Which caches a workspace holds, from names, sizes and manifests alone; no tensors.

A cache is a folder ``hidden-states/<key>`` of objects that the hidden-states
step writes: shards, an entry beside each, token counts, and the step's
``result.json`` once it is finished. In stream mode there are no shards: the
manifest names the token shards that are captured anew as training needs them.
Whatever else lies there is foreign and is never touched.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from draftline.cache.header import ShardHeader, read_header
from draftline.cache.manifest import COUNTS_FILE, FORMAT_VERSION, KIND, STREAM_KIND, Manifest, ShardInfo
from draftline.errors import FormatError, InputError, ObjectNotFound
from draftline.steps.ledger import RESULT_VERSION, StepResult
from draftline.steps.stations import KEY_LENGTH
from draftline.storage import open_store
from draftline.storage.base import ObjectInfo, ObjectStore
from draftline.storage.uri import parse_uri

STATION = "hidden-states"
RESULT_FILE = "result.json"

_KEY = re.compile(rf"[0-9a-f]{{{KEY_LENGTH}}}")
_SHARD = re.compile(r"[a-z]+-\d{5,}\.safetensors")
_ENTRY = re.compile(r"[a-z]+-\d{5,}\.safetensors\.json")
_NUM_READERS = 8

State = Literal["finished", "unfinished", "unreadable"]


@dataclass(frozen=True)
class CacheFolder:
    """The objects of one cache.

    Attributes:
        key: Content key of its step.
        objects: What is there, by name within the folder.
        manifest: ``None`` while the capture is not finished, or when ``problem`` says why it cannot be read.
        source: Folder of the shards that the manifest names, where it is not this one (stream mode).
        problem: What is wrong with ``result.json``.
        is_newer: A version of Draftline wrote it that knows more than this one.
    """

    key: str
    objects: dict[str, ObjectInfo]
    manifest: Manifest | None = None
    source: str = ""
    problem: str = ""
    is_newer: bool = False

    @property
    def prefix(self) -> str:
        """The folder in the workspace."""
        return f"{STATION}/{self.key}"

    @property
    def state(self) -> State:
        """Whether the step has committed its result."""
        if RESULT_FILE not in self.objects:
            return "unfinished"
        return "unreadable" if self.manifest is None else "finished"

    @property
    def modified_s(self) -> float:
        """When anything in it was last written."""
        return max((info.modified_s for info in self.objects.values()), default=0.0)

    @property
    def entries(self) -> list[str]:
        """Names of the entries beside shards, in order."""
        return sorted(name for name in self.objects if _ENTRY.fullmatch(name))


@dataclass(frozen=True)
class CacheSummary:
    """One line of ``draftline cache ls``.

    Attributes:
        key: Content key.
        state: ``finished``, ``unfinished``, or ``unreadable`` (a damaged or newer manifest).
        mode: ``store``, or ``stream`` where no hidden states are kept.
        codec: Of the hidden states, ``""`` when nothing says.
        target: The target's fingerprint, ``""`` when nothing says.
        num_samples: Of the shards that are finished.
        num_tokens: Of them, too.
        num_shards: Of them, too.
        size_bytes: Of every object in the folder.
        modified_s: When it was finished, or last written to (Unix time).
    """

    key: str
    state: State
    mode: Literal["store", "stream"]
    codec: str
    target: str
    num_samples: int
    num_tokens: int
    num_shards: int
    size_bytes: int
    modified_s: float


def open_workspace(uri: str) -> tuple[ObjectStore, str | None]:
    """The workspace at a URI, and the key of a single cache when the URI is that cache's folder.

    Raises:
        InputError: there is no such directory.
        SpecError: the URI is malformed.
    """
    trimmed = uri.rstrip("/")
    workspace, _, key = trimmed.rpartition(f"/{STATION}/")
    if not (workspace and _KEY.fullmatch(key)):
        workspace, key = trimmed, ""
    place = parse_uri(workspace)
    if isinstance(place, Path) and not place.is_dir():
        raise InputError(f"there is no workspace at {workspace}", remedy="Name a run's workspace: a directory or s3://")
    return open_store(workspace), key or None


def find_caches(store: ObjectStore, only_key: str | None = None) -> Iterator[CacheFolder]:
    """The caches of a workspace in the order of their keys, one at a time.

    Args:
        store: The workspace.
        only_key: Look at this one alone.

    Raises:
        StorageError: the workspace cannot be read.
    """
    prefix = f"{STATION}/{only_key}/" if only_key else f"{STATION}/"
    key, objects = "", dict[str, ObjectInfo]()
    for info in store.list(prefix):
        found, _, name = info.key.removeprefix(f"{STATION}/").partition("/")
        if not (name and _KEY.fullmatch(found)):
            continue
        if found != key and objects:
            yield _with_manifest(store, key, objects)
            objects = {}
        key = found
        objects[name] = info
    if objects:
        yield _with_manifest(store, key, objects)


def read_cache(store: ObjectStore, key: str) -> CacheFolder:
    """One cache as it is now; empty when nothing is there."""
    return next(find_caches(store, key), CacheFolder(key, {}))


def is_cache_object(name: str) -> bool:
    """Whether the hidden-states step writes objects of this name (within its folder)."""
    return name in (RESULT_FILE, COUNTS_FILE) or bool(_SHARD.fullmatch(name) or _ENTRY.fullmatch(name))


def is_shard(name: str) -> bool:
    """Whether shards have names like this."""
    return bool(_SHARD.fullmatch(name))


def named_objects(cache: CacheFolder) -> set[str]:
    """Names of all objects that belong to a finished cache."""
    shards = {info.name for info in cache.manifest.shards} if cache.manifest and not cache.source else set()
    return {RESULT_FILE, COUNTS_FILE, *shards, *(f"{name}.json" for name in shards)}


def read_entries(store: ObjectStore, cache: CacheFolder) -> list[ShardInfo]:
    """What the entries beside the shards of an unfinished cache say; a damaged or vanished one is passed over."""

    def read(name: str) -> ShardInfo | None:
        try:
            return ShardInfo(**json.loads(store.get(f"{cache.prefix}/{name}")))
        except (ObjectNotFound, ValueError, TypeError):
            return None

    with ThreadPoolExecutor(_NUM_READERS) as pool:
        return [info for info in pool.map(read, cache.entries) if info is not None and info.name in cache.objects]


def summarise(store: ObjectStore, cache: CacheFolder) -> CacheSummary:
    """The line of one cache.

    Raises:
        StorageError: its entries cannot be read.
    """
    manifest = cache.manifest
    shards: Sequence[ShardInfo] = manifest.shards if manifest else read_entries(store, cache)
    header = None if manifest else _first_header(store, cache)
    result = cache.objects.get(RESULT_FILE)
    return CacheSummary(
        key=cache.key,
        state=cache.state,
        mode="stream" if cache.source else "store",
        codec=manifest.codec if manifest else header.codec if header else "",
        target=manifest.target if manifest else header.target if header else "",
        num_samples=sum(s.num_samples for s in shards),
        num_tokens=sum(s.num_tokens for s in shards),
        num_shards=len(shards),
        size_bytes=sum(info.size_bytes for info in cache.objects.values()),
        modified_s=result.modified_s if result else cache.modified_s,
    )


def _with_manifest(store: ObjectStore, key: str, objects: dict[str, ObjectInfo]) -> CacheFolder:
    if RESULT_FILE not in objects:
        return CacheFolder(key, objects)
    path = f"{STATION}/{key}/{RESULT_FILE}"
    try:
        data = store.get(path)
    except ObjectNotFound:
        # Somebody removed it since the listing.
        return CacheFolder(key, {name: info for name, info in objects.items() if name != RESULT_FILE})
    try:
        outputs = StepResult.from_json(data, origin=path).outputs
        is_stream = outputs.get("kind") == STREAM_KIND
        manifest = Manifest.from_json(outputs, kind=STREAM_KIND if is_stream else KIND)
        source = str(outputs.get("source", "")) if is_stream else ""
        return CacheFolder(key, objects, manifest, source)
    except FormatError as error:
        return CacheFolder(key, objects, problem=str(error), is_newer=_is_newer(data))


def _is_newer(result: bytes) -> bool:
    try:
        document = json.loads(result)
        return bool(document["version"] > RESULT_VERSION or document["outputs"]["format"] > FORMAT_VERSION)
    except (ValueError, KeyError, TypeError):
        return False


def _first_header(store: ObjectStore, cache: CacheFolder) -> ShardHeader | None:
    for name in sorted(cache.objects):
        if is_shard(name):
            with contextlib.suppress(FormatError, ObjectNotFound):
                if (header := read_header(store, f"{cache.prefix}/{name}")) is not None:
                    return header
    return None
