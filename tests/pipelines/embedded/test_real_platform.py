"""The real thing: MLflow and Ray, as the whole test session shares them."""

from __future__ import annotations

import ipaddress
import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import psutil
import pytest

from pipelines.embedded.fleet import members
from pipelines.embedded.platform import Health, Platform, status, up
from pipelines.embedded.ports import is_free
from pipelines.embedded.state import Layout, load_state
from tests.servers.platform import NUM_CPUS, WORKER_ENV

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

RAY_TASK = """
import json, os, ray
ray.init(log_to_driver=False)

@ray.remote
def look():
    return {"sum": sum(range(10)), "env": dict(os.environ)}

print("RESULT" + json.dumps({**ray.get(look.remote()), "cpus": ray.cluster_resources()["CPU"]}))
"""


def run_on_ray(env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
    command = [sys.executable, "-c", RAY_TASK]
    return subprocess.run(command, env=clean | env, capture_output=True, text=True, check=False, timeout=120)


def listening(platform: Platform) -> list[tuple[str, str, int]]:
    """Name, address and port of every socket that the platform's processes listen on."""
    layout = Layout(platform.home)
    return [
        (process.name(), connection.laddr.ip, connection.laddr.port)
        for process in members(layout, load_state(layout))
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    ]


def post(platform: Platform, path: str, body: dict[str, object]) -> dict[str, dict[str, dict[str, str]]]:
    url = f"{platform.mlflow_uri}/api/2.0/mlflow/{path}"
    data = json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=30) as response:
        answer: dict[str, dict[str, dict[str, str]]] = json.load(response)
    return answer


def test_both_services_are_healthy_and_recorded(platform: Platform) -> None:
    report = status(platform.home)

    assert report.is_running
    assert report.owner_pid == os.getpid()
    assert {service.name: service.health for service in report.services} == dict.fromkeys(
        ("mlflow", "ray"), Health.RUNNING
    )
    assert (platform.home / "mlflow" / "mlflow.db").is_file()
    assert {path.name for path in platform.logs_dir.glob("*.log")} == {"mlflow.log", "ray.log"}
    assert (platform.home / "ray.token").stat().st_mode & 0o777 == 0o600


def test_the_serve_port_is_free_or_taken_by_the_platform_itself(platform: Platform) -> None:
    # An end-to-end test that ran before this one may have deployed an endpoint on it.
    own = {port for _, _, port in listening(platform)}

    assert is_free(platform.serve_port) or platform.serve_port in own
    assert platform.serve_port not in {
        int(url.rpartition(":")[2]) for url in (platform.mlflow_uri, platform.ray_address)
    }


def test_a_ray_task_runs_with_the_client_env(platform: Platform) -> None:
    done = run_on_ray(dict(platform.ray_client_env))

    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.partition("RESULT")[2])
    assert result["sum"] == 45
    assert result["cpus"] == NUM_CPUS
    wanted = WORKER_ENV | {"MLFLOW_TRACKING_URI": platform.mlflow_uri, "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
    assert {name: result["env"].get(name) for name in wanted} == wanted


def test_ray_refuses_a_client_without_the_token(platform: Platform, tmp_path: Path) -> None:
    wrong = tmp_path / "token"
    wrong.write_text("0" * 64)

    done = run_on_ray({**platform.ray_client_env, "RAY_AUTH_TOKEN_PATH": str(wrong), "RAY_NUM_REDIS_GET_RETRIES": "2"})

    assert done.returncode != 0
    assert "RESULT" not in done.stdout


def test_mlflow_keeps_a_parameter(platform: Platform) -> None:
    experiment = post(platform, "experiments/create", {"name": "embedded-platform"})
    run = post(platform, "runs/create", {"experiment_id": experiment["experiment_id"], "start_time": 0})
    run_id = run["run"]["info"]["run_id"]
    post(platform, "runs/log-parameter", {"run_id": run_id, "key": "block", "value": "7"})

    found = post(platform, "runs/search", {"experiment_ids": [experiment["experiment_id"]]})

    assert "'key': 'block', 'value': '7'" in str(found)
    assert "mlflow-artifacts:/" in str(run)


def test_everything_listens_on_loopback_only(platform: Platform) -> None:
    found = listening(platform)

    ports = {port for _, _, port in found}
    assert {int(platform.mlflow_uri.rpartition(":")[2]), int(platform.ray_address.rpartition(":")[2])} <= ports
    assert [entry for entry in found if not _is_loopback(entry[1])] == []


def test_a_second_up_finds_it(platform: Platform) -> None:
    again = up(platform.home, num_cpus=NUM_CPUS, worker_env=WORKER_ENV, owner_pid=os.getpid())

    assert again.is_reused
    assert again.pids == platform.pids
    assert again.ray_client_env == platform.ray_client_env


def _is_loopback(address: str) -> bool:
    ip = ipaddress.ip_address(address)
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return (mapped or ip).is_loopback
