"""A prefix in an S3 bucket as an object store."""

from __future__ import annotations

import io
import os
import threading
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import tenacity
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig, create_transfer_manager
from botocore.exceptions import BotoCoreError, ClientError, IncompleteReadError, ResponseStreamingError
from s3transfer.exceptions import RetriesExceededError, S3DownloadFailedError

from draftline.errors import ObjectExists, ObjectNotFound, StorageError
from draftline.storage.base import ObjectInfo
from draftline.storage.files import replace_durably, translated
from draftline.storage.keys import validate_key, validate_prefix
from draftline.storage.probe import probe
from draftline.storage.s3_client import S3Config, build_client, build_session
from draftline.storage.s3_errors import (
    CONFLICT,
    NOT_FOUND,
    PRECONDITION_FAILED,
    RANGE_NOT_SATISFIABLE,
    num_retries,
    status_of,
    to_storage_error,
)

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

MULTIPART_BYTES = 16 << 20
"""Objects from this size on travel in parts of this size."""

LIST_PAGE_KEYS = 1000
"""Keys in one answer to a listing; S3 allows no more."""

_WRITE_ID = "draftline-write"
_NUM_CONFLICT_ATTEMPTS = 5
_NUM_PARTS_AT_ONCE = 4
_TRANSFER = TransferConfig(
    multipart_threshold=MULTIPART_BYTES, multipart_chunksize=MULTIPART_BYTES, max_concurrency=_NUM_PARTS_AT_ONCE
)
# s3transfer copies the parts of bytes that it sends; ten of them, its default, would be more than is ever under way.
_TRANSFER.max_in_memory_upload_chunks = _NUM_PARTS_AT_ONCE


