"""What only a server that checks signatures can show; collected when ``DRAFTLINE_TEST_S3_ENDPOINT`` names one."""

from __future__ import annotations

import pytest

from draftline.errors import AccessDenied, StorageError
from draftline.storage import open_store
from tests.servers.s3 import BUCKET, REAL_SERVER


@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
@pytest.mark.parametrize("create", [False, True])
def test_wrong_credentials(monkeypatch: pytest.MonkeyPatch, variable: str, create: bool) -> None:
    assert REAL_SERVER is not None
    REAL_SERVER.use(monkeypatch)
    monkeypatch.setenv(variable, "WRONGWRONGWRONGWRONG")
    with pytest.raises(AccessDenied, match="Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        open_store(f"s3://{BUCKET}/ws", create=create).check()


def test_a_missing_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    assert REAL_SERVER is not None
    REAL_SERVER.use(monkeypatch)
    with pytest.raises(StorageError, match="Create the bucket at your provider"):
        open_store("s3://draftline-no-such-bucket/ws").check()
