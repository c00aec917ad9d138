"""Drafts from a real MLflow registry (SQLite): verified, followed, refused."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from draftline.errors import DraftlineError, FormatError, PlatformError, RegistryError, TargetError
from draftline.registry_layout import TAG_DRIFT, digest_tag, file_digest
from serving.registry import DraftFiles, DraftFollower, FolderSource, RegistrySource, open_source
from tests.serving.servers import wait_until

pytestmark = pytest.mark.slow

MODEL = "support-desk"


class Registry:
    """A registry in one SQLite file, and the folder its artefacts lie in."""

    def __init__(self, folder: Path) -> None:
        self.uri = f"sqlite:///{folder / 'mlflow.db'}"
        self.folder = folder
        self.client = MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)
        self.client.create_registered_model(MODEL)

    def add(self, weights: bytes, *, alias: str | None = "champion", has_digests: bool = True) -> Path:
        """Register a version; returns the folder that the registry downloads from."""
        number = len(list(self.folder.glob("artefact-*"))) + 1
        source = self.folder / f"artefact-{number}"
        (source / "draft").mkdir(parents=True)
        (source / "draft" / "config.json").write_text('{"block_size": 7}')
        (source / "draft" / "model.safetensors").write_bytes(weights)
        (source / "calibration.json").write_text("{}")
        version = self.client.create_model_version(MODEL, source.as_uri())
        for path in ("draft/config.json", "draft/model.safetensors", "calibration.json"):
            if has_digests:
                self.client.set_model_version_tag(MODEL, version.version, digest_tag(path), file_digest(source / path))
        if alias:
            self.client.set_registered_model_alias(MODEL, alias, version.version)
        return source


@pytest.fixture(scope="module")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty registry file; making one takes seconds, so it is made once."""
    folder = tmp_path_factory.mktemp("migrated")
    MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}").search_experiments()
    return folder / "mlflow.db"


@pytest.fixture
def registry(tmp_path: Path, migrated: Path) -> Iterator[Registry]:
    folder = tmp_path / "registry"
    folder.mkdir()
    (folder / "mlflow.db").write_bytes(migrated.read_bytes())
    before = mlflow.get_tracking_uri()
    yield Registry(folder)
    assert mlflow.get_tracking_uri() == before, "the source must leave mlflow's process-wide state alone"


def source(registry: Registry, tmp_path: Path, uri: str = f"models:/{MODEL}@champion") -> RegistrySource:
    return RegistrySource(uri, registry.uri, tmp_path / "cache")


def test_the_champion_is_brought_here_verified(registry: Registry, tmp_path: Path) -> None:
    registry.add(b"one")
    registry.add(b"two")
    registry.add(b"three", alias="challenger")
    champion = source(registry, tmp_path)
    assert champion.current() == f"{MODEL}/2"
    files = champion.fetch(champion.current())
    assert (files.draft_dir / "model.safetensors").read_bytes() == b"two"
    assert files.calibration_file is not None and files.calibration_file.name == "calibration.json"
    fixed = source(registry, tmp_path, f"models:/{MODEL}/1")
    assert (fixed.fetch(fixed.current()).draft_dir / "model.safetensors").read_bytes() == b"one"


def test_changed_weights_are_refused_and_not_kept(registry: Registry, tmp_path: Path) -> None:
    artefact = registry.add(b"honest")
    (artefact / "draft" / "model.safetensors").write_bytes(b"changed")
    with pytest.raises(FormatError, match="not the file that was registered"):
        source(registry, tmp_path).fetch(f"{MODEL}/1")
    assert list((tmp_path / "cache" / "drafts" / MODEL).iterdir()) == []
    (artefact / "draft" / "model.safetensors").write_bytes(b"honest")
    assert source(registry, tmp_path).fetch(f"{MODEL}/1").name == f"{MODEL}/1"


def test_a_version_without_digests_is_refused(registry: Registry, tmp_path: Path) -> None:
    registry.add(b"foreign", has_digests=False)
    with pytest.raises(FormatError, match="records no sha256"):
        source(registry, tmp_path).fetch(f"{MODEL}/1")


def test_a_damaged_copy_is_fetched_again(registry: Registry, tmp_path: Path) -> None:
    registry.add(b"good")
    kept = source(registry, tmp_path).fetch(f"{MODEL}/1").draft_dir / "model.safetensors"
    kept.write_bytes(b"rotten")
    assert source(registry, tmp_path).fetch(f"{MODEL}/1").draft_dir / "model.safetensors" == kept
    assert kept.read_bytes() == b"good"