class S3Store:
    """Objects below one prefix of a bucket. Implements :class:`draftline.storage.base.ObjectStore`.

    Safe for threads. Pickles as its configuration: the client, and with it
    the credentials, is made in each process on first use.

    A write that fails with StoreUnreachable may have happened or not; writing
    the same bytes again is safe.

    Args:
        config: Bucket, prefix, endpoint; see :func:`draftline.storage.s3_client.resolve_config`.
        client: A client of this process for the same endpoint, if there is one already.
    """

    def __init__(self, config: S3Config, client: S3Client | None = None) -> None:
        self._config = config
        self._root = f"{config.prefix}/" if config.prefix else ""
        self._lock = threading.Lock()
        self._client = client
        self._client_pid = os.getpid()

    def __reduce__(self) -> tuple[type[S3Store], tuple[S3Config]]:
        return (S3Store, (self._config,))

    def __repr__(self) -> str:
        return f"S3Store({self._config!r})"

    @property
    def uri(self) -> str:
        """``s3://bucket/prefix``."""
        return self._config.uri

    @property
    def config(self) -> S3Config:
        """Where the store lives; holds no secret."""
        return self._config

    def get(self, key: str) -> bytes:
        """See :meth:`ObjectStore.get`."""
        with self._translated("read", validate_key(key)):
            return self._read(key, None)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """See :meth:`ObjectStore.get_range`."""
        name = self._name(validate_key(key))
        if start < 0 or length < 0:
            raise StorageError(f"Cannot read {name}", got=f"start {start}, length {length}", expected="both >= 0")
        if length == 0:
            # HTTP has no empty range; a missing object must be told all the same.
            if self.head(key) is None:
                raise ObjectNotFound(f"Cannot read {name}", got="no such object")
            return b""
        with self._translated("read", key):
            try:
                return self._read(key, f"bytes={start}-{start + length - 1}")
            except ClientError as error:
                if status_of(error) == RANGE_NOT_SATISFIABLE:
                    return b""
                raise

    def put(self, key: str, data: bytes) -> None:
        """See :meth:`ObjectStore.put`."""
        with self._translated("write", validate_key(key)):
            if len(data) < MULTIPART_BYTES:
                self._s3().put_object(Bucket=self._config.bucket, Key=self._root + key, Body=data)
                return
            # s3transfer repeats single parts, and aborts the upload when one fails for good.
            with create_transfer_manager(self._s3(), _TRANSFER) as manager:
                manager.upload(io.BytesIO(data), self._config.bucket, self._root + key).result()

    def put_if_absent(self, key: str, data: bytes) -> None:
        """See :meth:`ObjectStore.put_if_absent`.

        botocore sends a request again when the answer was lost. When the
        first one had been carried out, the second is answered 412, although
        we are the winner. Every call therefore marks its object with an id of
        its own (user metadata ``draftline-write``); a 412 after a repetition
        is a success when the stored object carries our id. Comparing the
        content would not do: of two racers with equal bytes both could win.
        """
        write_id = uuid.uuid4().hex
        with self._translated("write", validate_key(key)):
            for attempt in _while_conflicting():
                with attempt:
                    try:
                        self._create(key, data, write_id)
                    except ClientError as error:
                        if status_of(error) != PRECONDITION_FAILED:
                            raise
                        was_repeated = num_retries(error) > 0 or attempt.retry_state.attempt_number > 1
                        if not (was_repeated and self._carries(key, write_id)):
                            raise ObjectExists(f"{self._name(key)} exists already") from error

    def put_file(self, key: str, path: Path) -> None:
        """See :meth:`ObjectStore.put_file`."""
        with translated(f"Cannot read {path}"), open(path, "rb"):
            # Only to tell a bad local file before any byte travels; s3transfer opens it once per part.
            pass
        with self._translated("write", validate_key(key)), create_transfer_manager(self._s3(), _TRANSFER) as manager:
            manager.upload(str(path), self._config.bucket, self._root + key).result()

    def get_file(self, key: str, path: Path) -> None:
        """See :meth:`ObjectStore.get_file`."""
        validate_key(key)
        with translated(f"Cannot write {path}"), self._translated("read", key):
            replace_durably(Path(os.path.abspath(path)), lambda handle: self._download(key, handle))

    def head(self, key: str) -> ObjectInfo | None:
        """See :meth:`ObjectStore.head`."""
        with self._translated("look at", validate_key(key)):
            try:
                answer = self._s3().head_object(Bucket=self._config.bucket, Key=self._root + key)
            except ClientError as error:
                if status_of(error) == NOT_FOUND:
                    return None
                raise
        return ObjectInfo(key, answer["ContentLength"], answer["LastModified"].timestamp())

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See :meth:`ObjectStore.list`."""
        validate_prefix(prefix)
        return self._pages(prefix)

    def delete(self, key: str) -> None:
        """See :meth:`ObjectStore.delete`."""
        with self._translated("delete", validate_key(key)):
            self._s3().delete_object(Bucket=self._config.bucket, Key=self._root + key)

    def check(self) -> None:
        """See :meth:`ObjectStore.check`. Creates no bucket."""
        probe(self)

    def _s3(self) -> S3Client:
        """This process's client; a forked child must not share its parent's connections."""
        with self._lock:
            if self._client is None or self._client_pid != os.getpid():
                self._client = build_client(self._config, build_session())
                self._client_pid = os.getpid()
            return self._client

    def _name(self, key: str) -> str:
        return f"{self.uri}/{key}"

    @contextmanager
    def _translated(self, verb: str, key: str) -> Iterator[None]:
        try:
            yield
        except (BotoCoreError, ClientError, Boto3Error, S3DownloadFailedError, RetriesExceededError) as error:
            cause = error.last_exception if isinstance(error, RetriesExceededError) else error
            what = f"Cannot {verb} {self._name(key)}"
            raise to_storage_error(cause, what, self._config.where, reads_object=verb == "read") from error

    def _read(self, key: str, byte_range: str | None) -> bytes:
        """The body; botocore repeats a request until the answer starts, this repeats it when the answer breaks off."""
        for attempt in tenacity.Retrying(
            retry=tenacity.retry_if_exception_type((ResponseStreamingError, IncompleteReadError)),
            stop=tenacity.stop_after_attempt(self._config.max_attempts),
            wait=tenacity.wait_random_exponential(multiplier=0.2, max=2.0),
            reraise=True,
        ):
            with attempt:
                s3, bucket, name = self._s3(), self._config.bucket, self._root + key
                if byte_range is None:
                    answer = s3.get_object(Bucket=bucket, Key=name)
                else:
                    answer = s3.get_object(Bucket=bucket, Key=name, Range=byte_range)
                with closing(answer["Body"]) as body:
                    return body.read()
        raise AssertionError("tenacity re-raises the last error")

    def _create(self, key: str, data: bytes, write_id: str) -> None:
        self._s3().put_object(
            Bucket=self._config.bucket,
            Key=self._root + key,
            Body=data,
            IfNoneMatch="*",
            Metadata={_WRITE_ID: write_id},
        )

    def _carries(self, key: str, write_id: str) -> bool:
        """Whether the stored object was written by the call with this id."""
        answer = self._s3().head_object(Bucket=self._config.bucket, Key=self._root + key)
        return answer["Metadata"].get(_WRITE_ID) == write_id

    def _download(self, key: str, handle: BinaryIO) -> None:
        """All parts of one version of the object; s3transfer notices when it is replaced in between."""
        for attempt in tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(S3DownloadFailedError),
            stop=tenacity.stop_after_attempt(self._config.max_attempts),
            reraise=True,
        ):
            with attempt, create_transfer_manager(self._s3(), _TRANSFER) as manager:
                handle.seek(0)
                handle.truncate()
                manager.download(self._config.bucket, self._root + key, handle).result()

    def _pages(self, prefix: str) -> Iterator[ObjectInfo]:
        with self._translated("list", prefix):
            pages = (
                self._s3()
                .get_paginator("list_objects_v2")
                .paginate(
                    Bucket=self._config.bucket,
                    Prefix=self._root + prefix,
                    PaginationConfig={"PageSize": LIST_PAGE_KEYS},
                )
            )
            for page in pages:
                for item in page.get("Contents", []):
                    key = item["Key"].removeprefix(self._root)
                    # Some tools leave empty "folder/" objects; no key of ours ends like that.
                    if key and not key.endswith("/"):
                        yield ObjectInfo(key, item["Size"], item["LastModified"].timestamp())


def _is_conflict(error: BaseException) -> bool:
    return isinstance(error, ClientError) and status_of(error) == CONFLICT


def _while_conflicting() -> tenacity.Retrying:
    """409 says that another conditional write is under way and that ours has not been tried."""
    return tenacity.Retrying(
        retry=tenacity.retry_if_exception(_is_conflict),
        stop=tenacity.stop_after_attempt(_NUM_CONFLICT_ATTEMPTS),
        wait=tenacity.wait_random_exponential(multiplier=0.1, max=2.0),
        reraise=True,
    )
