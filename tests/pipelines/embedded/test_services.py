"""Command lines, environments, ports, temporary directories, the table: everything without a process to supervise."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from rich.console import Console

from draftline.errors import PlatformError
from pipelines.embedded import platform as embedded
from pipelines.embedded.platform import Health, PlatformStatus, ServiceStatus, render_status, status, up
from pipelines.embedded.ports import choose_ports, is_free
from pipelines.embedded.services import (
    RayPorts,
    RaySize,
    ServiceSpec,
    answers,
    clean_env,
    loopback_without_proxy,
    mlflow_service,
    ray_client_env,
    ray_service,
)
from pipelines.embedded.state import Layout
from pipelines.embedded.tempdir import choose_temp_dir, create_temp_dir, retire_temp_dir
from serving.edge import CALLBACK, CALLBACK_ENV
from tests.pipelines.embedded.fakes import http_server_here

REPOSITORY = Path(__file__).resolve().parents[3]


def option(spec: ServiceSpec, name: str) -> str:
    return spec.argv[spec.argv.index(name) + 1]


def ray_spec(env: dict[str, str]) -> ServiceSpec:
    return ray_service(Path("/short"), RayPorts(1, 2, 3, 4, 5, 6), RaySize(2, 2**29, has_dashboard=False), env)


def test_ray_stays_on_loopback_and_hands_the_worker_env_on() -> None:
    env = ray_client_env("127.0.0.1:1", Path("/home/token"))
    spec = ray_spec(env | {"MALLOC_ARENA_MAX": "2"})

    assert option(spec, "--node-ip-address") == option(spec, "--dashboard-host") == "127.0.0.1"
    assert spec.env["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"
    assert spec.env["MALLOC_ARENA_MAX"] == "2"
    assert (spec.env["RAY_AUTH_MODE"], spec.env["RAY_AUTH_TOKEN_PATH"]) == ("token", "/home/token")
    assert spec.env["TMPDIR"] == "/short/tmp"
    assert option(spec, "--object-store-memory") == str(2**29)
    assert spec.env[CALLBACK_ENV] == CALLBACK


def test_a_worker_env_cannot_undo_what_keeps_ray_in_place() -> None:
    assert ray_spec({"TMPDIR": "/elsewhere"}).env["TMPDIR"] == "/short/tmp"


@pytest.mark.parametrize(
    ("artifacts_uri", "expected"), [(None, "/home/mlflow/artifacts"), ("s3://bucket/mlf", "s3://bucket/mlf")]
)
def test_mlflow_keeps_artifacts_where_it_is_told(artifacts_uri: str | None, expected: str) -> None:
    spec = mlflow_service(Path("/home/mlflow"), 5000, artifacts_uri, {"AWS_SECRET_ACCESS_KEY": "hush"})

    assert option(spec, "--host") == "127.0.0.1"
    assert option(spec, "--artifacts-destination") == expected
    assert option(spec, "--backend-store-uri") == "sqlite:////home/mlflow/mlflow.db"
    assert spec.env["AWS_SECRET_ACCESS_KEY"] == "hush"
    assert spec.env["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert "hush" not in repr(spec)


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "MLFLOW_S3_ENDPOINT_URL"])
def test_mlflow_sends_plain_checksums_to_foreign_s3_servers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "MLFLOW_S3_ENDPOINT_URL"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.delenv("AWS_REQUEST_CHECKSUM_CALCULATION", raising=False)
    assert "AWS_REQUEST_CHECKSUM_CALCULATION" not in mlflow_service(Path("/m"), 5000, "s3://b", {}).env
    spec = mlflow_service(Path("/m"), 5000, "s3://b", {name: "http://127.0.0.1:9000"})
    assert spec.env["AWS_REQUEST_CHECKSUM_CALCULATION"] == "when_required"


def test_services_do_not_inherit_the_way_to_other_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray.example.com:6379")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example.com")
    monkeypatch.setenv("AWS_PROFILE", "team")
    env = clean_env({"RAY_ADDRESS": "127.0.0.1:1"})
    assert env["RAY_ADDRESS"] == "127.0.0.1:1"
    assert "MLFLOW_TRACKING_URI" not in env
    assert env["AWS_PROFILE"] == "team"


def test_proxy_exceptions_are_added_to_those_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "example.com,localhost")
    assert loopback_without_proxy()["NO_PROXY"] == "example.com,localhost,127.0.0.1"


def test_probes_tell_health_and_ask_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")

    with http_server_here(lambda path: 200 if path == "/health" else 503) as port:
        address = f"127.0.0.1:{port}"
        found = [answers(f"http://{address}/health"), answers(f"http://{address}/ill"), answers(f"tcp://{address}")]
    assert found == [True, False, True]
    assert not answers(f"tcp://{address}") and not answers(f"http://{address}/health")


def test_chosen_ports_are_free_distinct_and_never_ephemeral() -> None:
    ports = choose_ports(50)
    assert len(set(ports)) == 50
    assert all(is_free(port) and port < 32_768 for port in ports)


def test_a_port_that_all_interfaces_share_is_not_free() -> None:
    with socket.socket() as wildcard:
        wildcard.bind(("0.0.0.0", choose_ports(1)[0]))
        wildcard.listen()
        assert not is_free(wildcard.getsockname()[1])


def test_ray_sockets_fit_below_the_temp_dir_whatever_tmpdir_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 80)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    path = choose_temp_dir()
    socket_path = f"{path}/session_2026-01-31_23-59-59_123456_4194304/sockets/plasma_store"
    assert len(os.fsencode(socket_path)) <= 107
    assert not path.exists()


def test_a_temp_dir_is_removed_by_its_platform_alone_and_its_logs_stay(tmp_path: Path) -> None:
    path, logs = tmp_path / "dl-1", tmp_path / "logs"
    create_temp_dir(path, "mine")
    assert path.stat().st_mode & 0o777 == 0o700
    session = path / "session_1" / "logs"
    session.mkdir(parents=True)
    (session / "raylet.out").write_text("hello")
    (path / "session_latest").symlink_to(path / "session_1")

    assert not retire_temp_dir(path, "other", logs)
    assert path.exists()
    assert retire_temp_dir(path, "mine", logs)
    assert not path.exists()
    assert (logs / "ray-session" / "raylet.out").read_text() == "hello"
    assert not retire_temp_dir(path, "mine", logs)


def test_a_temp_dir_goes_though_its_logs_cannot_be_kept(tmp_path: Path) -> None:
    path, logs = tmp_path / "dl-1", tmp_path / "logs"
    create_temp_dir(path, "mine")
    (path / "session_1" / "logs").mkdir(parents=True)
    logs.write_text("a file where a folder must be")
    assert retire_temp_dir(path, "mine", logs)
    assert not path.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mlflow_port": 80}, "mlflow_port is out of range; got 80; expected 1024 to 65535."),
        ({"serve_port": 70_000}, "serve_port is out of range; got 70000; expected 1024 to 65535."),
        ({"num_cpus": -1}, "num_cpus is too small; got -1; expected 1 or more."),
        ({"object_store_bytes": 1}, "object_store_bytes is too small for Ray; got 1; expected at least 78643200."),
        ({"owner_pid": 2**22 + 1}, "The platform's owner does not run; got pid 4194305."),
    ],
)
def test_impossible_arguments_are_refused(arguments: dict[str, int], message: str, tmp_path: Path) -> None:
    with pytest.raises(PlatformError) as caught:
        up(tmp_path / "home", **arguments)  # type: ignore[arg-type]
    assert str(caught.value) == message


def test_a_home_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PlatformError, match=r"home .*/file/home cannot be created; got Not a directory"):
        up(tmp_path / "file" / "home")


def test_a_database_of_a_broken_first_start_is_set_aside_and_a_finished_one_is_not(tmp_path: Path) -> None:
    layout, events = Layout(tmp_path), list[str]()
    layout.mlflow.mkdir()
    for name in ("mlflow.db", "mlflow.db-journal"):
        (layout.mlflow / name).write_text("half")
    embedded._set_aside_unfinished_database(layout, events.append)
    assert {path.name for path in layout.mlflow.iterdir()} == {"mlflow.db.unfinished", "mlflow.db-journal.unfinished"}
    assert len(events) == 2

    (layout.mlflow / "mlflow.db").write_text("whole")
    (layout.mlflow / ".initialised").touch()
    embedded._set_aside_unfinished_database(layout, events.append)
    assert (layout.mlflow / "mlflow.db").read_text() == "whole"


def test_status_of_a_home_that_does_not_exist(tmp_path: Path) -> None:
    report = status(tmp_path / "nowhere")
    assert [(service.name, service.health) for service in report.services] == [
        ("mlflow", Health.STOPPED),
        ("ray", Health.STOPPED),
    ]
    assert not report.is_running
    assert not (tmp_path / "nowhere").exists()


def test_the_table_shows_every_service() -> None:
    services = (
        ServiceStatus("mlflow", Health.RUNNING, "http://127.0.0.1:1", 7, 3_725.0, Path("/l/mlflow.log")),
        ServiceStatus("ray", Health.STOPPED),
    )
    console = Console(width=120, file=io.StringIO())
    with console.capture() as captured:
        console.print(render_status(PlatformStatus(Path("/home"), services, owner_pid=42)))
    text = captured.get()
    for part in ("running", "http://127.0.0.1:1", "1 h 02 min", "/l/mlflow.log", "stopped", "ends with process 42"):
        assert part in text


def test_importing_the_platform_loads_nothing_heavy() -> None:
    script = (
        "import sys, pipelines.embedded.platform\n"
        "print(sorted({'ray', 'mlflow', 'torch', 'kfp', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
