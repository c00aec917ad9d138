"""Relative links and pictures of the pages lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.docs.pages import PAGES, ROOT, anchors, links

EXTERNAL = re.compile(r"[a-z][a-z0-9+.-]*:")


def broken_links(page: Path) -> list[str]:
    """Relative links of a page whose file or heading does not exist."""
    broken = []
    for link in links(page.read_text(encoding="utf-8")):
        if EXTERNAL.match(link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        is_lost = not target.exists() or (
            anchor and target.suffix == ".md" and anchor not in anchors(target.read_text(encoding="utf-8"))
        )
        if is_lost:
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_resolve(page: str) -> None:
    assert broken_links(ROOT / page) == []


def test_a_lost_file_and_a_lost_heading_are_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# Here it is\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](other.md) [b](other.md#here-it-is) [c](other.md#gone) ![d](no.svg) [e](https://x.org/y)"
        ' <img src="no.png"> `[f](code.md)`\n'
    )
    assert broken_links(page) == ["other.md#gone", "no.svg", "no.png"]


def test_every_decision_is_listed_once_and_numbered() -> None:
    folder = ROOT / "docs" / "adr"
    files = sorted(path.name for path in folder.glob("[0-9]*.md"))
    numbers = [int(name[:4]) for name in files]
    # Numbers are given out before the pages are written, so there may be gaps.
    assert numbers[0] == 1 and len(numbers) == len(set(numbers))
    assert links((folder / "README.md").read_text(encoding="utf-8")) == files


def test_pictures_are_whole() -> None:
    pictures = sorted((ROOT / "docs" / "img").glob("*.svg"))
    assert len(pictures) >= 2
    for picture in pictures:
        assert ElementTree.parse(picture).getroot().tag.endswith("svg")
