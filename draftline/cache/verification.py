"""Read every shard that a cache names and say which are not what was written; no tensors, bounded memory.

A shard is read in pieces by range requests, several shards at a time: memory
does not grow with the size of shards or caches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from draftline.cache.catalogue import (
    RESULT_FILE,
    CacheFolder,
    is_cache_object,
    named_objects,
    read_cache,
    read_entries,
)
from draftline.cache.container import FORMAT_VERSION, FORMAT_VERSIONS
from draftline.cache.header import ShardHeader, header_size, parse_header
from draftline.cache.manifest import COUNTS_FILE, Manifest, ShardInfo
from draftline.errors import FormatError, ObjectNotFound
from draftline.storage.base import ObjectStore

CHUNK_BYTES = 8 << 20
"""One range request."""

NUM_READERS = 4
"""Shards read at a time."""

Kind = Literal["truncated", "flipped", "missing", "foreign", "newer", "leftover", "unreadable"]

REPAIRABLE: frozenset[str] = frozenset({"truncated", "flipped", "missing"})
"""Kinds that capturing again repairs; the others are somebody's files, or a newer Draftline's."""

_CAPTURE_AGAIN = (
    "Run `draftline cache verify URI --repair` and then the pipeline again: only the damaged shards are captured anew"
)
_TOKENS_AGAIN = "Delete the folder of that tokens step and run the pipeline again"
_FOREIGN = "Move it elsewhere, then do as for a missing shard"
_UPGRADE = "Upgrade Draftline, or use the workspace with the version that wrote it"
_COLLECT = "`draftline cache gc URI --delete` removes it"
_NOT_OURS = "Move it elsewhere; `draftline cache gc` leaves alone what the capture did not write"


@dataclass(frozen=True)
class Finding:
    """One object that is not as it should be.

    Attributes:
        object: Its key in the workspace.
        cache: Content key of the cache that it belongs to.
        kind: ``truncated`` (shorter or longer than recorded), ``flipped``
            (other bytes of the same length), ``missing``, ``foreign`` (not a
            shard of this cache at all), ``newer`` (a format this version does
            not know), ``leftover`` (no manifest names it) or ``unreadable`` (a
            damaged manifest).
        detail: What was found and what was expected.
        remedy: What to do about it.
    """

    object: str
    cache: str
    kind: Kind
    detail: str
    remedy: str


@dataclass(frozen=True)
class Check:
    """One shard to be read.

    Attributes:
        cache: Content key of its cache.
        object: Its key in the workspace.
        expected: What the manifest, or the entry beside it, says.
        found_bytes: Its size in the listing, ``None`` when it is absent.
        manifest: Of the cache, ``None`` while that is unfinished.
        is_source: A token shard, which stream mode reads.
    """

    cache: str
    object: str
    expected: ShardInfo
    found_bytes: int | None
    manifest: Manifest | None
    is_source: bool = False


def plan_checks(store: ObjectStore, caches: Iterable[CacheFolder]) -> tuple[list[Check], list[Finding]]:
    """What must be read, and what is wrong by names alone.

    Raises:
        StorageError: the workspace cannot be read.
    """
    checks: list[Check] = []
    findings: list[Finding] = []
    for cache in caches:
        findings += _findings_by_name(cache)
        if cache.source:
            checks += _source_checks(store, cache)
        elif cache.state != "unreadable":
            named = cache.manifest.shards if cache.manifest else read_entries(store, cache)
            sizes = {name: info.size_bytes for name, info in cache.objects.items()}
            checks += [
                Check(cache.key, f"{cache.prefix}/{info.name}", info, sizes.get(info.name), cache.manifest)
                for info in named
            ]
    return checks, findings


def run_checks(
    store: ObjectStore, checks: Sequence[Check], on_read: Callable[[int], None] = lambda num_bytes: None
) -> Iterator[Finding]:
    """Read the shards and yield what is wrong, in the order of the checks.

    Args:
        store: The workspace.
        checks: From :func:`plan_checks`.
        on_read: Called with the number of bytes read since the last call, from several threads.

    Raises:
        StorageError: the workspace cannot be read.
    """
    with ThreadPoolExecutor(NUM_READERS) as pool:
        for finding in _in_order(pool, lambda check: check_shard(store, check, on_read), checks):
            if finding is not None:
                yield finding


def check_shard(
    store: ObjectStore, check: Check, on_read: Callable[[int], None] = lambda num_bytes: None
) -> Finding | None:
    """Read one shard in pieces and compare it with its record; ``None`` when all is well.

    Raises:
        StorageError: it cannot be read.
    """
    if check.found_bytes is None:
        return _finding(check, "missing", f"no such object; expected {check.expected.size_bytes} bytes")
    digest, size_bytes, first = hashlib.sha256(), 0, b""
    try:
        while True:
            data = store.get_range(check.object, size_bytes, CHUNK_BYTES)
            digest.update(data)
            if not size_bytes:
                first = _with_whole_header(store, check.object, data)
            size_bytes += len(data)
            on_read(len(data))
            if len(data) < CHUNK_BYTES:
                break
    except ObjectNotFound:
        return _finding(check, "missing", "it vanished while it was read")
    return _judge(check, first, size_bytes, digest.hexdigest())


def repair(store: ObjectStore, findings: Iterable[Finding]) -> list[str]:
    """Remove what capturing again replaces: damaged shards with their entries, and before them the manifest.

    Only shards of hidden states are removed, and only those that the findings
    name as truncated, flipped or missing.

    Returns:
        The keys that were removed, in order.

    Raises:
        StorageError: an object cannot be removed.
    """
    removed: list[str] = []
    damaged: dict[str, list[str]] = {}
    for finding in findings:
        if finding.kind in REPAIRABLE and finding.object.startswith("hidden-states/"):
            damaged.setdefault(finding.cache, []).append(finding.object)
    for key, objects in damaged.items():
        present = read_cache(store, key)
        # The manifest first: nobody may find one that names what is gone.
        for name in (f"{present.prefix}/{RESULT_FILE}", *(n for o in objects for n in (f"{o}.json", o))):
            if name.removeprefix(f"{present.prefix}/") in present.objects:
                store.delete(name)
                removed.append(name)
    return removed


def _findings_by_name(cache: CacheFolder) -> list[Finding]:
    found: list[Finding] = []
    if cache.state == "unreadable":
        kind: Kind = "newer" if cache.is_newer else "unreadable"
        remedy = _UPGRADE if cache.is_newer else "Delete it and run the pipeline again: finished shards are kept"
        found.append(Finding(f"{cache.prefix}/{RESULT_FILE}", cache.key, kind, cache.problem, remedy))
    named = named_objects(cache) if cache.state == "finished" else set()
    for name in sorted(cache.objects):
        path = f"{cache.prefix}/{name}"
        if not is_cache_object(name):
            found.append(Finding(path, cache.key, "foreign", "the capture writes no such object", _NOT_OURS))
        elif named and name not in named:
            found.append(Finding(path, cache.key, "leftover", "the manifest does not name it", _COLLECT))
    if cache.state == "finished" and COUNTS_FILE not in cache.objects:
        detail = "no such object; training reads it"
        found.append(Finding(f"{cache.prefix}/{COUNTS_FILE}", cache.key, "missing", detail, _CAPTURE_AGAIN))
    return found


def _source_checks(store: ObjectStore, cache: CacheFolder) -> list[Check]:
    assert cache.manifest is not None
    sizes = {info.key: info.size_bytes for info in store.list(f"{cache.source}/")}
    return [
        Check(cache.key, path, info, sizes.get(path), None, is_source=True)
        for info in cache.manifest.shards
        for path in (f"{cache.source}/{info.name}",)
    ]


def _judge(check: Check, first: bytes, size_bytes: int, digest: str) -> Finding | None:
    """Compare what was read with what is recorded; the header tells damage from a stranger's file."""
    expected, is_other_size = check.expected, size_bytes != check.expected.size_bytes
    try:
        header = parse_header(first)
    except FormatError as error:
        # A stranger's file is seldom of the very size that is recorded, and a shard that was cut keeps its beginning.
        if is_other_size and not _begins_like_a_shard(first):
            return _finding(check, "foreign", error.what)
    else:
        if header is None:
            return _finding(check, "foreign", "an intact file that is no Draftline shard")
        known = FORMAT_VERSIONS.get(header.kind, FORMAT_VERSION)
        if header.version > known:
            return _finding(check, "newer", f"shard format {header.version}; expected up to {known}")
        if stranger := _stranger(check, header):
            return _finding(check, "foreign", stranger)
    if is_other_size:
        return _finding(check, "truncated", f"{size_bytes} bytes; expected {expected.size_bytes}")
    if digest != expected.sha256:
        return _finding(check, "flipped", f"sha256 {digest[:12]}; expected {expected.sha256[:12]}")
    return None


