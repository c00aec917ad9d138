"""Where an S3 store lives, and the boto3 client for it.

Credentials, region and endpoint come from boto3's own chain (environment,
``~/.aws``, instance roles). Only the region and the endpoint are remembered:
another process finds its own credentials, so no secret is ever pickled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError

from draftline.errors import SpecError
from draftline.storage.s3_errors import to_storage_error

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client


@dataclass(frozen=True)
class S3Config:
    """One root in a bucket and how to talk to it.

    The defaults bound the wait for an endpoint that does not answer: three
    attempts of 5 s and two pauses of at most 1 s and 2 s.

    Attributes:
        bucket: Bucket name.
        prefix: Key of the root, ``""`` or ``a/b``.
        endpoint_url: Address of a server that is not AWS; ``None`` is AWS.
        region: Region, or ``None`` for the chain's own.
        max_attempts: Tries of one request in all.
        connect_timeout_s: Patience for a connection.
        read_timeout_s: Patience for the next bytes of an answer.
    """

    bucket: str
    prefix: str = ""
    endpoint_url: str | None = None
    region: str | None = None
    max_attempts: int = 3
    connect_timeout_s: float = 5.0
    read_timeout_s: float = 30.0

    @property
    def uri(self) -> str:
        """``s3://bucket/prefix``."""
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    @property
    def where(self) -> str:
        """The endpoint in words for messages."""
        return self.endpoint_url or "AWS S3"


def resolve_config(session: boto3.session.Session, bucket: str, prefix: str = "") -> S3Config:
    """Fix endpoint and region as boto3 finds them here and now.

    The endpoint is ``AWS_ENDPOINT_URL_S3``, else ``AWS_ENDPOINT_URL``, else
    ``endpoint_url`` of the profile, else AWS.

    Raises:
        SpecError: the configured endpoint is not a URL.
        StorageError: boto3's configuration cannot be used.
    """
    try:
        endpoint = session.client("s3").meta.endpoint_url
    except ValueError as error:
        raise SpecError(
            "The S3 endpoint is not a URL",
            got=str(error),
            remedy="Write AWS_ENDPOINT_URL_S3=http://host:port, or unset it for AWS",
        ) from error
    except BotoCoreError as error:
        raise to_storage_error(error, "Cannot set up S3 access", "boto3's configuration") from error
    return S3Config(bucket, prefix, None if _is_aws(endpoint) else endpoint, session.region_name)


def build_session() -> boto3.session.Session:
    """boto3's configuration as it is here and now; making clients from one session is ten times faster.

    Raises:
        StorageError: the configuration cannot be used, for example an unknown profile.
    """
    try:
        return boto3.session.Session()
    except BotoCoreError as error:
        raise to_storage_error(error, "Cannot set up S3 access", "boto3's configuration") from error


def build_client(config: S3Config, session: boto3.session.Session) -> S3Client:
    """A new client; safe for many threads, not for a forked child.

    Raises:
        StorageError: boto3's configuration cannot be used.
    """
    is_aws = config.endpoint_url is None
    settings = Config(
        retries={"mode": "standard", "total_max_attempts": config.max_attempts},
        connect_timeout=config.connect_timeout_s,
        read_timeout=config.read_timeout_s,
        max_pool_connections=32,
        # Other servers seldom have a host name per bucket, and some refuse the trailing checksums of newer clients.
        s3={"addressing_style": "auto" if is_aws else "path"},
        request_checksum_calculation="when_supported" if is_aws else "when_required",
        response_checksum_validation="when_supported" if is_aws else "when_required",
    )
    # A server that is not AWS still needs some region in the signature; this is the one that all of them take.
    region = config.region or (None if is_aws else "us-east-1")
    try:
        return session.client("s3", endpoint_url=config.endpoint_url, region_name=region, config=settings)
    except BotoCoreError as error:
        raise to_storage_error(error, "Cannot set up S3 access", config.where) from error


def _is_aws(endpoint: str) -> bool:
    host = urlsplit(endpoint).hostname or ""
    return host.endswith((".amazonaws.com", ".amazonaws.com.cn"))
