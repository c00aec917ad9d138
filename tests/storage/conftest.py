"""Stores for the storage tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from draftline.storage import ObjectStore
from tests.servers.faulty_s3 import FaultyS3, running_faulty_s3
from tests.servers.s3 import REAL_SERVER, S3Server

# moto checks no signature: what needs a real server exists only where there is one.
collect_ignore = [] if REAL_SERVER else ["test_real_server.py"]


@pytest.fixture
def store(any_store: ObjectStore) -> ObjectStore:
    """An empty store, on every backend."""
    return any_store


@pytest.fixture
def faulty_s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
    """A misbehaving server with the environment set for it."""
    with running_faulty_s3() as state:
        S3Server(state.endpoint_url, "test", "test").use(monkeypatch)
        yield state
