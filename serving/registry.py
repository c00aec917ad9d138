"""Find a registered draft, bring it here, prove that it is the registered one, and follow its alias.

A draft that does not match its digests or its target never reaches the
engine; the one in use stays.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import httpx

from draftline.errors import DraftlineError, FormatError, PlatformError, RegistryError
from draftline.registry_layout import (
    CALIBRATION_FILE,
    DRAFT_DIR,
    METRICS_FILE,
    TAG_DRIFT,
    WEIGHTS_PATH,
    digests_from_tags,
    refuse_unsafe_files,
    verify_folder,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

_MODEL_URI = re.compile(r"models:/(?P<name>[^/@]+)(@(?P<alias>[^/@]+)|/(?P<version>\d+))")
_REACH_TIMEOUT_S = 5.0
_MAX_UNREPORTED = 16


@dataclass(frozen=True)
class DraftFiles:
    """A verified draft on local disk.

    Attributes:
        name: For people and ``/v1/models``, for example ``support-desk/3``.
        draft_dir: Folder of ``config.json`` and ``model.safetensors``.
        calibration_file: Its ``calibration.json``, or ``None``.
        metrics_file: Its evaluation, ``metrics.json``, or ``None``.
    """

    name: str
    draft_dir: Path
    calibration_file: Path | None
    metrics_file: Path | None = None

    @property
    def block_size(self) -> int:
        """Most tokens that it proposes per step."""
        document = json.loads((self.draft_dir / "config.json").read_text(encoding="utf-8"))
        return int(document.get("block_size", 0))


class DraftSource(Protocol):
    """Where a replica's draft comes from."""

    def current(self) -> str:
        """Name of the draft that should be served now; cheap. Raises RegistryError or PlatformError."""
        ...

    def fetch(self, name: str) -> DraftFiles:
        """Bring that draft here and verify it. Raises FormatError too."""
        ...

    def report_drift(self, name: str, event: str) -> None:
        """Leave an event (one line of JSON) where whoever retrains looks. Raises RegistryError or PlatformError."""
        ...


