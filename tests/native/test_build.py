"""Kernels are compiled once per source, compiler and processor; without them everything still works."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from draftline.native import build
from draftline.target import linear, packed_layers
from draftline.target.linear import PackedLinear


def test_without_a_compiler_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with caplog.at_level(logging.WARNING):
        assert build.build_kernels(tmp_path) is None
    (record,) = caplog.records
    assert "no C++ compiler was found. Install g++" in record.getMessage()


def test_a_compiler_that_fails_leaves_no_library_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\ntest $1 = --version && exit 0\necho out of registers >&2; exit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with caplog.at_level(logging.WARNING):
        assert build.build_kernels(tmp_path / "cache") is None
    assert "out of registers" in caplog.text
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".lock"]


@pytest.mark.skipif(build.find_compiler() is None, reason="no C++ compiler")
def test_a_library_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build.build_kernels(tmp_path)
    assert first is not None and first.is_file()
    monkeypatch.setattr(build, "compile_kernels", None)  # A second compilation would fail.
    assert build.build_kernels(tmp_path) == first


def test_products_without_kernels_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "native_kernels", lambda: None)
    monkeypatch.setattr(packed_layers, "native_kernels", lambda: None)
    weight, inputs = torch.randn(9, 7), torch.randn(3, 7)
    torch.testing.assert_close(PackedLinear(weight)(inputs), inputs @ weight.t(), atol=1e-5, rtol=1e-5)
