"""``draftline cache``: what it prints, in text and in JSON, its exit codes, and that it loads no tensors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from draftline.errors import FormatError, InputError, SpecError
from draftline.storage import ObjectStore
from pipelines.cache_commands import parse_duration
from pipelines.cli import app
from tests.cache.caches import KEY, OTHER_KEY, keys, write_cache, write_draft

PREFIX = f"hidden-states/{KEY}"
SHARD = f"{PREFIX}/train-00001.safetensors"


def invoke(*arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of ``draftline cache``."""
    result = CliRunner().invoke(app, ["cache", *arguments])
    return result.exit_code, result.stdout, result.stderr


def document(*arguments: str, code: int = 0) -> Any:
    """What a command prints with ``--json``."""
    found, out, _ = invoke(*arguments, "--json")
    assert found == code, out
    return json.loads(out)


@pytest.mark.parametrize("command", ["ls", "verify", "gc"])
def test_help_shows_examples(command: str) -> None:
    code, out, _ = invoke(command, "--help")
    assert code == 0 and f"draftline cache {command} s3://" in out


def test_ls(any_store: ObjectStore) -> None:
    write_cache(any_store)
    write_cache(any_store, OTHER_KEY, is_finished=False)
    code, out, _ = invoke("ls", any_store.uri)
    assert code == 0
    first, second = (line.split() for line in out.splitlines() if KEY in line or OTHER_KEY in line)
    assert first[:8] == [KEY, "finished", "store", "bf16", "toy-0", "4", "8", first[7]] and int(first[7]) > 50
    assert second[:3] == [OTHER_KEY, "unfinished", "store"]
    (one, _) = document("ls", any_store.uri)["caches"]
    assert (one["key"], one["num_samples"], one["num_tokens"]) == (KEY, 8, int(first[7]))


def test_ls_of_nothing(any_store: ObjectStore) -> None:
    any_store.put("unrelated", b"1")
    assert invoke("ls", any_store.uri)[:2] == (0, f"No hidden-state caches in {any_store.uri}\n")
    assert document("ls", any_store.uri) == {"caches": []}


def test_verify_names_what_is_wrong_and_says_so_by_its_exit_code(any_store: ObjectStore) -> None:
    write_cache(any_store)
    write_cache(any_store, OTHER_KEY)
    code, out, _ = invoke("verify", any_store.uri)
    assert code == 0 and "2 caches, 8 shards" in out and "all as recorded" in out
    any_store.delete(SHARD)
    any_store.put(f"hidden-states/{OTHER_KEY}/notes.txt", b"mine")
    code, out, _ = invoke("verify", any_store.uri)
    assert code == FormatError.exit_code == 6
    assert f"missing  {SHARD}: no such object" in out and "2 objects are not as they should be" in out
    found = document("verify", any_store.uri, code=6)
    assert [(finding["kind"], finding["object"]) for finding in found["findings"]] == [
        ("foreign", f"hidden-states/{OTHER_KEY}/notes.txt"),
        ("missing", SHARD),
    ]
    # One cache alone.
    assert document("verify", f"{any_store.uri}/{PREFIX}", code=6)["num_caches"] == 1
    assert invoke("verify", f"{any_store.uri}/hidden-states/{'9' * 20}")[0] == InputError.exit_code


def test_verify_repairs(any_store: ObjectStore) -> None:
    write_cache(any_store)
    any_store.put(SHARD, any_store.get(SHARD)[:-3])
    assert "truncated" in invoke("verify", any_store.uri)[1]
    code, out, _ = invoke("verify", any_store.uri, "--repair")
    assert code == 0 and f"removed  {SHARD}" in out
    assert invoke("verify", any_store.uri)[0] == 0
    assert SHARD not in keys(any_store) and f"{PREFIX}/result.json" not in keys(any_store)
    assert f"{PREFIX}/train-00000.safetensors" in keys(any_store)


def test_gc_only_says_what_would_go_until_it_is_told_to(any_store: ObjectStore) -> None:
    write_cache(any_store, is_finished=False)
    before = keys(any_store)
    assert document("gc", any_store.uri)["garbage"] == [], "it was written a moment ago"
    code, out, _ = invoke("gc", any_store.uri, "--older-than", "0s")
    assert code == 0 and f"would remove  {SHARD}  " in out and "add --delete" in out
    assert document("gc", any_store.uri, "--older-than", "0s")["is_dry_run"] is True
    assert keys(any_store) == before
    found = document("gc", any_store.uri, "--older-than", "0s", "--delete")
    assert sorted(item["object"] for item in found["garbage"]) == before
    assert keys(any_store) == []


def test_gc_of_unused_caches(any_store: ObjectStore) -> None:
    write_cache(any_store)
    write_cache(any_store, OTHER_KEY)
    write_draft(any_store, OTHER_KEY)
    code, out, _ = invoke("gc", any_store.uri, "--older-than", "0s", "--delete")
    assert code == 0 and f"keeps  {PREFIX}/" in out and "see --unreferenced" in out
    code, out, _ = invoke("gc", any_store.uri, "--older-than", "0s", "--unreferenced", "--delete")
    assert code == 0 and f"removed  {SHARD}" in out
    assert {key.split("/")[1] for key in keys(any_store) if key.startswith("hidden")} == {OTHER_KEY}


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("12h", 43200), ("7d", 604800), ("4w", 2419200), ("1.5h", 5400)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["7", "d", "-1d", "7 days", ""])
def test_no_durations(text: str, tmp_path: Path) -> None:
    code, _, err = invoke("gc", str(tmp_path), f"--older-than={text}")
    assert code == SpecError.exit_code and "--older-than is no duration" in err


def test_a_workspace_that_is_not_there(tmp_path: Path) -> None:
    for command in ("ls", "verify", "gc"):
        code, _, err = invoke(command, str(tmp_path / "nowhere"))
        assert code == InputError.exit_code and "there is no workspace" in err


@pytest.mark.slow
def test_verifying_loads_no_tensors(tmp_path: Path) -> None:
    from draftline.storage import open_store

    write_cache(open_store(str(tmp_path), create=True))
    code = (
        "import sys, pipelines.cli as cli\n"
        "try: cli.app(['cache', 'verify', sys.argv[1]])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert 'draftline.cache.verification' in sys.modules and 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60)