def _stranger(check: Check, header: ShardHeader) -> str:
    """Why an intact header is not one of this cache, ``""`` when it is."""
    manifest = check.manifest
    kind = "tokens" if check.is_source else "hidden-states"
    if header.kind != kind:
        return f"a shard of {header.kind}; expected {kind}"
    if manifest is not None and header.target != manifest.target:
        return f"a shard of target {header.target[:12]}; expected {manifest.target[:12]}"
    if manifest is not None and header.codec != manifest.codec:
        return f"a shard of codec {header.codec}; expected {manifest.codec}"
    return ""


def _begins_like_a_shard(first: bytes) -> bool:
    """Whether what is there could be the beginning of a shard, an empty file included."""
    try:
        return not first or (header_size(first) > len(first) and first[8:9] in (b"{", b""))
    except FormatError:
        return False


def _with_whole_header(store: ObjectStore, key: str, data: bytes) -> bytes:
    """The first piece of a file, with the rest of a header that is longer than the piece."""
    try:
        missing_bytes = header_size(data) - len(data)
    except FormatError:
        return data
    return data + store.get_range(key, len(data), missing_bytes) if missing_bytes > 0 else data


def _finding(check: Check, kind: Kind, detail: str) -> Finding:
    remedies = {"newer": _UPGRADE, "foreign": _FOREIGN}
    remedy = remedies.get(kind, _TOKENS_AGAIN if check.is_source else _CAPTURE_AGAIN)
    return Finding(check.object, check.cache, kind, detail, remedy)


def _in_order(
    pool: ThreadPoolExecutor, function: Callable[[Check], Finding | None], checks: Sequence[Check]
) -> Iterator[Finding | None]:
    """Results in the order of the work, with no more of it handed out than a few times the readers."""
    waiting: list[Future[Finding | None]] = []
    rest = iter(checks)
    try:
        while True:
            waiting += [pool.submit(function, check) for check in islice(rest, 4 * NUM_READERS - len(waiting))]
            if not waiting:
                return
            wait(waiting[:1], return_when=FIRST_COMPLETED)
            yield waiting.pop(0).result()
    finally:
        for future in waiting:
            future.cancel()
