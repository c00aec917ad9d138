"""The changelog knows the version that the package calls itself."""

from __future__ import annotations

import re

from draftline import __version__
from tests.docs.pages import ROOT


def test_the_newest_entry_is_the_package_s_version() -> None:
    headings = re.findall(r"^## (\S+) - (\S+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings, "CHANGELOG.md needs a heading like '## 0.1.0 - unreleased' or '## 0.1.0 - 2026-12-01'"
    version, date = headings[0]
    assert version == __version__
    assert date == "unreleased" or re.fullmatch(r"\d{4}-\d{2}-\d{2}", date)
