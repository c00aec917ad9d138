"""Shards over an actor pool, on a real Ray: a killed actor's shard is repeated, an error comes out as itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipelines.embedded.platform import Platform

pytestmark = pytest.mark.slow


def map_over(platform: Platform, folder: Path, *shards: str, mood: str = "willing") -> dict[str, Any]:
    completed = subprocess.run(
        [sys.executable, "-m", "tests.ray_jobs.pool_driver", str(folder), mood, *shards],
        env={**os.environ, **platform.ray_client_env},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    result: dict[str, Any] = json.loads(completed.stdout.splitlines()[-1])
    return result


def attempts(folder: Path, shard: str) -> int:
    return (folder / shard).stat().st_size


def test_a_killed_actors_shard_is_repeated_and_no_other(platform: Platform, tmp_path: Path) -> None:
    shards = ["a", "b", "dies-once", "c", "d", "e"]
    result = map_over(platform, tmp_path, *shards)
    assert result["error"] is None
    assert result["done"] == {shard: f"{shard}:{2 if shard == 'dies-once' else 1}" for shard in shards}


def test_a_shard_that_kills_every_actor_ends_the_step(platform: Platform, tmp_path: Path) -> None:
    result = map_over(platform, tmp_path, "dies-always")
    kind, message = result["error"]
    assert kind == "StepError" and "'dies-always' died 3 times" in message
    assert attempts(tmp_path, "dies-always") == 3


def test_a_workers_own_error_comes_out_as_itself_at_once(platform: Platform, tmp_path: Path) -> None:
    result = map_over(platform, tmp_path, "fails")
    assert result["error"] == ["InputError", "a bad shard; got fails."]
    assert attempts(tmp_path, "fails") == 1


def test_a_worker_that_cannot_start_says_why(platform: Platform, tmp_path: Path) -> None:
    result = map_over(platform, tmp_path, "a", mood="refuses")
    assert result["error"] == ["TargetError", "no such target. Choose another."]


def test_nothing_to_do_is_done(platform: Platform, tmp_path: Path) -> None:
    assert map_over(platform, tmp_path) == {"done": {}, "error": None}
