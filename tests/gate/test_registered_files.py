"""What is found wrong with a draft's files without loading a tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from draftline.registered_files import inspect_files
from tests.report.examples import weights_bytes


def problems(folder: Path) -> dict[str, str]:
    return {file.path: file.problem for file in inspect_files(folder) if file.problem}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "draft").mkdir()
    (tmp_path / "draft/model.safetensors").write_bytes(weights_bytes("weights"))
    (tmp_path / "draft/config.json").write_text("{}")
    (tmp_path / "calibration.json").write_text("{}")
    return tmp_path


def test_whole_folder_has_no_problem(folder: Path) -> None:
    assert problems(folder) == {}
    assert [file.path for file in inspect_files(folder)] == [
        "calibration.json",
        "draft/config.json",
        "draft/model.safetensors",
    ]


@pytest.mark.parametrize(
    ("path", "change", "problem"),
    [
        ("draft/model.safetensors", lambda data: data[:-1], "not safetensors"),
        ("draft/model.safetensors", lambda data: data + b"x", "not safetensors"),
        ("draft/model.safetensors", lambda data: b"\x80\x04pickle.", "not safetensors"),
        ("draft/model.safetensors", lambda data: b"\x02" + bytes(7) + b"{}", "holds no tensor"),
        ("draft/config.json", lambda data: b"[]", "not a JSON object"),
        ("calibration.json", lambda data: b"{", "not JSON"),
    ],
)
def test_damage_is_named(folder: Path, path: str, change: Callable[[bytes], bytes], problem: str) -> None:
    (folder / path).write_bytes(change((folder / path).read_bytes()))
    found = problems(folder)
    assert list(found) == [path]
    assert found[path].startswith(problem)


def test_missing_weights_are_a_problem(folder: Path) -> None:
    (folder / "draft/model.safetensors").unlink()
    assert problems(folder) == {"draft/model.safetensors": "missing"}
