"""Making buckets."""

from __future__ import annotations

import uuid
from typing import Any

import boto3
import pytest

from draftline.errors import SpecError, StorageError
from draftline.storage import open_store
from draftline.storage.provision import ensure_bucket
from draftline.storage.s3_client import build_client, build_session, resolve_config
from tests.servers.s3 import S3Server


def test_only_create_makes_a_bucket(moto_s3: S3Server) -> None:
    uri = f"s3://new-{uuid.uuid4().hex}/ws"
    with pytest.raises(StorageError, match=r"NoSuchBucket.*`draftline run` makes a missing one"):
        open_store(uri).check()
    open_store(uri, create=True).check()
    open_store(uri).check()


@pytest.mark.parametrize("bucket", ["My_Bucket", "an-alias-s3alias"])
def test_a_name_that_no_new_bucket_can_have(moto_s3: S3Server, bucket: str) -> None:
    with pytest.raises(SpecError, match=f"Cannot create the bucket '{bucket}'.*lower-case letters") as caught:
        open_store(f"s3://{bucket}/ws", create=True)
    assert "\n" not in str(caught.value)


def test_a_new_bucket_drops_abandoned_uploads_and_an_old_one_is_left_alone(moto_s3: S3Server) -> None:
    bucket = f"new-{uuid.uuid4().hex}"
    session = build_session()
    config = resolve_config(session, bucket)
    client = build_client(config, session)
    assert ensure_bucket(config, session)
    rules = client.get_bucket_lifecycle_configuration(Bucket=bucket)["Rules"]
    assert [rule["AbortIncompleteMultipartUpload"] for rule in rules] == [{"DaysAfterInitiation": 7}]
    client.delete_bucket_lifecycle(Bucket=bucket)
    assert not ensure_bucket(config, session)
    with pytest.raises(client.exceptions.ClientError, match="NoSuchLifecycleConfiguration"):
        client.get_bucket_lifecycle_configuration(Bucket=bucket)


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"])
def test_the_endpoint_is_the_one_boto3_uses(moto_s3: S3Server, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    monkeypatch.setenv(variable, moto_s3.endpoint_url)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-north-1")
    session = build_session()
    config = resolve_config(session, "bucket", "a/b")
    assert (config.endpoint_url, config.region, config.uri) == (moto_s3.endpoint_url, "eu-north-1", "s3://bucket/a/b")
    # botocore builds the attributes of its Config at run time; a type checker knows none of them.
    settings: Any = build_client(config, session).meta.config
    assert settings.s3 == {"addressing_style": "path"}
    assert settings.request_checksum_calculation == settings.response_checksum_validation == "when_required"


def test_without_an_endpoint_it_is_aws(moto_s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    session = boto3.session.Session(region_name="eu-north-1")
    config = resolve_config(session, "bucket")
    assert config.endpoint_url is None
    assert build_client(config, session).meta.endpoint_url == "https://s3.eu-north-1.amazonaws.com"
