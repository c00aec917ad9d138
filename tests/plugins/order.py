"""Runs the fast tests before the slow ones, so that a broken unit is seen in seconds. A pytest plugin."""

from __future__ import annotations

import pytest


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Move tests marked ``slow`` to the end; the order is kept otherwise."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
