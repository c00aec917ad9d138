"""Kernels that were compiled ahead are taken where the processor has their level, and compute the same."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch

from draftline.native import prebuilt
from draftline.native.build import find_compiler
from draftline.native.library import Kernels

pytestmark = pytest.mark.skipif(
    find_compiler() is None or platform.machine() != "x86_64", reason="no C++ compiler for x86-64"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kernels")
    assert len(prebuilt.build_all(folder)) == len(prebuilt.LEVELS)
    return folder


@pytest.fixture
def image(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(prebuilt.FOLDER_ENV, str(folder))


@pytest.mark.usefixtures("image")
def test_this_processor_finds_a_library_that_computes_as_torch_does() -> None:
    library = prebuilt.prebuilt_kernels()
    assert library is not None
    kernels = Kernels(str(library))
    weight, inputs = torch.randn(37, 19), torch.randn(5, 19)
    torch.testing.assert_close(
        kernels.multiply(inputs, kernels.pack(weight)), inputs @ weight.t(), atol=1e-5, rtol=1e-5
    )


@pytest.mark.usefixtures("image")
@pytest.mark.parametrize("level", prebuilt.LEVELS)
def test_the_best_level_of_the_processor_is_taken(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prebuilt, "_processor_flags", lambda: prebuilt.LEVELS[level] | prebuilt.LEVELS["x86-64-v2"])
    library = prebuilt.prebuilt_kernels()
    assert library is not None and level in library.name


@pytest.mark.usefixtures("image")
def test_none_is_taken_for_a_processor_below_every_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prebuilt, "_processor_flags", frozenset)
    assert prebuilt.prebuilt_kernels() is None


@pytest.mark.usefixtures("image")
def test_kernels_of_other_sources_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prebuilt, "source_digest", lambda: "0" * 20)
    assert prebuilt.prebuilt_kernels() is None


def test_without_an_image_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(prebuilt.FOLDER_ENV, raising=False)
    assert prebuilt.prebuilt_kernels() is None
