"""What can be written as a workspace."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import draftline.storage
from draftline.errors import SpecError, StorageError
from draftline.storage import join_uri, open_store
from draftline.storage.s3 import S3Store
from tests.servers.s3 import S3Server


def test_the_public_names() -> None:
    assert draftline.storage.__all__ == ["ObjectInfo", "ObjectStore", "join_uri", "open_store"]


@pytest.mark.parametrize("form", ["{}", "{}/", "file://{}", "file://localhost{}", "FILE://{}"])
def test_directories(tmp_path: Path, form: str) -> None:
    store = open_store(form.format(tmp_path / "work-space"))
    assert store.uri == str(tmp_path / "work-space")
    assert not (tmp_path / "work-space").exists()


def test_file_uris_are_decoded(tmp_path: Path) -> None:
    assert open_store(f"file://{tmp_path}/a%20b").uri == f"{tmp_path}/a b"


def test_relative_and_home_directories_come_back_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert open_store("here").uri == str(tmp_path / "here")
    assert open_store("~/ws").uri == "/home/somebody/ws"


def test_create_makes_the_directory(tmp_path: Path) -> None:
    open_store(str(tmp_path / "a" / "b"), create=True)
    open_store(str(tmp_path / "a" / "b"), create=True)
    assert (tmp_path / "a" / "b").is_dir()


@pytest.mark.parametrize(
    ("uri", "bucket", "prefix"),
    [
        ("s3://bucket", "bucket", ""),
        ("s3://bucket/", "bucket", ""),
        ("s3://my-bucket.x/a/b/", "my-bucket.x", "a/b"),
        ("S3://bucket/a?b#c", "bucket", "a?b#c"),
        ("s3://abc/..x", "abc", "..x"),
        ("s3://Old_Bucket--1/x", "Old_Bucket--1", "x"),
        (f"s3://{'a' * 63}/x", "a" * 63, "x"),
        ("s3://10.0.0.1x/x", "10.0.0.1x", "x"),
    ],
)
def test_buckets(moto_s3: S3Server, uri: str, bucket: str, prefix: str) -> None:
    store = open_store(uri)
    assert isinstance(store, S3Store)
    assert (store.config.bucket, store.config.prefix) == (bucket, prefix)
    assert open_store(store.uri).uri == store.uri


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("", "expected a directory"),
        ("  ", "expected a directory"),
        ("gs://bucket/x", "expected a directory, file:///absolute/directory or s3://bucket/prefix"),
        ("http://127.0.0.1:9000", "set AWS_ENDPOINT_URL_S3=http://127.0.0.1:9000"),
        ("file://relative/dir", "expected file:///absolute/directory"),
        ("file:relative", "expected file:///absolute/directory"),
        ("s3://", "expected s3://bucket/prefix"),
        ("s3:///prefix", "expected s3://bucket/prefix"),
        ("s3:bucket", "expected s3://bucket/prefix"),
        ("s3://b u/x", "expected s3://bucket/prefix"),
        ("s3://ab/x", "3 to 63 letters"),
        (f"s3://{'a' * 64}/x", "3 to 63 letters"),
        ("s3://bucket-/x", "3 to 63 letters"),
        ("s3://bucket./x", "3 to 63 letters"),
        ("s3://a..b/x", "3 to 63 letters"),
        ("s3://a.-b/x", "3 to 63 letters"),
        ("s3://a-.b/x", "3 to 63 letters"),
        ("s3://10.0.0.1/x", "3 to 63 letters"),
        ("s3://bucket//x", "expected s3://bucket/prefix"),
        ("s3://bucket/../x", "expected s3://bucket/prefix"),
        ("~nobody-has-this-name/ws", "unknown home directory"),
    ],
)
def test_anything_else_is_told_what_to_write(uri: str, told: str) -> None:
    with pytest.raises(SpecError) as caught:
        open_store(uri)
    assert told in str(caught.value)


def test_a_malformed_endpoint(moto_s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "minio")
    with pytest.raises(SpecError, match="Write AWS_ENDPOINT_URL_S3=http://host:port"):
        open_store("s3://bucket/ws")


@pytest.mark.parametrize(
    ("root", "parts", "joined"),
    [
        ("s3://bucket", ("a", "b/c"), "s3://bucket/a/b/c"),
        ("s3://bucket/p/", ("a",), "s3://bucket/p/a"),
        ("/data/ws", ("a",), "/data/ws/a"),
        ("/", ("a",), "/a"),
        ("ws", (), "ws"),
        ("s3://bucket/p/", (), "s3://bucket/p"),
    ],
)
def test_join(root: str, parts: tuple[str, ...], joined: str) -> None:
    assert join_uri(root, *parts) == joined


@pytest.mark.parametrize("part", ["", "/a", "../a", "a/"])
def test_join_refuses_what_is_no_key(part: str) -> None:
    with pytest.raises(StorageError, match="The object key has"):
        join_uri("s3://bucket", part)


def test_a_local_workspace_imports_no_s3_client() -> None:
    code = (
        "import sys; from draftline.storage import open_store; open_store('ws');"
        "sys.exit(str(sorted({'boto3', 'botocore', 'minio', 'tenacity'} & set(sys.modules))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "[]"
