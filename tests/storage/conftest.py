"""Stores for the storage tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from draftline.storage import ObjectStore, open_store
from tests.servers.faulty_s3 import FaultyS3, running_faulty_s3
from tests.servers.s3 import REAL_SERVER, S3_SERVERS, S3Server, fresh_workspace, named_server

# moto checks no signature: what needs a real server exists only where there is one.
collect_ignore = [] if REAL_SERVER else ["test_real_server.py"]


@pytest.fixture(params=["local", *S3_SERVERS])
def store(
    request: pytest.FixtureRequest, tmp_path: Path, moto_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ObjectStore]:
    """An empty store, on every backend."""
    if request.param == "local":
        yield open_store(str(tmp_path / "workspace"))
        return
    with fresh_workspace(named_server(request.param, moto_server), monkeypatch) as s3_store:
        yield s3_store


@pytest.fixture
def faulty_s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
    """A misbehaving server with the environment set for it."""
    with running_faulty_s3() as state:
        S3Server(state.endpoint_url, "test", "test").use(monkeypatch)
        yield state
