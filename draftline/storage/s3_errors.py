"""The one table from what an S3 client can raise to our errors."""

from __future__ import annotations

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionClosedError,
    ConnectTimeoutError,
    CredentialRetrievalError,
    EndpointConnectionError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    ProxyConnectionError,
    ReadTimeoutError,
    SSLError,
    SSOError,
)
from botocore.exceptions import (
    ConnectionError as BotoConnectionError,
)

from draftline.errors import AccessDenied, NoSpace, ObjectNotFound, StorageError, StoreUnreachable

NOT_FOUND = 404
CONFLICT = 409
PRECONDITION_FAILED = 412
RANGE_NOT_SATISFIABLE = 416

_ABSENT_CODES = frozenset({"NoSuchKey", "NotFound", "404"})
_DENIED_CODES = frozenset(
    {
        "AccessDenied",
        "AllAccessDisabled",
        "ExpiredToken",
        "InvalidAccessKeyId",
        "InvalidToken",
        "RequestTimeTooSkewed",
        "SignatureDoesNotMatch",
    }
)
_FULL_CODES = frozenset(
    {
        "InsufficientStorage",
        "QuotaExceeded",
        "StorageFull",
        "XMinioAdminBucketQuotaExceeded",
        "XMinioStorageFull",
    }
)
_NO_CREDENTIALS = (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError, ProfileNotFound, SSOError)

_CHECK_CREDENTIALS = "Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE) and the rights of that account"
_CHECK_ENDPOINT = "Check that the server runs and that AWS_ENDPOINT_URL_S3 is its address"

_REASONS: tuple[tuple[type[Exception], str], ...] = (
    (ConnectTimeoutError, "no connection in time"),
    (ReadTimeoutError, "connected, then silence"),
    (ProxyConnectionError, "the proxy refuses"),
    (SSLError, "the certificate is not trusted"),
    (EndpointConnectionError, "connection refused or unknown host"),
    (ConnectionClosedError, "connection closed"),
)


def status_of(error: ClientError) -> int:
    """HTTP status of an error answer, 0 when unknown."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def code_of(error: ClientError) -> str:
    """S3 error code of an error answer, ``""`` when unknown."""
    return str(error.response.get("Error", {}).get("Code", ""))


def num_retries(error: ClientError) -> int:
    """How often the request had been sent before this answer came."""
    return int(error.response.get("ResponseMetadata", {}).get("RetryAttempts", 0))


def to_storage_error(error: BaseException, what: str, endpoint: str, *, reads_object: bool = False) -> StorageError:
    """The error to raise instead of ``error``.

    Args:
        error: From botocore, boto3 or s3transfer.
        what: What was being done, for example ``"Cannot read s3://b/k"``.
        endpoint: The server in words.
        reads_object: A 404 then means ObjectNotFound; on any other request it means a wrong server.
    """
    if isinstance(error, ClientError):
        message = str(error.response.get("Error", {}).get("Message") or "")
        if reads_object and status_of(error) == NOT_FOUND and code_of(error) in _ABSENT_CODES:
            return ObjectNotFound(what, got="no such object")
        return from_code(what, code_of(error), status_of(error), message, endpoint, num_retries(error) + 1)
    if isinstance(error, _NO_CREDENTIALS):
        return AccessDenied(what, got=_sentence(error), remedy=_CHECK_CREDENTIALS)
    # ConnectionError: no connection; HTTPClientError and IncompleteReadError: a connection that broke.
    if isinstance(error, (BotoConnectionError, HTTPClientError, IncompleteReadError)):
        words = next((words for kind, words in _REASONS if isinstance(error, kind)), _sentence(error))
        return unreachable(what, endpoint, words)
    if isinstance(error, BotoCoreError):
        return StorageError(what, got=f"{_sentence(error)} from {endpoint}")
    return StorageError(what, got=f"{type(error).__name__}: {_sentence(error)} from {endpoint}")


def unreachable(what: str, endpoint: str, reason: str) -> StoreUnreachable:
    """The error for a server that gave no answer, or half of one."""
    return StoreUnreachable(what, got=f"no answer from {endpoint} ({reason})", remedy=_CHECK_ENDPOINT)


def from_code(what: str, code: str, status: int, message: str, endpoint: str, num_attempts: int = 1) -> StorageError:
    """The error for an error answer of an S3 server.

    Args:
        what: What was being done.
        code: S3 error code, ``""`` when unknown.
        status: HTTP status.
        message: The server's own words, may be empty.
        endpoint: The server in words.
        num_attempts: How often it was asked.
    """
    words = message.rstrip(".")
    got = " ".join(f"HTTP {status} {code}".split()) + f" from {endpoint}" + (f" ({words})" if words else "")
    if code == "NoSuchBucket":
        remedy = "Create the bucket at your provider, or name one that exists; `draftline run` makes a missing one"
        return StorageError(what, got=got, expected="an existing bucket", remedy=remedy)
    # Before the 403s: Ceph reports a full quota as 403 QuotaExceeded.
    if code in _FULL_CODES or status == 507:
        return NoSpace(what, got=got, remedy="Free some space or raise the quota, then run again")
    if code in _DENIED_CODES or status in (401, 403):
        remedy = "Set this machine's clock" if code == "RequestTimeTooSkewed" else _CHECK_CREDENTIALS
        return AccessDenied(what, got=got, remedy=remedy)
    if status == NOT_FOUND:
        return StorageError(what, got=got, expected="an S3 server", remedy=_CHECK_ENDPOINT)
    if status == 501:
        remedy = "Use an S3 server with conditional writes: AWS S3, MinIO, Ceph RGW"
        return StorageError(what, got=got, expected="a server with all of the S3 calls used here", remedy=remedy)
    if status >= 500:
        remedy = "The server is overloaded or broken; look at its log, then run again"
        return StorageError(what, got=f"{got}, {num_attempts} times", remedy=remedy)
    return StorageError(what, got=got)


def _sentence(error: BaseException) -> str:
    """The error's own words on one line."""
    return " ".join(str(error).split()).rstrip(".")
