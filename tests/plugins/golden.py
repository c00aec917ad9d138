"""Golden files: compared whole, rewritten only by ``--update-golden``. A pytest plugin."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path

import pytest

FLAG = "--update-golden"
_SHOWN_LINES = 60


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the flag."""
    parser.addoption(FLAG, action="store_true", help="rewrite golden files instead of comparing with them")


@pytest.fixture
def check_golden(request: pytest.FixtureRequest) -> Callable[[str, Path], None]:
    """Compares a text with a golden file, or rewrites the file under the flag."""

    def check(actual: str, golden: Path) -> None:
        if request.config.getoption(FLAG):
            golden.parent.mkdir(parents=True, exist_ok=True)
            golden.write_text(actual, encoding="utf-8")
            return
        expected = golden.read_text(encoding="utf-8") if golden.exists() else ""
        if actual != expected:
            difference = difflib.unified_diff(
                expected.splitlines(), actual.splitlines(), str(golden.name), "now", lineterm="", n=2
            )
            shown = "\n".join(list(difference)[:_SHOWN_LINES])
            pytest.fail(
                f"{golden.name} differs. If that is intended, run\n"
                f"    pytest {request.node.nodeid} {FLAG}\nand review the change.\n{shown}",
                pytrace=False,
            )

    return check
