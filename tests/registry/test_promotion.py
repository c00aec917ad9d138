"""Promote, roll back, refuse and recover, against a real MLflow on SQLite."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from mlflow import MlflowClient

from components.champion import GateRefused, Request, promote, roll_back
from components.promotion import ChampionChanged, Move, apply, history
from components.registry import connect
from draftline.errors import FormatError, InputError, RegistryError
from draftline.registry_layout import TAG_GATE_PASSED, TAG_ROLLED_BACK
from draftline.storage.base import ObjectStore
from tests.registry.runs import NAME, aliases, register_and_judge

pytestmark = pytest.mark.slow

REQUEST = Request(NAME, "ada@desk", "for a test")


class Killed(BaseException):
    """Stands for SIGKILL: no ``except Exception`` sees it. Cleanup in ``finally`` runs; a stale lease has a test."""


@pytest.fixture
def client(store: ObjectStore, mlflow_uri: str) -> MlflowClient:
    """Version 1 is champion, version 2 (worse) challenger."""
    register_and_judge(store, "1")
    register_and_judge(store, "2", accepted_length=2.2)
    return connect()


def trail(client: MlflowClient) -> list[tuple[str, str | None, str, str]]:
    return [(e.move.action, e.move.source, e.move.to, e.end) for e in history(client, NAME)]


def test_the_gate_refuses_force_overrules_and_rollback_returns(client: MlflowClient, store: ObjectStore) -> None:
    said = [("gate", None, "1", "done")]
    with pytest.raises(GateRefused, match=r"accepted length on held-out against the champion: 2\.200"):
        promote(client, REQUEST, "challenger")
    said.append(("promote", "1", "2", "refused"))
    assert (aliases(client), trail(client)) == ({"champion": "1", "challenger": "2"}, said)
    with pytest.raises(InputError, match="needs a reason"):
        promote(client, Request(NAME, "ada", " ", is_forced=True), "2")

    forced = promote(client, Request(NAME, "ada@desk", "the lab needs it", is_forced=True), "2")
    said.append(("promote", "1", "2", "done"))
    assert (forced.champion, forced.before, forced.is_changed) == ("2", "1", True)
    assert (aliases(client), trail(client)) == ({"champion": "2", "previous": "1"}, said)
    entry = history(client, NAME)[-1]
    assert (entry.move.who, entry.move.why, entry.move.is_forced) == ("ada@desk", "the lab needs it", True)
    assert entry.move.gate["passed"] is False and len(entry.move.gate["failed"]) == 2
    assert not promote(client, REQUEST, "2").is_changed
    assert trail(client) == said

    assert roll_back(client, REQUEST).champion == "1"
    said.append(("rollback", "2", "1", "done"))
    assert (aliases(client), trail(client)) == ({"champion": "1", "previous": "2"}, said)
    # Neither an impatient second rollback nor a pipeline that runs again returns to it.
    with pytest.raises(RegistryError, match=r"was itself taken back; got .*ada@desk: for a test"):
        roll_back(client, REQUEST)
    _, judged = register_and_judge(store, "2", accepted_length=2.2)
    assert judged.outputs["alias"] == "challenger"
    failed = [reason["rule"] for reason in judged.outputs["reasons"] if not reason["ok"]]
    assert "taken back before" in failed
    promote(client, Request(NAME, "ada", "it was not the draft", is_forced=True), "2")
    assert TAG_ROLLED_BACK not in client.get_model_version(NAME, "2").tags


def test_dry_runs_write_nothing(client: MlflowClient) -> None:
    before = (aliases(client), client.get_registered_model(NAME).tags, client.get_model_version(NAME, "2").tags)
    dry = Request(NAME, "ada", "looking", is_dry_run=True)
    outcome = promote(client, dry, "challenger")
    assert (outcome.is_refused, outcome.is_changed, outcome.champion) == (True, False, "1")
    outcome = promote(client, Request(NAME, "ada", "looking", is_forced=True, is_dry_run=True), "challenger")
    assert (outcome.is_refused, outcome.is_changed, outcome.champion) == (False, True, "2")
    with pytest.raises(RegistryError, match="no previous version"):
        roll_back(client, dry)
    after = (aliases(client), client.get_registered_model(NAME).tags, client.get_model_version(NAME, "2").tags)
    assert after == before


@pytest.mark.parametrize("write", [0, 1, 2])
def test_killed_promotion_leaves_a_valid_champion_and_is_finished_by_the_next(client: MlflowClient, write: int) -> None:
    """Killed before the champion is written, after it, and before the challenger's alias goes."""
    forced = Request(NAME, "ada", "wanted", is_forced=True)
    with dying_at(client, write):
        promote(client, forced, "challenger")
    left = aliases(client)
    assert left["champion"] == ("1" if write == 0 else "2")
    assert history(client, NAME)[-1].end == ""

    heard: list[str] = []
    outcome = promote(client, forced, "challenger", heard.append)
    assert len(heard) == 1 and heard[0].startswith("An interrupted promote to version 2 by ada")
    assert (outcome.champion, outcome.before, outcome.is_changed) == ("2", "1", True)
    assert aliases(client) == {"champion": "2", "previous": "1"}
    ends = [end for action, _, _, end in trail(client) if action == "promote"]
    assert ends == (["abandoned", "done"] if write == 0 else ["done"])


