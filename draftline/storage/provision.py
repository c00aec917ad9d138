"""Create what a workspace needs, with the MinIO client: the bucket and its house rules."""

from __future__ import annotations

from urllib.parse import urlsplit

import boto3
import botocore.session
import urllib3
from botocore.exceptions import BotoCoreError
from minio import Minio
from minio.commonconfig import ENABLED, Filter
from minio.error import InvalidResponseError, S3Error, ServerError
from minio.lifecycleconfig import AbortIncompleteMultipartUpload, LifecycleConfig, Rule

from draftline.errors import AccessDenied, SpecError, StorageError
from draftline.storage.s3_client import S3Config, build_client
from draftline.storage.s3_errors import from_code, to_storage_error, unreachable

_DENIED = (401, 403)
_ABANDONED_UPLOAD_DAYS = 7
_READ_TIMEOUT_S = 20.0


def ensure_bucket(config: S3Config, session: boto3.session.Session) -> bool:
    """Create the bucket unless it exists.

    A bucket made here also gets a rule that drops the parts of uploads
    nobody finished after 7 days; a bucket found is left as it is. So is one
    that the account may not look at: it may still read and write in it, which
    :meth:`draftline.storage.base.ObjectStore.check` finds out.

    Args:
        config: The store.
        session: Where the credentials come from.

    Returns:
        Whether the bucket was created.

    Raises:
        SpecError: no bucket of that name can be made.
        AccessDenied, StoreUnreachable, NoSpace, StorageError: with a remedy.
    """
    what = f"Cannot create the bucket {config.bucket!r}"
    client = _minio_client(config, session, what)
    try:
        if _may_exist(client, config.bucket):
            return False
        client.make_bucket(config.bucket)
        client.set_bucket_lifecycle(config.bucket, _house_rules())
    except S3Error as error:
        if error.code == "BucketAlreadyOwnedByYou":
            # Another process of ours was faster.
            return False
        raise from_code(what, error.code or "", error.response.status, error.message or "", config.where) from error
    except ServerError as error:
        raise from_code(what, "", error.status_code, "", config.where) from error
    except InvalidResponseError as error:
        raise StorageError(what, got=f"an answer that is not S3 from {config.where}") from error
    except urllib3.exceptions.HTTPError as error:
        # MaxRetryError wraps the error that tells.
        reason = getattr(error, "reason", None) or error
        raise unreachable(what, config.where, str(reason).rpartition(": ")[2]) from error
    except ValueError as error:
        # The client's rules for names, stricter for a new bucket than for one that exists.
        expected = "3 to 63 lower-case letters, digits, dots and dashes"
        raise SpecError(what, got=str(error), expected=expected, remedy="Choose another bucket's name") from error
    return True


def _may_exist(client: Minio, bucket: str) -> bool:
    try:
        return client.bucket_exists(bucket)
    except S3Error as error:
        if error.response.status in _DENIED:
            return True
        raise


def _house_rules() -> LifecycleConfig:
    abandoned = AbortIncompleteMultipartUpload(days_after_initiation=_ABANDONED_UPLOAD_DAYS)
    rule = Rule(ENABLED, Filter(prefix=""), "draftline-abandoned-uploads", abort_incomplete_multipart_upload=abandoned)
    return LifecycleConfig([rule])


def _minio_client(config: S3Config, session: boto3.session.Session, what: str) -> Minio:
    """A MinIO client with the endpoint, region, credentials and CA bundle that boto3 would use."""
    endpoint = urlsplit(build_client(config, session).meta.endpoint_url)
    try:
        credentials = session.get_credentials()
        frozen = credentials.get_frozen_credentials() if credentials else None
    except BotoCoreError as error:
        raise to_storage_error(error, what, config.where) from error
    if frozen is None:
        raise AccessDenied(what, got="no credentials", remedy="Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    pool = urllib3.PoolManager(
        timeout=urllib3.Timeout(connect=config.connect_timeout_s, read=_READ_TIMEOUT_S),
        retries=urllib3.Retry(
            total=config.max_attempts - 1,
            backoff_factor=0.2,
            status_forcelist=(500, 502, 503, 504),
            raise_on_status=False,
        ),
        ca_certs=botocore.session.get_session().get_config_variable("ca_bundle"),
    )
    return Minio(
        endpoint.netloc,
        access_key=frozen.access_key,
        secret_key=frozen.secret_key,
        session_token=frozen.token,
        secure=endpoint.scheme == "https",
        region=config.region or "us-east-1",
        http_client=pool,
    )
