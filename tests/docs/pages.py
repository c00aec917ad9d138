"""Reading the repository's Markdown pages."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]

PAGES = tuple(
    sorted(
        path.relative_to(ROOT).as_posix()
        for path in [
            *ROOT.glob("*.md"),
            *ROOT.glob("docs/**/*.md"),
            *ROOT.glob("draftline/**/*.md"),
            *ROOT.glob("charts/**/*.md"),
        ]
    )
)
"""All pages for people, relative to the repository."""

_FENCE = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"!?\[[^\]\n]*\]\(([^)\s]+)\)|<img[^>]*\ssrc=\"([^\"]+)\"")


def code_lines(text: str) -> list[str]:
    """Every line of every code block, continuation lines joined, and every inline code span."""
    blocks = "".join(_FENCE.findall(text)).replace("\\\n", " ")
    outside = _FENCE.sub("", text)
    return [line.strip() for line in blocks.splitlines() if line.strip()] + _INLINE.findall(outside)


def links(text: str) -> list[str]:
    """Targets of all links and pictures outside code."""
    prose = _INLINE.sub("", _FENCE.sub("", text))
    return [markdown or picture for markdown, picture in _LINK.findall(prose)]


def anchors(text: str) -> set[str]:
    """Anchors that GitHub gives to the page's headings."""
    headings = re.findall(r"^#+ +(.+?) *$", _FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
