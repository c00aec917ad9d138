"""Only garbage goes, on every kind of store: nothing that is in use, recent, foreign or not understood."""

from __future__ import annotations

import json
import time

import pytest

from draftline.cache import garbage
from draftline.cache.catalogue import find_caches, open_workspace, summarise
from draftline.cache.garbage import GarbagePlan, GarbageRules, plan_garbage, remove_garbage
from draftline.errors import InputError
from draftline.storage import ObjectStore
from tests.cache.caches import KEY, OTHER_KEY, THIRD_KEY, keys, write_cache, write_draft

PREFIX, OTHER = f"hidden-states/{KEY}", f"hidden-states/{OTHER_KEY}"
DAY_S = 86400.0


def rules(*, older_than_s: float = DAY_S, enable_unreferenced: bool = False) -> GarbageRules:
    """Reckoned from eight days ahead, so that what was just written is old."""
    return GarbageRules(older_than_s, time.time() + 8 * DAY_S, enable_unreferenced)


def objects(plan: GarbagePlan) -> list[str]:
    return [item.object for item in plan.garbage]


def test_a_finished_and_used_cache_has_no_garbage(any_store: ObjectStore) -> None:
    write_cache(any_store)
    write_draft(any_store)
    before = keys(any_store)
    for unreferenced in (False, True):
        plan = plan_garbage(any_store, rules(enable_unreferenced=unreferenced))
        assert (plan.garbage, plan.kept) == ((), ())
        remove_garbage(any_store, plan, rules())
    assert keys(any_store) == before


def test_an_unfinished_capture_goes_whole_and_alone(any_store: ObjectStore) -> None:
    write_cache(any_store, is_finished=False)
    write_cache(any_store, OTHER_KEY)
    write_draft(any_store, OTHER_KEY)
    mine = [key for key in keys(any_store) if key.startswith(PREFIX)]
    rest = [key for key in keys(any_store) if not key.startswith(PREFIX)]
    plan = plan_garbage(any_store, rules())
    assert sorted(objects(plan)) == mine and {item.reason for item in plan.garbage} == {"unfinished"}
    assert plan.size_bytes == sum(info.size_bytes for info in any_store.list(PREFIX))
    assert sorted(keys(any_store)) == sorted(mine + rest), "a plan must remove nothing"
    seen: list[str] = []
    removed = remove_garbage(any_store, plan, rules(), lambda item: seen.append(item.object))
    assert objects(removed) == seen == objects(plan)
    assert keys(any_store) == rest


def test_what_was_written_lately_stays(any_store: ObjectStore) -> None:
    write_cache(any_store, is_finished=False)
    now = GarbageRules(3600.0, time.time())
    plan = plan_garbage(any_store, now)
    assert plan.garbage == ()
    (kept,) = plan.kept
    assert kept.object == f"{PREFIX}/" and "unfinished, but written to" in kept.why


def test_a_capture_that_goes_on_meanwhile_loses_nothing(any_store: ObjectStore) -> None:
    write_cache(any_store, is_finished=False)
    before_restart = rules()
    plan = plan_garbage(any_store, before_restart)
    # The capture is started again after the plan, and ends.
    write_cache(any_store)
    before = keys(any_store)
    write_draft(any_store)
    removed = remove_garbage(any_store, plan, before_restart)
    assert removed.garbage == ()
    assert len(removed.kept) == len(plan.garbage) and "it changed" in removed.kept[0].why
    assert [key for key in keys(any_store) if key.startswith("hidden")] == before


def test_leftovers_go_and_the_cache_stays(any_store: ObjectStore) -> None:
    write_cache(any_store)
    before = keys(any_store)
    data = any_store.get(f"{PREFIX}/train-00001.safetensors")
    any_store.put(f"{PREFIX}/train-00009.safetensors", data)
    any_store.put(f"{PREFIX}/train-00009.safetensors.json", b"{}")
    plan = plan_garbage(any_store, rules())
    assert objects(plan) == [f"{PREFIX}/train-00009.safetensors", f"{PREFIX}/train-00009.safetensors.json"]
    assert {item.reason for item in plan.garbage} == {"leftover"}
    remove_garbage(any_store, plan, rules())
    assert keys(any_store) == before


def test_an_unused_cache_goes_only_when_that_is_asked_for(any_store: ObjectStore) -> None:
    write_cache(any_store)
    write_cache(any_store, OTHER_KEY, target_seed=1)
    write_draft(any_store, OTHER_KEY)
    plan = plan_garbage(any_store, rules())
    assert plan.garbage == ()
    assert [(kept.object, "--unreferenced" in kept.why) for kept in plan.kept] == [(f"{PREFIX}/", True)]
    asked = rules(enable_unreferenced=True)
    plan = plan_garbage(any_store, asked)
    assert {item.reason for item in plan.garbage} == {"unreferenced"}
    # A reader must never find a manifest whose shards are gone.
    assert objects(plan)[0] == f"{PREFIX}/result.json"
    remove_garbage(any_store, plan, asked)
    assert not any(key.startswith(PREFIX) for key in keys(any_store))
    assert sum(key.startswith(OTHER) for key in keys(any_store)) == 10


