"""What is found before a run starts: files that are not there, too little space at first and when started again."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from draftline.errors import InputError, NoSpace
from draftline.spec import RunSpec, derive, recipe
from pipelines import preflight
from pipelines.preflight import check_free_space, prepare, resolve_spec

MIB = 1024**2


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A disk with ``free`` bytes, and a run that wants 10 MiB, 1 MiB of it in any case."""
    state = SimpleNamespace(free=100 * MIB)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: state)
    monkeypatch.setattr(preflight, "MIN_FREE_BYTES", 10 * MIB)
    monkeypatch.setattr(preflight, "MIN_RESTART_FREE_BYTES", MIB)
    return state


@pytest.fixture
def spec(tmp_path: Path) -> RunSpec:
    return derive(recipe("smollm2-135m"), {"workspace": str(tmp_path / "home" / "workspace")})


def test_what_the_first_attempt_wrote_is_not_asked_for_again(
    disk: SimpleNamespace, spec: RunSpec, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    prepare(spec, home)
    (home / "workspace" / "hidden-states").write_bytes(os.urandom(6 * MIB))
    disk.free = 5 * MIB
    prepare(spec, home)
    with pytest.raises(NoSpace):
        prepare(derive(spec, {"seed": 1}), home)
    # The workspace lies in the home: what it holds counts once.
    disk.free = 3 * MIB
    with pytest.raises(NoSpace, match="too little free space"):
        prepare(spec, home)


def test_a_restart_wants_a_little_whatever_is_done(disk: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "done").write_bytes(os.urandom(12 * MIB))
    os.link(tmp_path / "done", tmp_path / "again")
    disk.free = MIB
    check_free_space(tmp_path, 10 * MIB, done=[tmp_path])
    disk.free -= 1
    with pytest.raises(NoSpace):
        check_free_space(tmp_path, 10 * MIB, done=[tmp_path])


def test_suite_files_are_absolute_and_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = "evaluation.suite_files={gsm8k: gsm.jsonl, desk: 's3://bucket/desk.jsonl'}"
    spec = resolve_spec(None, "smollm2-135m", [files, "evaluation.suites=[held-out, gsm8k]"])
    assert spec.evaluation.suite_files == {"gsm8k": str(tmp_path / "gsm.jsonl"), "desk": "s3://bucket/desk.jsonl"}
    with pytest.raises(InputError, match="no gsm8k suite file"):
        prepare(spec, tmp_path / "home")
    assert not (tmp_path / ".draftline").exists()
