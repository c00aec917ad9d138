"""An even choice out of a list that may be sorted by topic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

_Item = TypeVar("_Item")


def even_spread(items: Sequence[_Item], count: int) -> list[_Item]:
    """At most ``count`` items at even distances, in order; all of them when ``count`` is 0.

    Files are often sorted by topic: an even spread sees all of them, the head would see the first.
    """
    if count <= 0 or count >= len(items):
        return list(items)
    return [items[index * len(items) // count] for index in range(count)]
