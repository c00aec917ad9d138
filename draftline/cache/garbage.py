"""What of a workspace's caches nobody can use any more, and its removal; no tensors.

Three kinds of garbage, each only when nothing in its folder was written for a
while (so that a running capture is never disturbed):

- ``unfinished``: every object of a capture that did not end;
- ``leftover``: an object of a finished cache that its manifest does not name;
- ``unreferenced``: a finished cache from which no draft was trained; asked for
  by name only, since such a cache may be waiting for its training.

What the hidden-states step would not have written is never removed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from draftline.cache.catalogue import (
    RESULT_FILE,
    CacheFolder,
    find_caches,
    is_cache_object,
    is_shard,
    named_objects,
    read_cache,
)
from draftline.cache.header import read_header
from draftline.errors import FormatError, ObjectNotFound
from draftline.steps.ledger import StepResult
from draftline.storage.base import ObjectStore

DEFAULT_AGE_S = 7 * 24 * 3600.0
_NUM_WORKERS = 8

Reason = Literal["unfinished", "leftover", "unreferenced"]


@dataclass(frozen=True)
class GarbageRules:
    """What counts as garbage.

    Attributes:
        older_than_s: A folder in which anything was written more recently is left alone.
        now_s: Unix time to reckon from.
        enable_unreferenced: Finished caches that no draft came from count, too.
    """

    older_than_s: float
    now_s: float
    enable_unreferenced: bool = False


@dataclass(frozen=True)
class Garbage:
    """One object that may go."""

    object: str
    cache: str
    size_bytes: int
    reason: Reason


@dataclass(frozen=True)
class Kept:
    """Something that looks unused and stays all the same.

    Attributes:
        object: Key of an object, or a cache's folder with a ``/`` at its end.
        size_bytes: What it takes.
        why: Why it stays.
    """

    object: str
    size_bytes: int
    why: str


@dataclass(frozen=True)
class GarbagePlan:
    """What would be removed, manifests first within a cache, and what stays although it looks unused."""

    garbage: tuple[Garbage, ...]
    kept: tuple[Kept, ...]

    @property
    def size_bytes(self) -> int:
        """What removing all of it frees."""
        return sum(item.size_bytes for item in self.garbage)


def plan_garbage(store: ObjectStore, rules: GarbageRules, only_key: str | None = None) -> GarbagePlan:
    """Find the garbage; removes nothing.

    Raises:
        StorageError: the workspace cannot be read.
    """
    referenced = referenced_caches(store)
    garbage: list[Garbage] = []
    kept: list[Kept] = []
    for cache in find_caches(store, only_key):
        part = _plan_cache(store, cache, rules, is_referenced=cache.key in referenced)
        garbage += part.garbage
        kept += part.kept
    return GarbagePlan(tuple(garbage), tuple(kept))


def remove_garbage(
    store: ObjectStore,
    plan: GarbagePlan,
    rules: GarbageRules,
    on_removed: Callable[[Garbage], None] = lambda item: None,
) -> GarbagePlan:
    """Remove what a plan names, as far as it is still garbage.

    Each cache is looked at once more right before: a capture may have been
    started again since, and then nothing of it is touched.

    Args:
        store: The workspace.
        plan: From :func:`plan_garbage`.
        rules: The same rules.
        on_removed: Called after each object.

    Returns:
        What was removed, and what stayed.

    Raises:
        StorageError: an object cannot be removed; running again goes on.
    """
    referenced = referenced_caches(store)
    removed: list[Garbage] = []
    kept = list(plan.kept)
    for key in dict.fromkeys(item.cache for item in plan.garbage):
        planned = {item for item in plan.garbage if item.cache == key}
        cache = read_cache(store, key)
        fresh = _plan_cache(store, cache, rules, is_referenced=cache.key in referenced)
        for item in fresh.garbage:
            if item in planned:
                store.delete(item.object)
                removed.append(item)
                on_removed(item)
        kept += [
            Kept(item.object, item.size_bytes, "it changed while garbage was collected")
            for item in planned.difference(fresh.garbage)
        ]
    return GarbagePlan(tuple(removed), tuple(kept))


def referenced_caches(store: ObjectStore) -> set[str]:
    """Keys of the caches from which a draft in this workspace was trained.

    Raises:
        StorageError: the workspace cannot be read.
    """
    paths = [info.key for info in store.list("draft/") if info.key.endswith(f"/{RESULT_FILE}")]
    with ThreadPoolExecutor(_NUM_WORKERS) as pool:
        return set().union(*pool.map(lambda path: set(_inputs(store, path)), paths))


def _inputs(store: ObjectStore, path: str) -> Iterator[str]:
    try:
        result = StepResult.from_json(store.get(path), origin=path)
    except (FormatError, ObjectNotFound):
        return
    yield from result.inputs.values()


def _plan_cache(store: ObjectStore, cache: CacheFolder, rules: GarbageRules, *, is_referenced: bool) -> GarbagePlan:
    kept = [
        Kept(f"{cache.prefix}/{name}", info.size_bytes, "the capture writes no object of this name")
        for name, info in sorted(cache.objects.items())
        if not is_cache_object(name)
    ]
    reason, names = _candidates(cache, is_referenced=is_referenced or not rules.enable_unreferenced)
    age_s = rules.now_s - cache.modified_s
    if names and age_s < rules.older_than_s:
        size_bytes = sum(cache.objects[name].size_bytes for name in names)
        kept.append(Kept(f"{cache.prefix}/", size_bytes, f"{reason}, but written to {age_s / 3600:.1f} hours ago"))
        names = []
    elif cache.state == "finished" and not (is_referenced or rules.enable_unreferenced):
        size_bytes = sum(info.size_bytes for name, info in cache.objects.items() if name not in names)
        kept.append(Kept(f"{cache.prefix}/", size_bytes, "no draft was trained from it; see --unreferenced"))
    doubtful = set(_doubtful(store, cache, [name for name in names if is_shard(name)]))
    kept += [
        Kept(f"{cache.prefix}/{name}", cache.objects[name].size_bytes, "it is no intact shard of hidden states")
        for name in sorted(doubtful)
    ]
    garbage = (
        Garbage(f"{cache.prefix}/{name}", cache.key, cache.objects[name].size_bytes, reason)
        # The manifest first: nobody may find one that names what is gone.
        for name in sorted(names, key=lambda name: (name != RESULT_FILE, name))
        if name not in doubtful
    )
    return GarbagePlan(tuple(garbage), tuple(kept))


def _candidates(cache: CacheFolder, *, is_referenced: bool) -> tuple[Reason, list[str]]:
    ours = [name for name in cache.objects if is_cache_object(name)]
    if cache.state == "unfinished":
        return "unfinished", ours
    if cache.state == "unreadable":
        # Perhaps a newer Draftline's: nothing here says what belongs to it.
        return "leftover", []
    if not is_referenced:
        return "unreferenced", ours
    named = named_objects(cache)
    return "leftover", [name for name in ours if name not in named]


def _doubtful(store: ObjectStore, cache: CacheFolder, names: list[str]) -> Iterator[str]:
    """Shards by name whose header does not say that they are ours."""

    def is_ours(name: str) -> bool:
        try:
            header = read_header(store, f"{cache.prefix}/{name}")
        except FormatError:
            return False
        except ObjectNotFound:
            return True
        return header is not None and header.kind == "hidden-states"

    with ThreadPoolExecutor(_NUM_WORKERS) as pool:
        for name, ours in zip(names, pool.map(is_ours, names), strict=True):
            if not ours:
                yield name
