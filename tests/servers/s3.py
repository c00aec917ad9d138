"""Fixtures: S3 servers for tests. A pytest plugin, loaded by the top-level ``conftest.py``.

Tests run against moto always, and against a real server too when
``DRAFTLINE_TEST_S3_ENDPOINT`` names one (with ``AWS_ACCESS_KEY_ID`` and
``AWS_SECRET_ACCESS_KEY``): the parametrisation then has one member more.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from draftline.storage import ObjectStore, open_store
from tests.servers.moto import running_moto

BUCKET = "draftline-tests"


@dataclass(frozen=True)
class S3Server:
    """Where a test server listens and who may use it."""

    endpoint_url: str
    access_key: str
    secret_key: str

    def use(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Point boto3 and every child process at this server, and away from the developer's own account."""
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", self.endpoint_url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", self.access_key)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", self.secret_key)


def real_server() -> S3Server | None:
    """The real server of the environment, if any."""
    endpoint = os.environ.get("DRAFTLINE_TEST_S3_ENDPOINT")
    if not endpoint:
        return None
    return S3Server(endpoint, os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"])


# Read once: fixtures change the environment later.
REAL_SERVER = real_server()
S3_SERVERS = ("moto", "real") if REAL_SERVER else ("moto",)


@pytest.fixture(scope="session")
def moto_server() -> Iterator[S3Server]:
    """moto, one for all tests; take a bucket or a prefix of your own."""
    with running_moto() as endpoint:
        yield S3Server(endpoint, "test", "test")


@pytest.fixture
def moto_s3(moto_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The moto server, with the environment set for it."""
    moto_server.use(monkeypatch)
    return moto_server


@contextmanager
def fresh_workspace(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    """A store on an empty ``s3://`` workspace, with the environment set for it.

    On a real server the workspace is emptied when the block ends.
    """
    server.use(monkeypatch)
    uri = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    store = open_store(uri, create=True)
    yield store
    if server is not REAL_SERVER:
        # moto's objects live in this process and go with it.
        return
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(store.delete, [info.key for info in store.list()]))


@pytest.fixture(params=S3_SERVERS)
def s3_workspace(
    request: pytest.FixtureRequest, moto_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """An empty ``s3://`` workspace on each server."""
    with fresh_workspace(named_server(request.param, moto_server), monkeypatch) as store:
        yield store.uri


@pytest.fixture(params=["local", *S3_SERVERS])
def any_store(
    request: pytest.FixtureRequest, tmp_path: Path, moto_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ObjectStore]:
    """An empty store, on every backend."""
    if request.param == "local":
        yield open_store(str(tmp_path / "workspace"), create=True)
        return
    with fresh_workspace(named_server(request.param, moto_server), monkeypatch) as s3_store:
        yield s3_store


def named_server(name: str, moto_server: S3Server) -> S3Server:
    """The server for a name in :data:`S3_SERVERS`."""
    return REAL_SERVER if name == "real" and REAL_SERVER else moto_server
