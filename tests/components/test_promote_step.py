"""The step around a promotion (which has tests of its own): it passes on what was asked, and waits for the endpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from components.champion import Outcome, Request
from components.deploy.step import ENDPOINT_ENV
from components.promote import step
from tests.components.test_deploy import endpoint
from tests.components.test_runtime import FakeArtifact


def test_promotes_and_waits_for_the_endpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Request, str]] = []

    def promote(client: object, request: Request, version: str, say: object) -> Outcome:
        asked.append((request, version))
        return Outcome("3", "2", True)

    monkeypatch.setattr(step, "connect", lambda environ: object())
    monkeypatch.setattr(step, "promote", promote)
    summary = FakeArtifact(str(tmp_path / "summary"))
    with endpoint((200, {"draft": "desk/3"})) as url:
        environ = {ENDPOINT_ENV: url, "DRAFTLINE_ACTOR": "ada"}
        step.promote_registered("desk", "challenger", "better", True, summary, environ)
    assert asked == [(Request("desk", "ada", "better", is_forced=True), "challenger")]
    page = Path(summary.path).read_text()
    assert page.startswith("# desk version 3 is champion\n\nVersion 2 was.") and "uses it" in page
    assert summary.metadata["champion"] == "3"