class FolderSource:
    """A registered-model folder on disk (or a bare draft folder), taken as it is.

    Args:
        folder: Laid out as in :mod:`draftline.registry_layout`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def current(self) -> str:
        """See :class:`DraftSource`."""
        return self._folder.name

    def fetch(self, name: str) -> DraftFiles:
        """See :class:`DraftSource`."""
        return _files(name, self._folder)

    def report_drift(self, name: str, event: str) -> None:
        """Nobody looks here; the event is in the log."""


class RegistrySource:
    """``models:/NAME@ALIAS`` or ``models:/NAME/VERSION`` in an MLflow registry.

    Args:
        uri: The model.
        tracking_uri: The MLflow server.
        cache_dir: Drafts are kept in ``<cache_dir>/drafts/NAME/VERSION-DIGEST``.

    Raises:
        RegistryError: not such a URI.
    """

    def __init__(self, uri: str, tracking_uri: str, cache_dir: Path) -> None:
        match = _MODEL_URI.fullmatch(uri)
        if match is None:
            raise RegistryError(
                f"cannot read the model URI {uri!r}", expected="models:/NAME@ALIAS or models:/NAME/VERSION"
            )
        self._model, self._alias, self._version = match["name"], match["alias"], match["version"]
        self._tracking_uri = tracking_uri
        self._cache_dir = cache_dir

    def current(self) -> str:
        """See :class:`DraftSource`."""
        if self._version is not None:
            return f"{self._model}/{self._version}"
        client = self._client()
        with _registry_errors(f"look up {self._model}@{self._alias}"):
            version = client.get_model_version_by_alias(self._model, self._alias).version
        return f"{self._model}/{version}"

    def fetch(self, name: str) -> DraftFiles:
        """See :class:`DraftSource`."""
        version = name.rpartition("/")[2]
        client = self._client()
        with _registry_errors(f"look up {self._model} version {version}"):
            digests = digests_from_tags(client.get_model_version(self._model, version).tags)
        # Two registries may share the cache, and both have a version 1: the digest tells their drafts apart.
        folder = self._cache_dir / "drafts" / self._model / f"{version}-{digests.get(WEIGHTS_PATH, '')[:12]}"
        origin = f"{self._model} version {version}"
        if folder.is_dir():
            try:
                verify_folder(folder, digests, origin=origin)
                return _files(name, folder, digests)
            except FormatError as error:
                logger.warning("the kept copy is no good and is fetched again: %s", error)
                shutil.rmtree(folder, ignore_errors=True)
        self._download(version, folder, digests)
        return _files(name, folder, digests)

    def report_drift(self, name: str, event: str) -> None:
        """Tag the version; MLflow tells its webhooks of every tag that is set."""
        version = name.rpartition("/")[2]
        client = self._client()
        with _registry_errors(f"tag {self._model} version {version}"):
            client.set_model_version_tag(self._model, version, TAG_DRIFT, event)

    def _client(self) -> MlflowClient:
        if self._tracking_uri.startswith(("http://", "https://")):
            _require_answer(self._tracking_uri)
        import mlflow

        return mlflow.MlflowClient(tracking_uri=self._tracking_uri, registry_uri=self._tracking_uri)

    def _download(self, version: str, folder: Path, digests: Mapping[str, str]) -> None:
        from mlflow.artifacts import download_artifacts

        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{version}-"))
        try:
            with _registry_errors(f"download {self._model} version {version}"):
                # A models:/ URI would resolve through mlflow's process-wide registry, whatever is passed here.
                got = download_artifacts(
                    self._client().get_model_version_download_uri(self._model, version),
                    dst_path=str(temporary),
                    tracking_uri=self._tracking_uri,
                    registry_uri=self._tracking_uri,
                )
            origin = f"{self._model} version {version}"
            verify_folder(Path(got), digests, origin=origin)
            try:
                os.rename(got, folder)
            except OSError:
                # Another replica was first, or a bad copy could not be removed: what is there must prove itself.
                verify_folder(folder, digests, origin=f"{origin} in {folder}")
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def open_source(uri: str, *, tracking_uri: str | None, cache_dir: Path) -> DraftSource:
    """The source of a ``models:/...`` URI or of a folder.

    Raises:
        RegistryError: an unusable URI, or a registered model without a tracking server.
    """
    if not uri.startswith("models:"):
        return FolderSource(Path(uri))
    if not tracking_uri:
        raise RegistryError(f"{uri} needs an MLflow server", remedy="Set MLFLOW_TRACKING_URI=http://HOST:PORT")
    return RegistrySource(uri, tracking_uri, cache_dir)


class Seat(Protocol):
    """Where a draft sits: a replica, as its follower sees it."""

    def swap(self, files: DraftFiles) -> None:
        """Load a fetched draft and put it into the engine. Raises DraftlineError when it does not fit."""
        ...

    def note_refusal(self, name: str) -> None:
        """A promoted draft was refused; counted."""
        ...

    def take_drift_events(self) -> list[str]:
        """What is to be reported of the draft in use, one line of JSON each."""
        ...


class DraftFollower:
    """Polls a source and swaps the engine's draft when another one is promoted.

    Args:
        source: Where drafts come from.
        current: Name of the draft in use.
        seat: Takes the drafts.
        poll_s: Seconds between looks.
    """

    def __init__(self, source: DraftSource, current: str, seat: Seat, *, poll_s: float = 20.0) -> None:
        self._source = source
        self._current = current
        self._refused: str | None = None
        self._seat = seat
        self._unreported: deque[tuple[str, str]] = deque(maxlen=_MAX_UNREPORTED)
        self._poll_s = poll_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="draftline-follower", daemon=True)

    def start(self) -> None:
        """Begin polling."""
        self._thread.start()

    def stop(self) -> None:
        """End polling; returns at once, a download under way is abandoned."""
        self._stopping.set()

    def check(self) -> bool:
        """Look once; True when the draft was swapped. Never raises: serving goes on with the old draft."""
        self._report()
        try:
            wanted = self._source.current()
        except DraftlineError as error:
            logger.warning("keeping draft %s: %s", self._current, error)
            return False
        if wanted == self._current:
            self._refused = None
            return False
        if wanted == self._refused:
            return False
        try:
            self._seat.swap(self._source.fetch(wanted))
        except (RegistryError, PlatformError) as error:
            # Says nothing about the draft: the registry may answer at the next look.
            logger.warning("keeping draft %s, %s could not be fetched: %s", self._current, wanted, error)
            return False
        except DraftlineError as error:
            # Remembered, or the same refusal would be downloaded and logged at every look.
            self._refused = wanted
            self._seat.note_refusal(wanted)
            logger.error("draft %s is refused, keeping %s: %s", wanted, self._current, error)
            return False
        logger.info("draft swapped from %s to %s without interrupting any request", self._current, wanted)
        self._current, self._refused = wanted, None
        return True

    def _report(self) -> None:
        """Hand on what is known of the draft in use; what the registry does not take now waits for the next look."""
        self._unreported.extend((self._current, event) for event in self._seat.take_drift_events())
        try:
            while self._unreported:
                self._source.report_drift(*self._unreported[0])
                self._unreported.popleft()
        except DraftlineError as error:
            logger.warning("a drift event waits to be reported: %s", error)

    def _run(self) -> None:
        while not self._stopping.wait(self._poll_s):
            try:
                self.check()
            except Exception:  # thread boundary: a surprise must not end the following for good
                logger.exception("looking for a new draft failed; trying again in %g s", self._poll_s)


def _files(name: str, folder: Path, digests: Mapping[str, str] | None = None) -> DraftFiles:
    """What lies in the folder; with digests, only files that they cover."""
    draft_dir = folder / DRAFT_DIR if (folder / DRAFT_DIR).is_dir() else folder
    refuse_unsafe_files(draft_dir, origin=f"draft {name}")
    if not (draft_dir / "config.json").is_file():
        raise RegistryError(
            f"no draft in {folder}", expected="a folder with config.json and model.safetensors", remedy="Check the path"
        )

    def vouched(file: str) -> Path | None:
        is_there = (folder / file).is_file() and (digests is None or file in digests)
        return folder / file if is_there else None

    return DraftFiles(name, draft_dir, vouched(CALIBRATION_FILE), vouched(METRICS_FILE))


@contextmanager
def _registry_errors(doing: str) -> Iterator[None]:
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:  # the network errors of requests are OSErrors
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        raise RegistryError(f"could not {doing}", got=first_line, remedy="See the model's page in MLflow") from error


def _require_answer(uri: str) -> None:
    """Fail in seconds where mlflow would retry for minutes; any HTTP answer will do."""
    try:
        httpx.get(f"{uri.rstrip('/')}/health", timeout=_REACH_TIMEOUT_S)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise PlatformError(
            f"no MLflow server answers at {uri}", got=error, remedy="Start it, or correct MLFLOW_TRACKING_URI"
        ) from None