def test_killed_rollback_is_finished_once(client: MlflowClient) -> None:
    promote(client, Request(NAME, "ada", "wanted", is_forced=True), "2")
    with dying_at(client, 1):
        roll_back(client, REQUEST)
    assert aliases(client) == {"champion": "1", "previous": "1"}
    assert roll_back(client, REQUEST).champion == "1"
    assert aliases(client) == {"champion": "1", "previous": "2"}
    assert trail(client)[-1] == ("rollback", "2", "1", "done")


def test_aliases_moved_by_hand_are_respected(client: MlflowClient) -> None:
    move = Move("promote", NAME, None, "2", "decided before there was a champion", "ada")
    with pytest.raises(ChampionChanged, match="got version 1; expected no champion"):
        apply(client, move)
    assert trail(client) == [("gate", None, "1", "done")]


def test_stale_lease_is_taken_away(client: MlflowClient) -> None:
    client.create_registered_model(f"{NAME}.promotion", tags={"draftline.lease.nonce": "dead"})
    assert apply(client, Move("promote", NAME, "1", "2", "later", "ada"), stale_s=0.3) is not None
    assert aliases(client)["champion"] == "2"
    assert [model.name for model in client.search_registered_models()] == [NAME]


def damage_weights(draft: Path) -> str:
    (draft / "model.safetensors").write_bytes(b"weights X")
    return "is not the file that was registered"


def remove_weights(draft: Path) -> str:
    (draft / "model.safetensors").unlink()
    return "is missing"


def add_pickle(draft: Path) -> str:
    (draft / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    return r"draft/pytorch_model\.bin of support-desk version 2 can hold pickled objects"


def add_torch_file_elsewhere(draft: Path) -> str:
    (draft.parent / "extra.PT").write_bytes(b"\x80\x04.")
    return r"extra\.PT of support-desk version 2 can hold pickled objects"


def add_weights(draft: Path) -> str:
    (draft / "model-00002.safetensors").write_bytes(b"other")
    return r"draft/model-00002\.safetensors of support-desk version 2 was not registered"


def change_policy(draft: Path) -> str:
    spec = draft.parent / "spec.yaml"
    spec.write_text(spec.read_text().replace("min_speedup: 1.0", "min_speedup: 0.0"))
    return r"spec\.yaml of support-desk version 2 is not the file that was registered"


@pytest.mark.parametrize(
    "change", [damage_weights, remove_weights, add_pickle, add_torch_file_elsewhere, add_weights, change_policy]
)
def test_changed_files_are_refused_even_by_force(
    client: MlflowClient, tmp_path: Path, change: Callable[[Path], str]
) -> None:
    (draft,) = {path.parent for path in (tmp_path / "mlruns").rglob("draft/model.safetensors")} - {
        champion_folder(client, tmp_path)
    }
    message = change(draft)
    forced = Request(NAME, "ada", "I insist", is_forced=True)
    with pytest.raises(FormatError, match=message):
        promote(client, forced, "2")
    client.set_registered_model_alias(NAME, "previous", "2")
    with pytest.raises(FormatError, match=message):
        roll_back(client, REQUEST)
    assert aliases(client)["champion"] == "1"
    assert trail(client) == [("gate", None, "1", "done")]


def test_history_shows_edited_lines_and_never_acts_on_them(client: MlflowClient) -> None:
    client.set_registered_model_tag(NAME, "draftline.audit.20200101T000000Z-aaaaaa", '{"to": "2"}')
    promote(client, Request(NAME, "ada", "wanted", is_forced=True), "2")
    first, *others = history(client, NAME)
    assert (first.move.action, first.end, first.move.why) == ("unreadable", "unreadable", '{"to": "2"}')
    assert [entry.end for entry in others] == ["done", "done"]
    assert client.get_model_version(NAME, "2").tags[TAG_GATE_PASSED] == "false"
    run_id = client.get_model_version(NAME, "2").run_id
    verdict = json.loads(Path(client.download_artifacts(str(run_id), "gate.json")).read_text())
    assert verdict["passed"] is False


def champion_folder(client: MlflowClient, tmp_path: Path) -> Path:
    model_id = Path(str(client.get_model_version(NAME, "1").source)).parts[-2]
    (weights,) = (tmp_path / "mlruns").rglob(f"{model_id}/artifacts/draft/model.safetensors")
    return weights.parent


@contextmanager
def dying_at(client: MlflowClient, write: int) -> Iterator[None]:
    """The process dies instead of doing this alias write, counted from 0."""
    writes = itertools.count()

    def guard(write_alias: Callable[..., None]) -> Callable[..., None]:
        def guarded(*args: str) -> None:
            if next(writes) >= write:
                raise Killed
            write_alias(*args)

        return guarded

    names = ("set_registered_model_alias", "delete_registered_model_alias")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        for name in names:
            patch.setattr(client, name, guard(getattr(client, name)))
        yield
