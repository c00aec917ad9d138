"""Tables and figures as GitHub-flavoured Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from draftline.report.collect import finite


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; cells are taken as they are."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def figure(value: Any, *, digits: int = 2, suffix: str = "") -> str:
    """A number, or ``n/a`` for anything that is not a finite one."""
    value = finite(value)
    return "n/a" if not isinstance(value, int | float) else f"{value:.{digits}f}{suffix}"


def count(value: Any) -> str:
    """A whole number with separators, or ``n/a``."""
    return f"{value:,}" if isinstance(value, int) else "n/a"


def plain(text: str) -> str:
    """Text that cannot start markup or leave its table cell: labels come from users' files."""
    return re.sub(r"([\\`*\[\]|<>])", r"\\\1", " ".join(text.split()))