def test_strangers_objects_stay(any_store: ObjectStore) -> None:
    write_cache(any_store, is_finished=False)
    strangers = {
        f"{PREFIX}/notes.txt": b"mine",
        f"{PREFIX}/train-00003.safetensors": b"my own weights under an unlucky name",
        f"{PREFIX}/sub/train-00000.safetensors": b"1",
        "hidden-states/my-own-folder/train-00000.safetensors": b"1",
        f"tokens/{KEY}/train-00000.safetensors": b"1",
        "hidden-states.txt": b"1",
    }
    for key, data in strangers.items():
        any_store.put(key, data)
    plan = plan_garbage(any_store, rules(enable_unreferenced=True))
    remove_garbage(any_store, plan, rules(enable_unreferenced=True))
    assert keys(any_store) == sorted(strangers)
    assert {kept.object for kept in plan.kept} == {key for key in strangers if key.startswith(PREFIX)}


@pytest.mark.parametrize(
    "content", [b'{"version": 99}', b"{", b'{"version": 1, "station": "hidden-states", "key": "k"}']
)
def test_a_cache_with_a_manifest_that_cannot_be_read_stays(any_store: ObjectStore, content: bytes) -> None:
    write_cache(any_store)
    any_store.put(f"{PREFIX}/result.json", content)
    any_store.put(f"{PREFIX}/train-00009.safetensors", any_store.get(f"{PREFIX}/train-00001.safetensors"))
    assert plan_garbage(any_store, rules(enable_unreferenced=True)).garbage == ()


def test_an_unreadable_draft_does_not_free_its_cache_unasked(any_store: ObjectStore) -> None:
    write_cache(any_store)
    any_store.put(f"draft/{THIRD_KEY}/result.json", b"{")
    assert plan_garbage(any_store, rules()).garbage == ()


def test_one_cache_alone(any_store: ObjectStore) -> None:
    write_cache(any_store, is_finished=False)
    write_cache(any_store, OTHER_KEY, is_finished=False)
    plan = plan_garbage(any_store, rules(), OTHER_KEY)
    assert plan.garbage and all(key.startswith(OTHER) for key in objects(plan))


def test_summaries_add_up(any_store: ObjectStore) -> None:
    manifest = write_cache(any_store)
    write_cache(any_store, OTHER_KEY, target_seed=1, is_finished=False)
    any_store.put(f"hidden-states/{THIRD_KEY}/result.json", b"{")
    finished, unfinished, unreadable = (summarise(any_store, cache) for cache in find_caches(any_store))
    assert (finished.key, finished.state, finished.mode, finished.codec) == (KEY, "finished", "store", manifest.codec)
    assert (finished.num_shards, finished.num_samples) == (4, 8)
    assert finished.num_tokens == sum(info.num_tokens for info in manifest.shards)
    assert finished.size_bytes == sum(info.size_bytes for info in any_store.list(PREFIX))
    assert abs(finished.modified_s - time.time()) < 60
    # What nothing but its shards describes yet is read from them.
    assert (unfinished.key, unfinished.state, unfinished.codec) == (OTHER_KEY, "unfinished", manifest.codec)
    assert unfinished.target == "toy-1"
    assert (unfinished.num_samples, unfinished.num_tokens) == (finished.num_samples, finished.num_tokens)
    assert (unreadable.key, unreadable.state, unreadable.num_shards) == (THIRD_KEY, "unreadable", 0)


def test_the_uri_of_a_workspace_or_of_one_cache(any_store: ObjectStore) -> None:
    write_cache(any_store)
    for uri in (any_store.uri, f"{any_store.uri}/"):
        store, key = open_workspace(uri)
        assert (store.uri, key) == (any_store.uri, None)
    for uri in (f"{any_store.uri}/{PREFIX}", f"{any_store.uri}/{PREFIX}/"):
        store, key = open_workspace(uri)
        assert (store.uri, key) == (any_store.uri, KEY)
        assert [cache.key for cache in find_caches(store, key)] == [KEY]


def test_a_directory_that_is_not_there() -> None:
    with pytest.raises(InputError, match=r"there is no workspace at \./nowhere"):
        open_workspace("./nowhere")


def test_a_shard_that_vanishes_meanwhile_is_no_error(any_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cache(any_store, is_finished=False)
    listed = list(find_caches(any_store))
    any_store.delete(f"{PREFIX}/train-00001.safetensors")
    any_store.delete(f"{PREFIX}/train-00000.safetensors.json")
    monkeypatch.setattr(garbage, "find_caches", lambda store, only_key=None: iter(listed))
    plan = plan_garbage(any_store, rules())
    remove_garbage(any_store, plan, rules())
    assert keys(any_store) == []
    assert json.dumps([kept.why for kept in plan.kept]) == "[]"
