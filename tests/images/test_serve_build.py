"""The image ``serve``: what is in it, and an endpoint run in it. ``make test-images`` runs this; see ``built``."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.images.built import Image, built_image
from tests.images.dockerfile import ROOT
from tests.servers.tiny_target import make_tiny_target

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

# What KubeRay does with a RayService, on loopback: a cluster, Serve, the application. Then one question.
_SERVE = """
import json, sys
import httpx, ray
from ray import serve
from serving.kubernetes import build

ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
try:
    serve.start(http_options={"host": "127.0.0.1", "port": 8123})
    serve.run(build(json.loads(sys.argv[1])))
    question = {"messages": [{"role": "user", "content": "where is my parcel 3?"}], "max_tokens": 16, "temperature": 0}
    answer = httpx.post("http://127.0.0.1:8123/v1/chat/completions", json={**question, "model": "tiny"}, timeout=60)
    print(json.dumps([answer.status_code, answer.json()]))
finally:
    serve.shutdown()
    ray.shutdown()
"""


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    with built_image("serve", tmp_path_factory) as found:
        yield found


def test_what_kuberay_runs_is_there_and_no_tool_of_the_build(image: Image) -> None:
    tools = "for t in bash python wget ray g++ gcc pip kfp; do command -v $t >/dev/null && echo $t; done; true"
    assert image.run("bash", "-c", tools).stdout.split() == ["bash", "python", "wget", "ray"]


def test_the_sbom_lists_what_replicas_need_in_the_locked_versions(image: Image) -> None:
    sbom = json.loads(image.run("cat", "/opt/draftline/share/draftline/sbom.cdx.json").stdout)
    versions = {part["name"].lower(): part["version"].partition("+")[0] for part in sbom["components"]}
    lock = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if "==" in line
    )
    for name in ("torch", "ray", "transformers", "numba"):
        assert versions[name] == lock[name]
    assert not {"kfp", "mlflow", "matplotlib"} & set(versions)


def test_an_endpoint_answers_from_a_read_only_root(image: Image) -> None:
    target = make_tiny_target(image.shared / "target", steps=0)
    for path in (target, *target.rglob("*")):
        path.chmod(path.stat().st_mode | 0o055)
    arguments = {
        "target": {"source": "/mnt/target", "dtype": "fp32"},
        "serving": {"policy": "async", "model_name": "tiny", "max_requests": 2, "max_context": 256},
        "num_threads": 1,
    }
    command = ["env", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0", "python", "-c", _SERVE, json.dumps(arguments)]
    done = image.run(*command, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    # Ray's processes write to the same stream.
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("[") and line[1:4].isdigit()]
    status, answer = json.loads(line)
    assert status == 200, answer
    assert answer["usage"]["completion_tokens"] >= 1
