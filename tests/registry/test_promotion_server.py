"""The commands against a real MLflow server over HTTP, and two promotions in the same moment."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner

from components.promotion import ChampionChanged, Move, apply, history
from components.registry import connect
from draftline.storage.base import ObjectStore
from pipelines.cli import app
from pipelines.embedded.platform import Platform
from tests.registry.runs import aliases, register_and_judge

pytestmark = pytest.mark.slow

NAME = "promotion-desk"


@pytest.fixture
def server(platform: Platform, store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> str:
    """Version 1 is champion, 2 and 3 (worse) are not."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", platform.mlflow_uri)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    for tag, accepted_length in (("1", 2.6), ("2", 2.2), ("3", 2.3)):
        register_and_judge(store, tag, name=NAME, accepted_length=accepted_length)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    return platform.mlflow_uri


def test_commands_and_two_promotions_in_the_same_moment(server: str, tmp_path: Path) -> None:
    def run(*arguments: str, code: int = 0) -> str:
        result = CliRunner().invoke(app, [*arguments, "--host", server, "--home", str(tmp_path)])
        assert result.exit_code == code, result.output
        return result.output

    client = connect({"MLFLOW_TRACKING_URI": server})
    assert "FAIL  accepted length on held-out against the champion" in run("promote", NAME, "--dry-run", code=9)
    assert "the gate refuses promotion-desk version 3" in run("promote", NAME, code=9)
    run("promote", NAME, "--force", code=3)
    assert aliases(client, NAME) == {"champion": "1", "challenger": "3"}

    def move(to: str) -> str:
        try:
            return "moved" if apply(client, Move("promote", NAME, "1", to, "a race", f"racer {to}")) else "nothing"
        except ChampionChanged:
            return "changed"

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(move, ("2", "3"))) == ["changed", "moved"]
    winner = aliases(client, NAME)["champion"]
    assert history(client, NAME)[-1].move.who == f"racer {winner}"
    assert client.search_registered_models("name LIKE '%.promotion%'") == []

    assert f"version 1 would become champion, after version {winner}" in run("rollback", NAME, "--dry-run")
    assert f"{NAME}: version 1 is champion, after version {winner}." in run("rollback", NAME, "--reason", "slow")
    assert "was itself taken back" in run("rollback", NAME, code=9)
    assert "by force" in run("promote", f"{NAME}@{winner}", "--force", "--reason", "it was the network")
    document = json.loads(run("history", NAME, "--json"))
    told = [(entry["move"]["action"], entry["move"]["to"], entry["end"]) for entry in document["history"]]
    assert told == [
        ("gate", "1", "done"),
        ("promote", "3", "refused"),
        ("promote", winner, "done"),
        ("rollback", "1", "done"),
        ("promote", winner, "done"),
    ]
    assert "it was the network" in run("history", NAME)
