"""Fixtures: a headless Chromium, and pages that fail a test when they complain."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

EXECUTABLE_ENV = "DRAFTLINE_TEST_CHROMIUM"
_NAMES = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync")


def find_chromium() -> str:
    """Path of a Chromium.

    One that the environment names must be there; otherwise the first of the
    path is taken, and without any the test is skipped.
    """
    if named := os.environ.get(EXECUTABLE_ENV):
        return named
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        pytest.skip(f"no Chromium found: install the package chromium, or set {EXECUTABLE_ENV}")
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One browser for the tests of a module: while it runs, the thread has an event loop of Playwright's."""
    executable = find_chromium()
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=executable, args=list(_FLAGS))
        yield launched
        launched.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """An empty page; whatever its console reports as an error, a broken policy included, fails the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    page.set_default_timeout(10_000)
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    yield page
    context.close()
    # A refused request is reported by the browser itself; the tests that provoke one look at what the page says.
    assert [text for text in complaints if "Failed to load resource" not in text] == []
