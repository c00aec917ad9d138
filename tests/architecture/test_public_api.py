"""The names that other code may rely on: a change of them is seen in review."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

from components.image import DEFAULT_IMAGE
from draftline import __version__
from tests.architecture.modules import ROOT, modules_of

GOLDEN = Path(__file__).parent / "golden" / "public_api.txt"
PACKAGES = ("draftline", "components", "pipelines", "ray_jobs", "serving")


def public_names() -> dict[str, list[str]]:
    """``__all__`` of every module that has one."""
    found = {}
    for package in PACKAGES:
        for name in modules_of(package):
            path = ROOT.joinpath(*name.split("."))
            file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            if "\n__all__ = " in file.read_text(encoding="utf-8"):
                found[name] = list(importlib.import_module(name).__all__)
    return found


def test_public_names_are_pinned(check_golden: Callable[[str, Path], None]) -> None:
    lines = [f"{module}: {name}" for module, names in sorted(public_names().items()) for name in sorted(names)]
    check_golden("\n".join(lines) + "\n", GOLDEN)


def test_public_names_exist_once() -> None:
    for module, names in public_names().items():
        assert len(names) == len(set(names)), module
        missing = [name for name in names if not hasattr(importlib.import_module(module), name)]
        assert missing == [], module


def test_the_default_image_is_of_this_version() -> None:
    assert DEFAULT_IMAGE.rpartition(":")[2] == __version__
