"""The S3 store against a server that misbehaves: what is repeated, what is told, and how soon."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from draftline.errors import AccessDenied, NoSpace, ObjectExists, ObjectNotFound, StorageError, StoreUnreachable
from draftline.storage import ObjectStore, open_store
from draftline.storage.s3 import S3Store
from draftline.storage.s3_client import S3Config
from tests.servers.faulty_s3 import Fault, FaultyS3
from tests.servers.s3 import S3Server

UNAVAILABLE = Fault("status", 503, "SlowDown")


@pytest.fixture
def flaky(faulty_s3: FaultyS3) -> ObjectStore:
    """A store on the misbehaving server, with one object."""
    faulty_s3.objects["/bucket/ws/k"] = (b"0123456789" * 1000, {})
    return open_store("s3://bucket/ws")


def _sent(server: FaultyS3) -> list[str]:
    return [method for method, _ in server.requests]


@pytest.mark.parametrize("fault", [UNAVAILABLE, Fault("reset")], ids=["503", "reset"])
def test_a_passing_fault_is_repeated(flaky: ObjectStore, faulty_s3: FaultyS3, fault: Fault) -> None:
    faulty_s3.faults.append(fault)
    flaky.put("new", b"1")
    assert faulty_s3.objects["/bucket/ws/new"][0] == b"1"
    faulty_s3.faults.append(fault)
    assert len(flaky.get("k")) == 10_000
    assert _sent(faulty_s3) == ["PUT", "PUT", "GET", "GET"]


@pytest.mark.slow
def test_a_lasting_503_is_told(flaky: ObjectStore, faulty_s3: FaultyS3) -> None:
    faulty_s3.always = UNAVAILABLE
    with pytest.raises(StorageError, match=r"Cannot read s3://bucket/ws/k; got HTTP 503 SlowDown .*, 3 times"):
        flaky.get("k")
    assert _sent(faulty_s3) == ["GET"] * 3


@pytest.mark.parametrize("with_range", [False, True])
def test_a_body_that_breaks_off_is_read_again(flaky: ObjectStore, faulty_s3: FaultyS3, with_range: bool) -> None:
    faulty_s3.faults.append(Fault("cut_body"))
    data = flaky.get_range("k", 0, 10_000) if with_range else flaky.get("k")
    assert data == b"0123456789" * 1000
    assert _sent(faulty_s3) == ["GET", "GET"]


def test_a_body_that_always_breaks_off_is_told(flaky: ObjectStore, faulty_s3: FaultyS3) -> None:
    faulty_s3.always = Fault("cut_body")
    with pytest.raises(StoreUnreachable, match=f"no answer from {faulty_s3.endpoint_url}"):
        flaky.get("k")


def test_a_download_that_breaks_off_leaves_no_file(flaky: ObjectStore, faulty_s3: FaultyS3, tmp_path: Path) -> None:
    faulty_s3.faults.append(Fault("cut_body"))
    flaky.get_file("k", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"0123456789" * 1000
    faulty_s3.always = Fault("cut_body")
    with pytest.raises(StoreUnreachable):
        flaky.get_file("k", tmp_path / "second")
    assert os.listdir(tmp_path) == ["copy"]


LARGE = bytes(range(256)) * ((40 << 20) // 256) + b"end"


@pytest.mark.parametrize("fault", [UNAVAILABLE, Fault("reset"), Fault("lost_answer")], ids=["503", "reset", "lost"])
def test_large_bytes_travel_in_parts_that_are_repeated_one_by_one(
    flaky: ObjectStore, faulty_s3: FaultyS3, fault: Fault
) -> None:
    failed: list[str] = []

    def second_part_fails_once(method: str, path: str, query: str) -> Fault | None:
        if "partNumber=2" not in query or failed:
            return None
        failed.append(query)
        return fault

    faulty_s3.chosen = second_part_fails_once
    flaky.put("large", LARGE)
    assert faulty_s3.objects["/bucket/ws/large"][0] == LARGE
    assert faulty_s3.uploads == {}
    assert sorted(_sent(faulty_s3)) == ["POST", "POST", "PUT", "PUT", "PUT", "PUT"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "error"), [(UNAVAILABLE, StorageError), (Fault("reset"), StoreUnreachable)], ids=["503", "reset"]
)
def test_an_upload_that_fails_leaves_the_old_object_and_no_parts(
    flaky: ObjectStore, faulty_s3: FaultyS3, fault: Fault, error: type[StorageError]
) -> None:
    faulty_s3.chosen = lambda method, path, query: fault if "partNumber=3" in query else None
    with pytest.raises(error, match="Cannot write s3://bucket/ws/k") as caught:
        flaky.put("k", LARGE)
    assert type(caught.value) is error
    assert faulty_s3.objects["/bucket/ws/k"][0] == b"0123456789" * 1000
    assert faulty_s3.uploads == {}, "parts were left behind"
    assert _sent(faulty_s3).count("DELETE") == 1


def test_a_slow_body_is_waited_for(flaky: ObjectStore, faulty_s3: FaultyS3) -> None:
    faulty_s3.faults.append(Fault("slow"))
    assert flaky.get("k") == b"0123456789" * 1000
    assert _sent(faulty_s3) == ["GET"]


def test_a_won_create_whose_answer_was_lost_is_a_success(flaky: ObjectStore, faulty_s3: FaultyS3) -> None:
    faulty_s3.faults.append(Fault("lost_answer"))
    flaky.put_if_absent("manifest", b"mine")
    assert faulty_s3.objects["/bucket/ws/manifest"][0] == b"mine"
    assert _sent(faulty_s3) == ["PUT", "PUT", "HEAD"]


def test_a_lost_create_that_was_repeated_is_still_lost(flaky: ObjectStore, faulty_s3: FaultyS3) -> None:
    # Equal bytes of another writer do not make us the winner.
    flaky.put_if_absent("manifest", b"same")
    faulty_s3.faults.append(Fault("reset"))
    with pytest.raises(ObjectExists):
        flaky.put_if_absent("manifest", b"same")


def test_a_plain_refusal_asks_nothing_more(flaky: ObjectStore, faulty_s3: FaultyS3) -> None:
    with pytest.raises(ObjectExists):
        flaky.put_if_absent("k", b"1")
    assert _sent(faulty_s3) == ["PUT"]


def test_a_conflict_is_tried_again(flaky: ObjectStore, faulty_s3: FaultyS3) -> None:
    conflict = Fault("status", 409, "ConditionalRequestConflict")
    faulty_s3.faults.extend([conflict, conflict])
    flaky.put_if_absent("manifest", b"mine")
    assert _sent(faulty_s3) == ["PUT", "PUT", "PUT"]
    faulty_s3.faults.append(conflict)
    with pytest.raises(ObjectExists):
        flaky.put_if_absent("k", b"1")


@pytest.mark.parametrize(
    ("status", "code", "error"),
    [
        (403, "AccessDenied", AccessDenied),
        (403, "InvalidAccessKeyId", AccessDenied),
        (403, "SignatureDoesNotMatch", AccessDenied),
        (401, "", AccessDenied),
        (400, "ExpiredToken", AccessDenied),
        (403, "RequestTimeTooSkewed", AccessDenied),
        (403, "QuotaExceeded", NoSpace),
        (400, "XMinioAdminBucketQuotaExceeded", NoSpace),
        (507, "", NoSpace),
        (404, "NoSuchBucket", StorageError),
        (404, "NoSuchKey", StorageError),
        (501, "NotImplemented", StorageError),
        (400, "KeyTooLongError", StorageError),
        (409, "OperationAborted", StorageError),
    ],
)
def test_answers_of_a_server(
    flaky: ObjectStore, faulty_s3: FaultyS3, status: int, code: str, error: type[StorageError], tmp_path: Path
) -> None:
    faulty_s3.always = Fault("status", status, code)
    file = tmp_path / "file"
    file.write_bytes(b"1")
    writes: list[Callable[[], None]] = [lambda: flaky.put("new", b"1"), lambda: flaky.put_file("new", file)]
    for write in writes:
        with pytest.raises(error, match=f"Cannot write s3://bucket/ws/new; got HTTP {status}") as caught:
            write()
        assert type(caught.value) is error


def test_missing_bucket_and_wrong_server_are_told_apart(flaky: ObjectStore, faulty_s3: FaultyS3) -> None:
    faulty_s3.always = Fault("status", 404, "NoSuchBucket")
    with pytest.raises(StorageError, match="Create the bucket at your provider") as caught:
        flaky.get("k")
    assert type(caught.value) is StorageError
    faulty_s3.always = Fault("status", 404, "NoSuchKey")
    with pytest.raises(ObjectNotFound):
        flaky.get("k")
    faulty_s3.always = Fault("status", 404, "PageNotFound")
    with pytest.raises(StorageError, match="expected an S3 server"):
        flaky.put("k", b"1")


# Newer Pythons warn of any fork beside threads, and the server is one; the children touch no lock of the parent's.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.slow
def test_forked_children_do_not_share_the_connection(flaky: ObjectStore) -> None:
    flaky.put("parent", b"leaves a connection open")
    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=_write_and_read, args=(flaky, f"child-{number}")) for number in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(30)
    assert [child.exitcode for child in children] == [0, 0, 0]


def _write_and_read(store: ObjectStore, name: str) -> None:
    data = name.encode() * 1000
    for _ in range(20):
        store.put(name, data)
        if store.get(name) != data:
            raise SystemExit(1)


def test_check_refuses_a_server_without_conditional_writes(flaky: ObjectStore, faulty_s3: FaultyS3) -> None:
    faulty_s3.ignores_conditions = True
    with pytest.raises(StorageError, match="does not honour create-if-absent"):
        flaky.check()
    assert list(faulty_s3.objects) == ["/bucket/ws/k"]


def test_a_refused_connection_is_told_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        # Bound but not listening: connections are refused, and nobody else gets the port.
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        S3Server(endpoint, "test", "test").use(monkeypatch)
        started_s = time.monotonic()
        with pytest.raises(StoreUnreachable, match=f"no answer from {endpoint} .connection refused"):
            open_store("s3://bucket/ws").check()
        with pytest.raises(StoreUnreachable, match=f"no answer from {endpoint}"):
            open_store("s3://bucket/ws", create=True)
    assert time.monotonic() - started_s < 10


def test_silence_is_told(faulty_s3: FaultyS3) -> None:
    faulty_s3.always = Fault("hang")
    config = S3Config("bucket", endpoint_url=faulty_s3.endpoint_url, max_attempts=2, read_timeout_s=0.2)
    with pytest.raises(StoreUnreachable, match="connected, then silence"):
        S3Store(config).get("k")
    assert _sent(faulty_s3) == ["GET", "GET"]


@contextmanager
def _deaf_port() -> Iterator[int]:
    """A port whose queue is full, so that the kernel drops every further attempt to connect."""
    with ExitStack() as sockets:
        listener = sockets.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            client = sockets.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


def test_a_host_that_never_connects_is_told(faulty_s3: FaultyS3) -> None:
    with _deaf_port() as port:
        config = S3Config("bucket", endpoint_url=f"http://127.0.0.1:{port}", max_attempts=2, connect_timeout_s=0.2)
        with pytest.raises(StoreUnreachable, match="no connection in time"):
            S3Store(config).get("k")


def test_the_default_patience_stays_below_twenty_seconds() -> None:
    config = S3Config("bucket")
    pauses_s = sum(min(2**number, 20) for number in range(config.max_attempts - 1))
    assert config.max_attempts * config.connect_timeout_s + pauses_s < 20


def test_no_credentials(faulty_s3: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    for use in (lambda: open_store("s3://bucket/ws").get("k"), lambda: open_store("s3://bucket/ws", create=True)):
        with pytest.raises(AccessDenied, match="AWS_ACCESS_KEY_ID"):
            use()
    assert faulty_s3.requests == []


def test_an_unknown_profile(faulty_s3: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(AccessDenied, match="nobody"):
        open_store("s3://bucket/ws")


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Fault("status", 503, "SlowDown"), StorageError),
        (Fault("reset"), StoreUnreachable),
    ],
    ids=["503", "reset"],
)
def test_create_tells_the_same_errors(faulty_s3: FaultyS3, fault: Fault, error: type[StorageError]) -> None:
    faulty_s3.always = fault
    with pytest.raises(error, match="Cannot create the bucket 'bucket'") as caught:
        open_store("s3://bucket/ws", create=True)
    assert type(caught.value) is error
    assert faulty_s3.endpoint_url in str(caught.value)


def test_a_bucket_that_may_not_be_looked_at_may_still_be_used(faulty_s3: FaultyS3) -> None:
    faulty_s3.faults.append(Fault("status", 403, "AccessDenied"))
    open_store("s3://bucket/ws", create=True).put("k", b"1")
    assert _sent(faulty_s3) == ["HEAD", "PUT"]
    assert faulty_s3.objects["/bucket/ws/k"][0] == b"1"