def test_a_bad_copy_that_cannot_be_removed_is_not_taken(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.add(b"good")
    kept = source(registry, tmp_path).fetch(f"{MODEL}/1").draft_dir / "model.safetensors"
    kept.write_bytes(b"rotten")
    monkeypatch.setattr(shutil, "rmtree", lambda path, ignore_errors=False: None)
    with pytest.raises(FormatError, match="not the file that was registered"):
        source(registry, tmp_path).fetch(f"{MODEL}/1")


def test_two_registries_share_a_cache_without_mixing(registry: Registry, tmp_path: Path) -> None:
    artefact = registry.add(b"ours")
    ours = source(registry, tmp_path).fetch(f"{MODEL}/1")
    other = artefact / "draft" / "model.safetensors"
    other.write_bytes(b"theirs")
    registry.client.set_model_version_tag(MODEL, "1", digest_tag("draft/model.safetensors"), file_digest(other))
    theirs = source(registry, tmp_path).fetch(f"{MODEL}/1")
    assert (ours.draft_dir / "model.safetensors").read_bytes() == b"ours"
    assert (theirs.draft_dir / "model.safetensors").read_bytes() == b"theirs"


def test_a_calibration_without_a_digest_is_left_out(registry: Registry, tmp_path: Path) -> None:
    registry.add(b"one")
    registry.client.delete_model_version_tag(MODEL, "1", digest_tag("calibration.json"))
    assert source(registry, tmp_path).fetch(f"{MODEL}/1").calibration_file is None
    registry.client.delete_model_version_tag(MODEL, "1", digest_tag("draft/config.json"))
    with pytest.raises(FormatError, match=r"no sha256 of draft/config\.json"):
        source(registry, tmp_path).fetch(f"{MODEL}/1")


@pytest.mark.parametrize("uri", ["models:/support-desk", "models:/a@b@c", "models:/a/latest", "models:/a/b/3"])
def test_an_unusable_uri_is_named(uri: str, tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="models:/NAME@ALIAS"):
        open_source(uri, tracking_uri="sqlite://", cache_dir=tmp_path)


def test_a_registered_model_needs_a_server(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="MLFLOW_TRACKING_URI"):
        open_source("models:/a@champion", tracking_uri=None, cache_dir=tmp_path)


def test_a_missing_alias_and_a_silent_server_are_told_apart(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="look up support-desk@champion"):
        source(registry, tmp_path).current()
    with pytest.raises(PlatformError, match="no MLflow server answers"):
        RegistrySource("models:/a@champion", "http://127.0.0.1:9", tmp_path).current()


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    folder = open_source(str(tmp_path), tracking_uri=None, cache_dir=tmp_path)
    assert isinstance(folder, FolderSource)
    assert folder.fetch(folder.current()) == DraftFiles(tmp_path.name, tmp_path, None)
    with pytest.raises(RegistryError, match="no draft in"):
        FolderSource(tmp_path / "nothing").fetch("nothing")


class Swaps:
    """Takes drafts like an engine, or refuses them."""

    def __init__(self) -> None:
        self.taken: list[str] = []
        self.refusals = 0
        self.refused: list[str] = []
        self.events: list[str] = []
        self.error: DraftlineError | None = None

    def note_refusal(self, name: str) -> None:
        """See Seat."""
        self.refused.append(name)

    def take_drift_events(self) -> list[str]:
        """See Seat."""
        events, self.events = self.events, []
        return events

    def swap(self, files: DraftFiles) -> None:
        """See Seat."""
        if self.error is not None:
            self.refusals += 1
            raise self.error
        self.taken.append(files.name)


def test_the_follower_swaps_once_per_promotion(registry: Registry, tmp_path: Path) -> None:
    registry.add(b"one")
    swaps = Swaps()
    follower = DraftFollower(source(registry, tmp_path), f"{MODEL}/1", swaps)
    assert not follower.check()
    registry.add(b"two")
    assert follower.check() and not follower.check()
    registry.client.set_registered_model_alias(MODEL, "champion", "1")
    assert follower.check(), "a roll-back is a promotion like any other"
    assert swaps.taken == [f"{MODEL}/2", f"{MODEL}/1"]


def test_the_follower_refuses_once_and_keeps_the_old_draft(registry: Registry, tmp_path: Path) -> None:
    registry.add(b"one")
    swaps = Swaps()
    follower = DraftFollower(source(registry, tmp_path), f"{MODEL}/1", swaps)
    artefact = registry.add(b"two")
    (artefact / "draft" / "model.safetensors").write_bytes(b"changed")
    assert not follower.check() and not follower.check()
    registry.add(b"three")
    swaps.error = TargetError("made for another target")
    assert not follower.check() and not follower.check()
    assert swaps.refusals == 1 and swaps.taken == [] and swaps.refused == [f"{MODEL}/2", f"{MODEL}/3"]
    swaps.error = None
    registry.add(b"four")
    assert follower.check() and swaps.taken == [f"{MODEL}/4"]


class Flaky:
    """A source whose fetch fails while it has an error."""

    def __init__(self, error: DraftlineError | None) -> None:
        self.champion = "a/2"
        self.error = error
        self.reported: list[tuple[str, str]] = []

    def current(self) -> str:
        """See DraftSource."""
        return self.champion

    def fetch(self, name: str) -> DraftFiles:
        """See DraftSource."""
        if self.error is not None:
            raise self.error
        return DraftFiles(name, Path(), None)

    def report_drift(self, name: str, event: str) -> None:
        """See DraftSource."""
        if self.error is not None:
            raise self.error
        self.reported.append((name, event))


@pytest.mark.parametrize("error", [RegistryError("could not download"), PlatformError("no MLflow server answers")])
def test_a_registry_that_stumbles_refuses_nothing(error: DraftlineError) -> None:
    flaky, swaps = Flaky(error), Swaps()
    follower = DraftFollower(flaky, "a/1", swaps)
    assert not follower.check() and swaps.taken == []
    flaky.error = None
    assert follower.check() and swaps.taken == ["a/2"]


def test_a_drift_event_waits_for_a_registry_that_stumbles() -> None:
    flaky, swaps = Flaky(RegistryError("could not tag")), Swaps()
    flaky.champion = "a/1"
    follower = DraftFollower(flaky, "a/1", swaps)
    swaps.events = ["first", "second"]
    assert not follower.check() and flaky.reported == []
    flaky.error = None
    assert not follower.check() and flaky.reported == [("a/1", "first"), ("a/1", "second")]
    assert not follower.check() and len(flaky.reported) == 2


def test_a_drift_event_becomes_a_tag_of_the_version(registry: Registry, tmp_path: Path) -> None:
    registry.add(b"one")
    swaps = Swaps()
    swaps.events = ['{"reason": "DraftAcceptanceDrift"}']
    DraftFollower(source(registry, tmp_path), f"{MODEL}/1", swaps).check()
    assert registry.client.get_model_version(MODEL, "1").tags[TAG_DRIFT] == '{"reason": "DraftAcceptanceDrift"}'


def test_an_alias_that_comes_back_is_judged_again() -> None:
    flaky, swaps = Flaky(TargetError("made for another target")), Swaps()
    follower = DraftFollower(flaky, "a/1", swaps)
    assert not follower.check()
    flaky.error = None
    assert not follower.check(), "a refusal is remembered"
    flaky.champion = "a/1"
    assert not follower.check()
    flaky.champion = "a/2"
    assert follower.check() and swaps.taken == ["a/2"]


def test_the_follower_outlives_a_registry_that_is_away(tmp_path: Path) -> None:
    away = RegistrySource("models:/a@champion", "http://127.0.0.1:9", tmp_path)
    assert not DraftFollower(away, "a/1", Swaps()).check()


def test_the_follower_polls_until_stopped(registry: Registry, tmp_path: Path) -> None:
    registry.add(b"one")
    swaps = Swaps()
    follower = DraftFollower(source(registry, tmp_path), "nothing", swaps, poll_s=0.01)
    follower.start()
    wait_until(lambda: bool(swaps.taken))
    follower.stop()
    follower._thread.join(5)
    assert not follower._thread.is_alive()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "draft.pt", "weights.PKL"])
def test_a_folder_with_pickles_is_refused_by_the_files_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(FormatError, match=f"{re.escape(name)} of draft mine can hold pickled objects"):
        FolderSource(tmp_path).fetch("mine")
